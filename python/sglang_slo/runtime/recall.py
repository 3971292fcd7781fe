"""Brings swapped requests back from host memory: whose turn it is, whether there is room, when they decode again."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from sglang_slo.core import preemption
from sglang_slo.core.plan import HOLD_UP_S, TURN_S
from sglang_slo.core.preemption import Turn
from sglang_slo.runtime import batches
from sglang_slo.runtime.swap_line import SwapLine, Swapped, iteration_s

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_slo.runtime.scheduler import SloScheduler


class Recall:
    """The way back of one scheduler's `line`. `counts` is told of each that begins to return, as "swap_in"."""

    def __init__(self, scheduler: SloScheduler, line: SwapLine, counts: Counter[str]) -> None:
        self._scheduler, self._line, self._counts = scheduler, line, counts
        self._head_since_s = -math.inf  # when the head of the line last changed

    def begin(self, batch: ScheduleBatch) -> None:
        """Start to load the KV of swapped requests, the most urgent first, as far as the ledger admits them."""
        while True:
            waiting, turn = self._head(TURN_S)
            if waiting is None or turn is Turn.NOT_YET or not self._enters(batch, waiting, turn):
                return
            self._head_since_s = self._scheduler.slo_tick.now_s
            if self._line.bring_back(waiting, iteration_s(self._scheduler, batch.reqs)):
                self._counts["swap_in"] += 1

    def ended(self, batch: ScheduleBatch) -> ScheduleBatch:
        """The running batch with those whose KV is back on the device."""
        back = self._line.ready(now=batch.is_empty())
        if back is None:
            return batch
        self._pick_up(back.reqs)
        batch.batch_is_full = False
        return batches.merge(batch, back)

    def holds_up(self) -> tuple[Swapped | None, bool]:
        """The swapped request whose room newcomers leave alone, and whether that is because it has stood for long."""
        waiting, turn = self._head(HOLD_UP_S)
        return (waiting if turn in (Turn.HASTY, Turn.OVERDUE) else None), turn is Turn.OVERDUE

    def _head(self, overdue_s: float) -> tuple[Swapped | None, Turn]:
        """The next to come back, and whether it may."""
        s, head = self._scheduler, self._line.head()
        if head is None:
            return None, Turn.NOT_YET
        table, row = s.slo_book.table, head.req.slo_row
        held_up_by = s.slo_planner.held_up_by
        queued = s.slo_book.waiting_rows(s.waiting_queue)
        since_s = max(self._head_since_s, float(table.token_s[row]))
        return head, preemption.turn(
            float(table.deadline_s[row]),
            table.deadline_s[queued[queued >= 0]],
            s.slo_book.base_s(s.slo_tick.now_s),
            since_s,
            s.slo_model.prefill_s(0, head.copy.tokens),
            s.slo_config.lost_share,
            overdue_s,
            int(table.seq[row]),
            table.seq[held_up_by] if held_up_by >= 0 else math.inf,
        )

    def _enters(self, batch: ScheduleBatch, waiting: Swapped, turn: Turn) -> bool:
        s, req = self._scheduler, waiting.req
        arriving = len(self._line.arriving)
        if s.get_num_allocatable_reqs(len(batch.reqs) + arriving) <= 0:
            return False
        s.slo_viewer.look_up_prefix(req)
        table, row = s.slo_book.table, req.slo_row
        charge = waiting.copy.tokens + 1 - int(table.shared_tokens[row])
        if s.slo_preempt.free_tokens() < charge + len(batch.reqs) + arriving:
            return False
        if batch.is_empty() and not arriving and s.chunked_req is None:
            return True  # alone
        ledger = s.slo_viewer.ledger(
            s.slo_book.rows(batch.reqs), s.slo_preempt.free_tokens(), next_back=False
        )
        beside = {
            Turn.SPARE: s.slo_viewer.arrivals.tokens(s.slo_tick.now_s),
            Turn.HASTY: -s.slo_viewer.critical_tokens(s.slo_book.rows(batch.reqs)),
        }
        return ledger.admits(charge, *table.charges(row), beside.get(turn, 0))

    def _pick_up(self, reqs: list[Req]) -> None:
        """Their next gap is short again; the long one since their last token counts, but calls for no hurry."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows, base_s = s.slo_book.rows(reqs), s.slo_book.base_s(s.slo_tick.now_s)
        passed = table.last_token_s[rows] + table.tbt_s[rows] < base_s
        table.last_token_s[rows[passed]] = base_s
