"""One iteration's plan, put together from the decisions in this room: who decodes, who prefills how much.

`Planner.plan` looks at a `View` and returns an `IterationPlan`; it changes nothing outside itself. The order:
time budget and decodes (chunking), the two lines of waiting requests (ordering), the set that fits compute and
KV (packing, reservation), and last the chunk of the one request that is cut.
The same views give the same plans: there is no clock, no randomness and no measurement in here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from sglang_slo.core import chunking, ordering, packing
from sglang_slo.core.chunking import Budget, DecodeChoice
from sglang_slo.core.filling import Filling
from sglang_slo.core.latency import BatchShape, LatencyModel, decode_shape
from sglang_slo.core.ordering import Ranking
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

NO_ROWS = np.zeros(0, np.int64)
SHORTEST_CAP_S = 0.02  # the cap on an iteration follows the tightest TTFT limit, down to this
PATIENCE_S = 2.0  # so long at most decodes leave no time for any prefill
PATIENCE_TOKENS = 256  # the chunk that runs then
NEXT_IN_LINE = 8  # requests whose cached prefixes are kept from eviction until their turn
# The first of the lost, once the first was not served for so long, whoever of them overtook it:
TURN_S = 60.0  # its turn comes, and it need leave nothing to arrivals
HOLD_UP_S = 120.0  # nobody overtakes it any more
MOST_TURNS = 64  # lost requests looked at for their turn in one iteration


@dataclass(frozen=True)
class IterationPlan:
    """What the next iteration does. `prefill`: (row, tokens) in order, only the last may be cut short of its need."""

    prefill: list[tuple[int, int]] = field(default_factory=list)
    decode: np.ndarray | None = None  # positions in the running batch; None: all
    mixed: bool = False
    predicted_s: float = 0.0
    budget_s: float = 0.0
    next_in_line: list[int] = field(default_factory=list)  # rows that did not get in this time, nearest first
    refused: list[int] = field(default_factory=list)  # winnable rows that KV had no room for, nearest first
    shed: list[int] = field(default_factory=list)  # rows that would wait longer than the queue limit
    winnable: int = 0
    lost: int = 0


class PlanSettings(Protocol):
    """What planning reads of the settings; `SloConfig` says what each means and accepts."""

    @property
    def order(self) -> str: ...
    @property
    def chunk(self) -> str: ...
    @property
    def packing(self) -> str: ...
    @property
    def mix(self) -> str: ...
    @property
    def park(self) -> bool: ...
    @property
    def decode_buckets(self) -> bool: ...
    @property
    def lost_share(self) -> float: ...
    @property
    def queue_limit_s(self) -> float | None: ...
    @property
    def margin(self) -> float: ...
    @property
    def idle_cap_ms(self) -> float: ...


class Planner:
    """Plans iterations; keeps only what has to outlast one: the credit of the lost."""

    def __init__(self, config: PlanSettings) -> None:
        self.config = config
        self.lost = ordering.LostLine(config.lost_share)
        self._prefilled_s = -math.inf  # when prefill last ran, or nobody waited for it
        # as of the last plan, the row of the lost request that nobody overtakes any more; -1: none
        self.held_up_by = -1

    def plan(self, view: View) -> IterationPlan:
        """The next iteration."""
        decodes = self._decodes(view)
        if len(view.waiting) == 0:
            self._nobody_waits(view.base_s)
            return self._decode_only(view, decodes, None)
        needs = view.table.prefill_tokens(view.waiting)
        budget = self._budget(view, decodes, int(needs.sum()))
        fits = budget.tokens(view.model)
        ranking = self._ranking(view, needs, _prefill_share(view.model, budget, fits))
        line = self._line(view, budget, ranking, fits)
        filling = self._filled(view, budget, line)
        if filling.out_of_time and (decodes is None or view.base_s - self._prefilled_s > PATIENCE_S):
            budget = self._least_budget(view, budget)
            filling = self._filled(view, budget, line)
        self._account_lost(ranking, filling)
        if filling.prefill:
            self._prefilled_s = view.base_s
        taken = {row for row, _ in filling.prefill}
        following = [row for row in line.rows[: len(taken) + NEXT_IN_LINE].tolist() if row not in taken]
        if not filling.prefill:
            return replace(
                self._decode_only(view, decodes, ranking),
                next_in_line=following,
                refused=self._refused(ranking, filling),
                shed=self._shed(view, ranking),
            )
        return IterationPlan(
            prefill=filling.prefill,
            decode=decodes.positions if decodes and budget.mixed else None,
            mixed=budget.mixed,
            predicted_s=view.model.iteration_s(filling.shape),
            budget_s=budget.time_s,
            next_in_line=following,
            refused=self._refused(ranking, filling),
            shed=[row for row in self._shed(view, ranking) if row not in taken],
            winnable=len(ranking.winnable_rows),
            lost=len(ranking.lost_rows),
        )

    def all_decode(self, table: RequestTable, rows: np.ndarray, base_s: float, model: LatencyModel) -> bool:
        """Whether `plan` would let all of `rows` (int[n], n > 0) decode if nobody waited: the cheap way to ask.

        True counts as the plan of this iteration: nobody had to wait for prefill, and the lost earn nothing.
        """
        allowance_s = chunking.allowances_s(
            table.last_token_s[rows], table.tbt_s[rows], base_s, self.config.margin
        ).min()
        if allowance_s < math.inf:
            everyone = decode_shape(len(rows), int(table.context_tokens(rows).sum()))
            if model.safe_iteration_s(everyone) > allowance_s:
                return False
        self._nobody_waits(base_s)
        return True

    def _nobody_waits(self, base_s: float) -> None:
        self._prefilled_s = base_s
        self.held_up_by = -1
        self.lost.earn(0, waiting=False)
        self.lost.served(base_s)

    def _filled(self, view: View, budget: Budget, line: Line) -> Filling:
        """What of `line` fits into the iteration."""
        filling = Filling(view, budget, self.config.chunk == "fixed")
        waited_s = self.lost.waited_s(view.base_s)
        holds_up = line.turns > 0 and waited_s > HOLD_UP_S
        goes_first = self._goes_on(view) or holds_up
        turned_away = False
        for place, row in enumerate(line.rows.tolist()):
            in_turn = place < line.turns
            if in_turn and turned_away:
                continue  # the lost do not overtake one another
            hasty = line.turns <= place < line.turns + line.hasty
            if hasty:
                close = ordering.critical(view.table, row, view.model, view.base_s)
                beside = -view.critical_tokens if close else 0
            else:
                beside = 0 if in_turn and waited_s > TURN_S else view.arrival_reserve_tokens
            got_in = filling.add(row, beside)
            if filling.full or (place == 0 and goes_first and not got_in):
                break
            turned_away |= in_turn and not got_in
        taken = {row for row, _ in filling.prefill}
        self.held_up_by = int(line.rows[0]) if holds_up and int(line.rows[0]) not in taken else -1
        return filling

    def _goes_on(self, view: View) -> bool:
        """Whether the request that was cut last comes first, as it cannot be set aside."""
        return view.chunked >= 0 and not self.config.park

    def _least_budget(self, view: View, budget: Budget) -> Budget:
        """Where no prefill fits at all (a wrong model, limits on the edge of what the hardware can do): a small chunk.

        Without decodes at once, beside them after `PATIENCE_S`, behind however long a history: nothing may keep the
        queue waiting for ever.
        """
        history = int(view.table.history_tokens[view.waiting].max())
        least_s = view.model.safe_iteration_s(budget.base.with_chunk(history, PATIENCE_TOKENS))
        return replace(budget, time_s=max(budget.time_s, least_s * (1 + 1e-9)))

    # -- who decodes, and for how long

    def _decodes(self, view: View) -> DecodeChoice | None:
        if len(view.decoding) == 0:
            return None
        table, rows = view.table, view.decoding
        allowance = chunking.allowances_s(
            table.last_token_s[rows], table.tbt_s[rows], view.base_s, self.config.margin
        )
        may_sit_out = self.config.decode_buckets and view.may_sit_out
        return chunking.choose_decodes(allowance, table.context_tokens(rows), view.model, may_sit_out)

    def _decode_only(
        self, view: View, decodes: DecodeChoice | None, ranking: Ranking | None
    ) -> IterationPlan:
        winnable = len(ranking.winnable_rows) if ranking else 0
        lost = len(ranking.lost_rows) if ranking else 0
        if decodes is None:
            return IterationPlan(winnable=winnable, lost=lost)
        seconds = view.model.iteration_s(decodes.shape)
        return IterationPlan(
            decode=decodes.positions,
            predicted_s=seconds,
            budget_s=decodes.allowance_s,
            winnable=winnable,
            lost=lost,
        )

    def _budget(self, view: View, decodes: DecodeChoice | None, backlog_tokens: int) -> Budget:
        if self.config.chunk == "fixed":
            mixed = decodes is not None and self.config.mix != "never"
            return Budget(mixed, math.inf, decodes.mixed_shape if mixed and decodes else BatchShape(True))
        table, mix = view.table, self.config.mix
        cap = min(self.config.idle_cap_ms / 1e3, max(view.tightest_ttft_s / 4, SHORTEST_CAP_S))
        if not (table.mixable[view.waiting].all() and table.mixable[view.decoding].all()):
            mix = "never"
        return chunking.iteration_budget(decodes, view.model, cap, mix, backlog_tokens)

    # -- who is served

    def _ranking(self, view: View, needs: np.ndarray, prefill_share: float) -> Ranking:
        if self.config.order == "stock":
            return Ranking(view.waiting, NO_ROWS, 0.0)
        table, rows, model = view.table, view.waiting, view.model
        work_s = model.prefill_s_array(table.history_tokens[rows], needs)
        work_s /= prefill_share
        # the fixed cost of the iteration that gives the first token comes on top of the work before it
        start_s = view.base_s + model.coefficients.t0_extend
        return ordering.slack_order(rows, table.deadline_s[rows], work_s, table.seq[rows], start_s)

    def _line(self, view: View, budget: Budget, ranking: Ranking, fits_tokens: int) -> Line:
        """The order of service: the lost go behind the winnable, but for those that have earned their turn."""
        winnable, lost = ranking.winnable_rows, ranking.lost_rows
        if self.config.packing == "dual":
            winnable = self._packed(view, budget, winnable, fits_tokens)
        turns = 0
        if len(lost):
            turns = self.lost.turns(view.table.prefill_tokens(lost[:MOST_TURNS]), fits_tokens)
            overdue = self.config.lost_share > 0 and self.lost.waited_s(view.base_s) > TURN_S
            turns = max(turns, int(overdue))
        rows, hasty = np.concatenate((lost[:turns], winnable, lost[turns:])), len(winnable)
        if view.request_slots <= 0:  # only the one that has its place already can go on
            return Line(rows[rows == view.chunked], 0, 1)
        if self._goes_on(view):
            place = int(np.flatnonzero(rows == view.chunked)[0])
            rows = np.concatenate((rows[place : place + 1], np.delete(rows, place)))
            hasty -= turns <= place < turns + hasty
            turns += place >= turns
        return Line(rows, turns, hasty)

    def _refused(self, ranking: Ranking, filling: Filling) -> list[int]:
        winnable = _among(filling.refused, ranking.winnable_rows)
        return [row for row in filling.refused if row in winnable]

    def _packed(self, view: View, budget: Budget, rows: np.ndarray, fits_tokens: int) -> np.ndarray:
        if len(rows) < 2:
            return rows
        table, model = view.table, view.model
        head = rows[: packing.WINDOW]
        tokens = table.prefill_tokens(head)
        work_s = model.prefill_s_array(table.history_tokens[head], tokens)
        slack_s = table.deadline_s[head] - view.base_s - work_s
        kv = table.held_tokens(head) + table.remaining_tokens[head]
        room = view.free_tokens - len(view.decoding)
        most = min(fits_tokens, view.most_chunk_tokens)
        packed = packing.pack(head, slack_s, tokens, kv, most, room, budget.time_s)
        return np.concatenate([packed, rows[len(head) :]])

    def _account_lost(self, ranking: Ranking, filling: Filling) -> None:
        lost = _among([row for row, _ in filling.prefill], ranking.lost_rows)
        own = sum(tokens for row, tokens in filling.prefill if row in lost)
        everything = sum(tokens for _, tokens in filling.prefill)
        self.lost.earn(everything, len(ranking.lost_rows) > 0)
        self.lost.spend(own)
        self.lost.account(filling.base_s, own, everything)
        if not len(ranking.lost_rows) or int(ranking.lost_rows[0]) in lost:
            self.lost.served(filling.base_s)

    def _shed(self, view: View, ranking: Ranking) -> list[int]:
        """Of the lost that have not begun, those that the line ahead would keep waiting past the queue limit."""
        limit_s, lost, table = self.config.queue_limit_s, ranking.lost_rows, view.table
        if limit_s is None or not len(lost):
            return []
        waits = self.lost.wait_s(np.cumsum(table.prefill_tokens(lost)))
        untouched = (table.output_tokens[lost] == 0) & (lost != view.chunked)
        return lost[untouched & (waits > limit_s)].tolist()


def _prefill_share(model: LatencyModel, budget: Budget, fits_tokens: int) -> float:
    """Share of time that goes into prefill compute at this budget, at least 5 %."""
    if not 0 < budget.time_s < math.inf:
        return 1.0
    return min(max(fits_tokens * model.coefficients.c_tok / budget.time_s, 0.05), 1.0)


def _among(few: list[int], many: np.ndarray) -> set[int]:
    """Those of `few` rows that are in `many`, without walking the many in Python."""
    return {row for row in few if (many == row).any()}


@dataclass(frozen=True, slots=True)
class Line:
    """Waiting rows in order of service: `turns` lost ones whose turn has come (or the one that has to go on), `hasty`
    winnable ones, and the other lost ones."""

    rows: np.ndarray
    turns: int
    hasty: int
