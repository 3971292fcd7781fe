"""One iteration's plan: who decodes, who prefills how much, who is preempted and how, who comes back from the host.

`Planner.plan` looks at a `View` and returns an `IterationPlan`; it changes nothing outside itself. The order:
relief, if the decodes are about to run out of KV; time budget and decodes (chunking); the two lines of waiting requests
(ordering); the set that fits time and KV (filling, packing, ledger); relief once more, if one whose deadline is near
was refused; and returns, if there is room left.
The same views give the same plans: there is no clock, no randomness and no measurement in here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from sglang_slo.core import budgets, ordering
from sglang_slo.core.chunking import Budget, DecodeChoice
from sglang_slo.core.filling import Filling, Terms
from sglang_slo.core.iteration_plan import IterationPlan, PlanSettings
from sglang_slo.core.kv import owed
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.kv.relief import Relief, ReliefPlanner
from sglang_slo.core.kv.returns import about_to_be_late, charge_tokens, returns
from sglang_slo.core.latency import LatencyModel, decode_shape
from sglang_slo.core.ordering import Ranking
from sglang_slo.core.service_line import NO_ROWS, Line, ServiceLine
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

# so long at most decodes leave no time for any prefill: a quarter of the tightest TTFT limit, within these bounds
MIN_PREFILL_STARVATION_S, MAX_PREFILL_STARVATION_S = 0.25, 2.0
NEXT_IN_LINE = 8  # requests whose cached prefixes are kept from eviction until their turn
MAX_ROOM_REQUESTS = 4  # refused requests that room is looked for, in one iteration


@dataclass(frozen=True, slots=True)
class _Draft:
    """One way through an iteration, not yet chosen."""

    view: View
    decodes: DecodeChoice | None
    budget: Budget | None
    ranking: Ranking
    line: Line
    filling: Filling | None
    relief: Relief
    hopeless: list[int] = field(default_factory=list)
    for_return: bool = False  # whether `relief` makes room for one on the host


class Planner:
    """Plans iterations; keeps only what has to outlast one: the credit of the infeasible, and when prefill last ran."""

    def __init__(self, config: PlanSettings) -> None:
        self.config = config
        self.lines = ServiceLine(config, ordering.FairShareQueue(config.lost_share))
        self._relief = ReliefPlanner(config)
        self._prefilled_s = -math.inf  # when prefill last ran, or nobody waited for it
        self._computing: frozenset[int] = frozenset()  # prefix groups computed in the iteration in flight

    def plan(self, view: View) -> IterationPlan:
        """The next iteration."""
        view = _without_hope(view)
        growth = self._relief.for_growth(view.pool, view.model, view.ready_s, view.lengths_trusted)
        draft = self._draft(_after(view, growth), growth)
        if not growth:
            draft = self._with_room(draft)
            draft = draft if draft.relief else self._with_room_for_return(draft)
        self._account(draft)
        return self._chosen(draft)

    def all_decode(self, table: RequestTable, rows: np.ndarray, ready_s: float, model: LatencyModel) -> bool:
        """Whether `plan` would let all of `rows` (int[n], n > 0) decode if nobody waited: the cheap way to ask.

        True counts as the plan of this iteration: nobody had to wait for prefill, and the infeasible earn nothing.
        """
        allowance_s = float((table.due_s(rows, self.config.margin) - ready_s).min())
        if allowance_s < math.inf:
            everyone = decode_shape(
                len(rows), int(table.context_tokens(rows).sum()), verified=table.step.verified_tokens
            )
            if model.safe_iteration_s(everyone) > allowance_s:
                return False
        self._nobody_waits(ready_s)
        return True

    def _nobody_waits(self, ready_s: float) -> None:
        self._prefilled_s = ready_s
        self.lines.share.earn(0, waiting=False)
        self.lines.share.rest()
        self.lines.share.served(ready_s)

    # -- one way through the iteration

    def _draft(self, view: View, relief: Relief) -> _Draft:
        decodes = budgets.decodes(view, self.config)
        if len(view.waiting) == 0:
            return _Draft(
                view, decodes, None, Ranking(NO_ROWS, NO_ROWS), Line(NO_ROWS, -1, 0, 0), None, relief
            )
        needs = view.table.prefill_tokens(view.waiting)
        budget = budgets.budget(view, decodes, int(needs.sum()), self.config)
        fitting_tokens = budget.tokens(view.model)
        ranking = self.lines.ranking(view, needs, _prefill_share(view.model, budget, fitting_tokens))
        refused = self.lines.hopeless(view, ranking.infeasible)
        hopeless = ranking.infeasible[refused].tolist()
        ranking = replace(ranking, infeasible=ranking.infeasible[~refused])
        line = self.lines.line(view, budget, ranking, fitting_tokens)
        filling = self._filled(view, budget, line)
        longest_s = min(max(view.tightest_ttft_s / 4, MIN_PREFILL_STARVATION_S), MAX_PREFILL_STARVATION_S)
        starved = view.ready_s - self._prefilled_s > longest_s
        if filling.out_of_time and (decodes is None or starved):
            budget = budgets.least(view, budget)
            filling = self._filled(view, budget, line)
        return _Draft(view, decodes, budget, ranking, line, filling, relief, hopeless)

    def _with_room(self, draft: _Draft) -> _Draft:
        """The draft with victims for the first refused request that is in need of room and gets it so; else as it is."""
        view, filling = draft.view, draft.filling
        needy = [] if filling is None else self._in_need(draft)[:MAX_ROOM_REQUESTS]
        trusted = view.lengths_trusted
        found = self._relief.who_may_leave(view.pool, view.model, view.ready_s, trusted) if needy else None
        if filling is None or found is None:
            return draft
        for row in needy:
            need, overdue = filling.refused[row], row == draft.line.overdue
            relief = self._relief.for_newcomer(
                view.pool, row, view.model, found, trusted, filling.entered, need, overdue
            )
            if relief:
                with_room = self._draft(_after(view, relief), relief)
                assert with_room.filling is not None
                # what is copied out first is free in an iteration or two, and then it gets in
                if row in with_room.filling.rows or relief.copies(view.pool):
                    return with_room
        return draft

    def _with_room_for_return(self, draft: _Draft) -> _Draft:
        """The draft with victims for the first on the host that would be late otherwise and gets in so; else as it is."""
        view, filling = draft.view, draft.filling
        pool, trusted = view.pool, view.lengths_trusted
        urgent = about_to_be_late(pool, view.model, view.ready_s) if len(pool.host.rows) else []
        found = self._relief.who_may_leave(pool, view.model, view.ready_s, trusted) if urgent else None
        if found is None:
            return draft
        back = self._returns(draft)
        entered = filling.entered if filling is not None else []
        for row, tokens in urgent[:MAX_ROOM_REQUESTS]:
            if row in back:
                continue
            need = pool.need(row, charge_tokens(pool, row, tokens))
            relief = self._relief.for_newcomer(pool, row, view.model, found, trusted, entered, need)
            if relief:
                return replace(self._draft(_after(view, relief), relief), for_return=True)
        return draft

    def _in_need(self, draft: _Draft) -> list[int]:
        """Refused rows that room is made for: the overdue one, and feasible ones whose deadline is near."""
        view, filling = draft.view, draft.filling
        assert filling is not None
        feasible = _among(filling.refused, draft.ranking.feasible)
        return [
            row
            for row in filling.refused
            if row == draft.line.overdue
            or (row in feasible and ordering.critical(view.table, row, view.model, view.ready_s))
        ]

    def _chosen(self, draft: _Draft) -> IterationPlan:
        view, decodes, filling, relief = draft.view, draft.decodes, draft.filling, draft.relief
        prefill = filling.prefill if filling is not None else []
        plan = IterationPlan(
            prefill=prefill,
            loads=filling.loads if filling is not None else [],
            victims=relief.victims,
            park_chunked=relief.park_chunked,
            returns=self._returns(draft),
            next_in_line=self._next_in_line(draft),
            deferred=filling.deferred if filling is not None else [],
            overdue=draft.line.overdue if filling is not None and draft.line.overdue in filling.rows else -1,
            shed=self.lines.shed(view, draft.ranking, prefill),
            hopeless=draft.hopeless,
            feasible=len(draft.ranking.feasible),
            infeasible=len(draft.ranking.infeasible),
        )
        if filling is not None and draft.budget is not None and prefill:
            return replace(
                plan,
                decode=decodes.positions if decodes and draft.budget.mixed else None,
                mixed=draft.budget.mixed,
                predicted_s=view.model.iteration_s(filling.shape),
                budget_s=draft.budget.time_s,
            )
        if decodes is None:
            return plan
        return replace(
            plan,
            decode=decodes.positions,
            predicted_s=view.model.iteration_s(decodes.shape),
            budget_s=decodes.allowance_s,
        )

    def _returns(self, draft: _Draft) -> list[int]:
        view, filling = draft.view, draft.filling
        if not len(view.pool.host.rows) or (draft.relief and not draft.for_return):
            return []
        deadlines = [float(view.table.deadline_s[row]) for row in (filling.refused if filling else ())]
        ledger = filling.ledger if filling is not None else view.pool.ledger()
        free = filling.free_tokens if filling is not None else view.pool.free_tokens - view.pool.next_tokens
        slots = filling.slots if filling is not None else view.request_slots
        overdue = self.lines.overdue(view, np.concatenate((view.waiting, view.pool.host.rows)))
        return returns(
            view.pool,
            ledger,
            free,
            slots,
            min((d for d in deadlines if d >= view.ready_s), default=math.inf),
            overdue,
            overdue >= 0
            and bool((view.waiting == overdue).any())
            and filling is not None
            and overdue in filling.refused,
            view.ready_s,
        )

    @staticmethod
    def _next_in_line(draft: _Draft) -> list[int]:
        taken = draft.filling.rows if draft.filling is not None else set()
        return [row for row in draft.line.rows[: len(taken) + NEXT_IN_LINE].tolist() if row not in taken]

    def _filled(self, view: View, budget: Budget, line: Line) -> Filling:
        """What of `line` fits into the iteration."""
        filling = Filling(view, budget, self.config.chunk == "fixed", self._computing)
        first = line.overdue if line.overdue >= 0 else view.chunked if self.lines.goes_on(view) else -1
        keep_free = view.pool.arrival_reserve_tokens
        refused_promoted = False
        urgent = line.promoted + (line.overdue >= 0)
        for place in range(len(line.rows)):  # it ends after a few of thousands
            row = int(line.rows[place])
            promoted = place < urgent and row != line.overdue
            if promoted and refused_promoted:
                continue  # they do not overtake one another
            if row == line.overdue or urgent <= place < urgent + line.urgent:
                close = row == line.overdue or ordering.critical(view.table, row, view.model, view.ready_s)
                got_in = filling.add(
                    row, Terms(overdraft=view.pool.overdraft_tokens if close else 0, whole=close)
                )
            else:
                got_in = filling.add(row, Terms(far=True, keep_free=keep_free, whole=promoted))
            if filling.full or (row == first and not got_in):
                break
            refused_promoted |= promoted and not got_in
        return filling

    # -- what outlasts the iteration

    def _account(self, draft: _Draft) -> None:
        view, ranking, filling = draft.view, draft.ranking, draft.filling
        self._computing = frozenset(filling.computing - {0}) if filling is not None else frozenset()
        if filling is None:
            return self._nobody_waits(view.ready_s)
        own_rows = _among(filling.rows, ranking.infeasible)
        own = sum(tokens for row, tokens in filling.prefill if row in own_rows)
        everything = sum(tokens for _, tokens in filling.prefill)
        self.lines.share.earn(everything, len(ranking.infeasible) > 0)
        self.lines.share.spend(own)
        self.lines.share.account(view.ready_s, own, everything)
        if len(filling.prefill) == len(view.waiting) and not filling.full:
            self.lines.share.rest(view.model.iteration_s(filling.shape))
        if not len(ranking.infeasible) or int(ranking.infeasible[0]) in own_rows:
            self.lines.share.served(view.ready_s)
        if filling.prefill:
            self._prefilled_s = view.ready_s
        return None


def _without_hope(view: View) -> View:
    """The view that says who is given up for now."""
    rows = owed.given_up(view.pool, view.waiting, view.model, view.ready_s)
    return replace(view, pool=replace(view.pool, given_up=rows)) if len(rows) else view


def _after(view: View, relief: Relief) -> View:
    """The view once the victims have left."""
    if not relief:
        return view
    copied = np.array([mode is PreemptMode.SWAP for _, mode in relief.victims], bool)
    pool: Pool = view.pool.without(relief.positions, copied)
    if relief.park_chunked:
        parked, waiting = view.chunked, view.waiting
        return replace(view, pool=replace(pool, chunked=-1), waiting=waiting[waiting != parked])
    return replace(view, pool=pool, request_slots=view.request_slots + len(relief.positions))


def _prefill_share(model: LatencyModel, budget: Budget, fitting_tokens: int) -> float:
    """Share of time that goes into prefill compute at this budget, at least 5 %."""
    if not 0 < budget.time_s < math.inf:
        return 1.0
    return min(max(fitting_tokens * model.coefficients.c_tok / budget.time_s, 0.05), 1.0)


def _among(few: Iterable[int], many: np.ndarray) -> set[int]:
    """Those of `few` rows that are in `many`, without walking the many in Python."""
    return {row for row in few if (many == row).any()}
