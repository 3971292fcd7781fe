"""Ahead of need: requests that can spare a long gap leave for critical ones that KV has no room for.

Room is made only where it pays: nobody who leaves misses anything by it, and what it costs to bring them back is
less than the newcomer takes of the machine itself. What was refused in one iteration may enter in the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_slo.core import preemption
from sglang_slo.core.latency import decode_shape

if TYPE_CHECKING:
    from sglang_slo.runtime.preempt import Preemptor
    from sglang_slo.runtime.scheduler import SloScheduler

CRITICAL_SHARE = 0.5  # of its first-token limit, or less, is left to a request that others make room for
MOST_NEEDY = 4  # requests that room is made for in one iteration
MOST_VICTIMS = 4  # requests that leave for one


class RoomMaker:
    """Makes room in the running batch of one scheduler."""

    def __init__(self, scheduler: SloScheduler, preemptor: Preemptor) -> None:
        self._scheduler, self._preemptor = scheduler, preemptor

    def make(self, batch: ScheduleBatch, refused: list[int]) -> bool:
        """Take victims out of `batch`, in place, for critical requests without room; True: some left.

        `refused`: rows that the last plan would have admitted but for KV, most urgent first. A request is critical
        when little of its first-token limit is left. Only those leave that miss nothing by it (a spare gap that
        their 99th percentile permits already, or a limit that is lost), and only if they cost less than the
        newcomer takes itself.
        """
        s = self._scheduler
        if s.slo_config.preempt == "stock" or s.slo_config.kv == "stock" or batch.is_empty():
            return False
        before = len(batch.reqs)
        for row in refused[:MOST_NEEDY]:
            if row in s.slo_book.reqs and self._critical(row):
                self._make_room_for(row, batch)
        return len(batch.reqs) < before

    def _critical(self, row: int) -> bool:
        s, table = self._scheduler, self._scheduler.slo_book.table
        own_s = s.slo_model.prefill_s(0, int(table.prefill_tokens(np.array([row]))[0]))
        slack_s = float(table.deadline_s[row]) - s.slo_book.base_s(s.slo_tick.now_s) - own_s
        return 0 <= slack_s <= CRITICAL_SHARE * float(table.ttft_s[row])

    def _make_room_for(self, row: int, batch: ScheduleBatch) -> None:
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows = s.slo_book.rows(batch.reqs)
        # counted on what it has written already: a prediction might not come true
        spare = preemption.may_miss(table.gaps[rows], table.missed_gaps[rows], np.zeros(len(rows), np.int64))
        allowed = np.fromiter((self._preemptor.may_leave(req) for req in batch.reqs), bool, len(rows))
        allowed &= (spare >= 1) | table.late[rows] | ~np.isfinite(table.tbt_s[rows])
        bucket = preemption.protection(table.bucket[rows], ~table.late[rows])
        held = table.held_tokens(rows)
        order = preemption.victim_order(bucket, table.remaining_tokens[rows], held, table.seq[rows], allowed)
        chosen = self._fewest(row, batch, rows, order)
        if chosen is not None:
            self._preemptor.take_out(batch, chosen)

    def _fewest(
        self, row: int, batch: ScheduleBatch, rows: np.ndarray, order: np.ndarray
    ) -> np.ndarray | None:
        """The first victims of `order` whose leaving lets `row` in; None if no few ones do, or at too high a price."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        charge = int(table.held_tokens(np.array([row]))[0])
        charges = (charge, *table.charges(row))
        worth_s = s.slo_model.prefill_s(0, charge) + self._occupation_s(row, rows)
        free, cost_s, stay = self._preemptor.free_tokens(), 0.0, np.ones(len(rows), bool)
        for count, position in enumerate(order[:MOST_VICTIMS].tolist()):
            if s.slo_viewer.ledger(rows[stay], free).admits(*charges):
                return order[:count]
            context = int(table.context_tokens(rows[position : position + 1])[0])
            cost_s += s.slo_model.prefill_s(0, context)
            if cost_s > worth_s:
                return None
            stay[position] = False
            free += freed_tokens(batch.reqs[position])
        fits = s.slo_viewer.ledger(rows[stay], free).admits(*charges)
        return order[:MOST_VICTIMS] if fits else None

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
