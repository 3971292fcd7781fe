"""Ahead of need: requests that can spare a long gap leave for those that KV has no room for.

For critical requests room is made only where it pays: what it costs to bring the victims back is less than the
newcomer takes of the machine itself. For one that has waited so long that nobody overtakes it any more, room is made
at any price: waiting for it would leave KV idle, and that costs every newcomer meanwhile. Either way nobody who leaves
misses anything by it. What was refused in one iteration may enter in the next.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_slo.core import ordering, preemption
from sglang_slo.core.latency import decode_shape

if TYPE_CHECKING:
    from sglang_slo.runtime.preempt import Preemptor
    from sglang_slo.runtime.scheduler import SloScheduler

MOST_NEEDY = 4  # requests that room is made for in one iteration
MOST_VICTIMS = 4  # requests that leave for one


class RoomMaker:
    """Makes room in the running batch of one scheduler."""

    def __init__(self, scheduler: SloScheduler, preemptor: Preemptor) -> None:
        self._scheduler, self._preemptor = scheduler, preemptor

    def make(self, batch: ScheduleBatch, refused: list[int]) -> bool:
        """Take victims out of `batch`, in place, for critical and overdue requests without room; True: some left.

        `refused`: rows that the last plan would have admitted but for KV, most urgent first. A request is critical
        when little of its first-token limit is left. Only those leave that miss nothing by it: a spare gap that
        their 99th percentile permits already, or a limit that is lost.
        """
        s = self._scheduler
        if s.slo_config.preempt == "stock" or s.slo_config.kv == "stock" or batch.is_empty():
            return False
        before, start_s = len(batch.reqs), s.slo_book.base_s(s.slo_tick.now_s)
        for row in refused[:MOST_NEEDY]:
            if row in s.slo_book.reqs and ordering.critical(s.slo_book.table, row, s.slo_model, start_s):
                rows = s.slo_book.rows(batch.reqs)
                self._take_out(batch, self._cheap(row, batch, rows, self._may_go(batch, rows)))
        row = self._preemptor.overdue_row()
        if row in s.slo_book.reqs:
            rows = s.slo_book.rows(batch.reqs)
            later = s.slo_book.table.seq[rows] > s.slo_book.table.seq[row]
            self._take_out(batch, self._enough(row, batch, rows, self._may_go(batch, rows) & later))
        return len(batch.reqs) < before

    def _take_out(self, batch: ScheduleBatch, positions: np.ndarray | None) -> None:
        if positions is not None:
            self._preemptor.take_out(batch, positions)

    def _may_go(self, batch: ScheduleBatch, rows: np.ndarray) -> np.ndarray:
        """Who misses nothing by leaving now, bool[n]."""
        table = self._scheduler.slo_book.table
        # counted on what it has written already: a prediction might not come true
        spare = preemption.may_miss(table.gaps[rows], table.missed_gaps[rows], np.zeros(len(rows), np.int64))
        allowed = np.fromiter((self._preemptor.may_leave(req) for req in batch.reqs), bool, len(rows))
        return allowed & ((spare >= 1) | table.late[rows] | ~np.isfinite(table.tbt_s[rows]))

    def _order(self, rows: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        table = self._scheduler.slo_book.table
        bucket = preemption.protection(table.bucket[rows], ~table.late[rows])
        held = table.held_tokens(rows)
        return preemption.victim_order(bucket, table.remaining_tokens[rows], held, table.seq[rows], allowed)

    def _cheap(
        self, row: int, batch: ScheduleBatch, rows: np.ndarray, allowed: np.ndarray
    ) -> np.ndarray | None:
        """The first few victims whose leaving lets `row` in; None if that takes many, or costs more than it is worth."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        charge = int(table.held_tokens(np.array([row]))[0])
        worth_s = s.slo_model.prefill_s(0, charge) + self._occupation_s(row, rows)
        order = self._order(rows, allowed)[:MOST_VICTIMS]
        cost_s = np.cumsum([s.slo_model.prefill_s(0, int(n)) for n in table.context_tokens(rows[order])])
        affordable = order[: int(np.searchsorted(cost_s, worth_s, side="right"))]
        return self._fewest(row, batch, rows, affordable, overdue=False)

    def _enough(
        self, row: int, batch: ScheduleBatch, rows: np.ndarray, allowed: np.ndarray
    ) -> np.ndarray | None:
        """As many victims as let `row` in, whatever they cost; None if all of them are not enough. One stays."""
        order = self._order(rows, allowed)
        return self._fewest(row, batch, rows, order[:-1] if len(order) == len(rows) else order, overdue=True)

    def _fewest(
        self, row: int, batch: ScheduleBatch, rows: np.ndarray, order: np.ndarray, overdue: bool
    ) -> np.ndarray | None:
        """The first victims of `order` whose leaving lets `row` in; None if not even all of them do.

        A critical one may pass the ledger's limit (`Viewer.critical_tokens`), and leaves its room to the next that comes
        back from the host; an overdue one may be that one.
        """
        s, table = self._scheduler, self._scheduler.slo_book.table
        charge = int(table.held_tokens(np.array([row]))[0])
        freed = np.cumsum([0, *(freed_tokens(batch.reqs[i]) for i in order.tolist())])
        free = self._preemptor.free_tokens() + self._preemptor.leaving_tokens

        def fits(count: int) -> bool:
            stay = np.delete(rows, order[:count])
            ledger = s.slo_viewer.ledger(stay, free + int(freed[count]), next_back=not overdue)
            beside = 0 if overdue else -s.slo_viewer.critical_tokens(stay)
            return ledger.admits(charge, *table.charges(row), beside)

        counts = range(int(np.searchsorted(freed, charge - free)), len(order) + 1)
        fewest = bisect.bisect_left(counts, True, key=fits)
        return order[: counts[fewest]] if fewest < len(counts) else None

    def _occupation_s(self, row: int, rows: np.ndarray) -> float:
        """Machine time that a newcomer's decoding takes: its share of the pool, for as long as it is expected to run."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        iteration_s = s.slo_model.iteration_s(decode_shape(len(rows), int(table.context_tokens(rows).sum())))
        expected = float(table.expected_tokens[row])
        held = float(table.prompt_tokens[row]) + expected / 2
        return expected * iteration_s * held / s.max_total_num_tokens


def freed_tokens(req: Req) -> int:
    """KV that becomes free or evictable when `req` leaves: all it holds but what others hold too."""
    node, pinned = req.last_node, req.cache_protected_len
    while node is not None and node.parent is not None and node.lock_ref == 1:
        pinned -= len(node.key)
        node = node.parent
    return req.kv.kv_allocated_len - max(pinned, 0)
