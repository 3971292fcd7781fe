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
from typing import Protocol

import numpy as np

from sglang_slo.core import chunking, ordering, packing
from sglang_slo.core.chunking import Budget, DecodeChoice
from sglang_slo.core.filling import Filling, Terms
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.kv.relief import Relief, ReliefPlanner
from sglang_slo.core.kv.returns import returns
from sglang_slo.core.latency import BatchShape, LatencyModel, decode_shape
from sglang_slo.core.ordering import Ranking
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

NO_ROWS = np.zeros(0, np.int64)
SHORTEST_CAP_S = 0.02  # the cap on an iteration follows the tightest TTFT limit, down to this
MAX_PREFILL_STARVATION_S = 2.0  # so long at most decodes leave no time for any prefill
STARVED_CHUNK_TOKENS = 256  # the chunk that runs then
NEXT_IN_LINE = 8  # requests whose cached prefixes are kept from eviction until their turn
MAX_PROMOTED = 64  # infeasible requests looked at for their turn in one iteration
MAX_ROOM_REQUESTS = 4  # refused requests that room is looked for, in one iteration


@dataclass(frozen=True)
class IterationPlan:
    """What the next iteration does. `prefill`: (row, tokens) in order, only the last may be cut short of its need.

    `victims` leave the running batch and `returns` begin to come back before anything else is done; `decode` names places
    in the running batch that is left then.
    """

    prefill: list[tuple[int, int]] = field(default_factory=list)
    decode: np.ndarray | None = None  # None: all
    mixed: bool = False
    victims: list[tuple[int, PreemptMode]] = field(default_factory=list)  # (row, mode)
    park_chunked: bool = False  # the half-prefilled request lets go of its KV
    returns: list[int] = field(default_factory=list)  # rows that begin to come back from the host
    overdue: int = -1  # of those that get in, the one that nobody may overtake any more
    predicted_s: float = 0.0
    budget_s: float = 0.0
    next_in_line: list[int] = field(default_factory=list)  # rows that did not get in this time, nearest first
    deferred: list[int] = field(default_factory=list)  # rows that let another compute their prefix first
    shed: list[int] = field(default_factory=list)  # rows that would wait longer than the queue limit
    hopeless: list[int] = field(
        default_factory=list
    )  # rows that cannot meet their limits any more, if these are refused
    feasible: int = 0  # waiting requests that can still meet their deadline
    infeasible: int = 0  # waiting requests that cannot, or have none


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
    def lost_wait_s(self) -> float | None: ...
    @property
    def queue_limit_s(self) -> float | None: ...
    @property
    def refuse(self) -> str: ...
    @property
    def margin(self) -> float: ...
    @property
    def idle_cap_ms(self) -> float: ...
    @property
    def preempt(self) -> str: ...
    @property
    def victims(self) -> str: ...
    @property
    def kv(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Line:
    """Waiting rows in order of service: the overdue one, `promoted` infeasible ones, `urgent` feasible ones, the rest."""

    rows: np.ndarray
    overdue: int  # the row that nobody overtakes any more; -1: none
    promoted: int
    urgent: int


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


class Planner:
    """Plans iterations; keeps only what has to outlast one: the credit of the infeasible, and when prefill last ran."""

    def __init__(self, config: PlanSettings) -> None:
        self.config = config
        self.share = ordering.FairShareQueue(config.lost_share)
        self._relief = ReliefPlanner(config)
        self._prefilled_s = -math.inf  # when prefill last ran, or nobody waited for it
        self._computing: frozenset[int] = frozenset()  # prefix groups computed in the iteration in flight

    def plan(self, view: View) -> IterationPlan:
        """The next iteration."""
        growth = self._relief.for_growth(view.pool, view.model, view.base_s, view.lengths_trusted)
        draft = self._draft(_after(view, growth), growth)
        if not growth:
            draft = self._with_room(draft)
        self._account(draft)
        return self._chosen(draft)

    def all_decode(self, table: RequestTable, rows: np.ndarray, base_s: float, model: LatencyModel) -> bool:
        """Whether `plan` would let all of `rows` (int[n], n > 0) decode if nobody waited: the cheap way to ask.

        True counts as the plan of this iteration: nobody had to wait for prefill, and the infeasible earn nothing.
        """
        allowance_s = float((table.due_s(rows, self.config.margin) - base_s).min())
        if allowance_s < math.inf:
            everyone = decode_shape(len(rows), int(table.context_tokens(rows).sum()))
            if model.safe_iteration_s(everyone) > allowance_s:
                return False
        self._nobody_waits(base_s)
        return True

    def _nobody_waits(self, base_s: float) -> None:
        self._prefilled_s = base_s
        self.share.earn(0, waiting=False)
        self.share.rest()
        self.share.served(base_s)

    # -- one way through the iteration

    def _draft(self, view: View, relief: Relief) -> _Draft:
        decodes = self._decodes(view)
        if len(view.waiting) == 0:
            return _Draft(
                view, decodes, None, Ranking(NO_ROWS, NO_ROWS), Line(NO_ROWS, -1, 0, 0), None, relief
            )
        needs = view.table.prefill_tokens(view.waiting)
        budget = self._budget(view, decodes, int(needs.sum()))
        fitting_tokens = budget.tokens(view.model)
        ranking = self._ranking(view, needs, _prefill_share(view.model, budget, fitting_tokens))
        refused = self._hopeless(view, ranking.infeasible)
        hopeless = ranking.infeasible[refused].tolist()
        ranking = replace(ranking, infeasible=ranking.infeasible[~refused])
        line = self._line(view, budget, ranking, fitting_tokens)
        filling = self._filled(view, budget, line)
        starved = view.base_s - self._prefilled_s > MAX_PREFILL_STARVATION_S
        if filling.out_of_time and (decodes is None or starved):
            budget = self._least_budget(view, budget)
            filling = self._filled(view, budget, line)
        return _Draft(view, decodes, budget, ranking, line, filling, relief, hopeless)

    def _with_room(self, draft: _Draft) -> _Draft:
        """The draft with victims for the first refused request that is in need of room and gets it so; else as it is."""
        view, filling = draft.view, draft.filling
        if filling is None:
            return draft
        for row in self._in_need(draft)[:MAX_ROOM_REQUESTS]:
            relief = self._relief.for_newcomer(
                view.pool,
                row,
                view.model,
                view.base_s,
                view.lengths_trusted,
                filling.entered,
                filling.refused[row],
                row == draft.line.overdue,
            )
            if relief:
                with_room = self._draft(_after(view, relief), relief)
                assert with_room.filling is not None
                # what is copied out first is free in an iteration or two, and then it gets in
                if row in with_room.filling.rows or relief.copies(view.pool):
                    return with_room
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
            or (row in feasible and ordering.critical(view.table, row, view.model, view.base_s))
        ]

    def _chosen(self, draft: _Draft) -> IterationPlan:
        view, decodes, filling, relief = draft.view, draft.decodes, draft.filling, draft.relief
        prefill = filling.prefill if filling is not None else []
        plan = IterationPlan(
            prefill=prefill,
            victims=relief.victims,
            park_chunked=relief.park_chunked,
            returns=self._returns(draft),
            next_in_line=self._next_in_line(draft),
            deferred=filling.deferred if filling is not None else [],
            overdue=draft.line.overdue if filling is not None and draft.line.overdue in filling.rows else -1,
            shed=self._shed(view, draft.ranking, prefill),
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
        if not len(view.pool.host.rows) or draft.relief:
            return []
        deadlines = [float(view.table.deadline_s[row]) for row in (filling.refused if filling else ())]
        ledger = filling.ledger if filling is not None else view.pool.ledger()
        free = filling.free_tokens if filling is not None else view.pool.free_tokens - len(view.decoding)
        slots = filling.slots if filling is not None else view.request_slots
        overdue = self._overdue(view, np.concatenate((view.waiting, view.pool.host.rows)))
        return returns(
            view.pool,
            ledger,
            free,
            slots,
            min((d for d in deadlines if d >= view.base_s), default=math.inf),
            overdue,
            overdue >= 0
            and bool((view.waiting == overdue).any())
            and filling is not None
            and overdue in filling.refused,
            view.base_s,
        )

    @staticmethod
    def _next_in_line(draft: _Draft) -> list[int]:
        taken = draft.filling.rows if draft.filling is not None else set()
        return [row for row in draft.line.rows[: len(taken) + NEXT_IN_LINE].tolist() if row not in taken]

    def _filled(self, view: View, budget: Budget, line: Line) -> Filling:
        """What of `line` fits into the iteration."""
        filling = Filling(view, budget, self.config.chunk == "fixed", self._computing)
        first = line.overdue if line.overdue >= 0 else view.chunked if self._goes_on(view) else -1
        keep_free = view.pool.arrival_reserve_tokens
        refused_promoted = False
        urgent = line.promoted + (line.overdue >= 0)
        for place, row in enumerate(line.rows.tolist()):
            promoted = place < urgent and row != line.overdue
            if promoted and refused_promoted:
                continue  # they do not overtake one another
            if row == line.overdue or urgent <= place < urgent + line.urgent:
                close = row == line.overdue or ordering.critical(view.table, row, view.model, view.base_s)
                got_in = filling.add(
                    row, Terms(overdraft=view.pool.overdraft_tokens if close else 0, whole=close)
                )
            else:
                got_in = filling.add(row, Terms(far=True, keep_free=keep_free, whole=promoted))
            if filling.full or (row == first and not got_in):
                break
            refused_promoted |= promoted and not got_in
        return filling

    def _goes_on(self, view: View) -> bool:
        """Whether the request that was cut last comes first, as it cannot be set aside."""
        return view.chunked >= 0 and not self.config.park

    def _least_budget(self, view: View, budget: Budget) -> Budget:
        """Where no prefill fits at all (a wrong model, limits on the edge of what the hardware can do): a small chunk.

        Without decodes at once, beside them after `MAX_PREFILL_STARVATION_S`, behind however long a history: nothing may
        keep the queue waiting for ever.
        """
        history = int(view.table.history_tokens[view.waiting].max())
        least_s = view.model.safe_iteration_s(budget.base.with_chunk(history, STARVED_CHUNK_TOKENS))
        return replace(budget, time_s=max(budget.time_s, least_s * (1 + 1e-9)))

    # -- who decodes, and for how long

    def _decodes(self, view: View) -> DecodeChoice | None:
        if len(view.decoding) == 0:
            return None
        table, rows = view.table, view.decoding
        allowance = table.due_s(rows, self.config.margin) - view.base_s
        may_sit_out = self.config.decode_buckets and view.may_sit_out
        return chunking.choose_decodes(allowance, table.context_tokens(rows), view.model, may_sit_out)

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
            return Ranking(view.waiting, NO_ROWS)
        table, rows, model = view.table, view.waiting, view.model
        work_s = model.prefill_s_array(table.history_tokens[rows], needs)
        work_s /= prefill_share
        # the fixed cost of the iteration that gives the first token comes on top of the work before it
        start_s = view.base_s + model.coefficients.t0_extend
        importance = table.importance[rows]
        return ordering.edf_feasible_first(
            rows,
            table.deadline_s[rows],
            work_s,
            table.seq[rows],
            start_s,
            importance if importance.any() else None,
        )

    def _line(self, view: View, budget: Budget, ranking: Ranking, fitting_tokens: int) -> Line:
        """The order of service: the infeasible go last, but for those that have earned their turn, or are overdue."""
        feasible, infeasible = ranking.feasible, ranking.infeasible
        if self.config.packing == "dual":
            feasible = self._packed(view, budget, feasible, fitting_tokens)
        overdue = self._overdue(view, infeasible)
        rest = infeasible[infeasible != overdue]
        promoted = 0
        if len(rest):
            promoted = self.share.n_promoted(view.table.prefill_tokens(rest[:MAX_PROMOTED]), fitting_tokens)
        head = NO_ROWS if overdue < 0 else np.array([overdue])
        rows = np.concatenate((head, rest[:promoted], feasible, rest[promoted:]))
        urgent = len(feasible)
        if view.request_slots <= 0:  # only the one that has its place already can go on
            return Line(rows[rows == view.chunked], -1, 0, 1)
        if self._goes_on(view):
            place = int(np.flatnonzero(rows == view.chunked)[0])
            before = place - len(head)
            rows = np.concatenate((rows[place : place + 1], np.delete(rows, place)))
            urgent -= promoted <= before < promoted + urgent
            promoted += before >= promoted
        return Line(rows, overdue, promoted, urgent)

    def _overdue(self, view: View, rows: np.ndarray) -> int:
        """The first of `rows` to have come, of those without a token for `lost_wait_s`; -1: there is none."""
        limit_s, table = self.config.lost_wait_s, view.table
        if limit_s is None or not len(rows):
            return -1
        late = rows[view.base_s - table.since_s[rows] > limit_s]
        return int(late[np.argmin(table.seq[late])]) if len(late) else -1

    def _packed(self, view: View, budget: Budget, rows: np.ndarray, fitting_tokens: int) -> np.ndarray:
        if len(rows) < 2:
            return rows
        table, model = view.table, view.model
        head = rows[: packing.WINDOW]
        tokens = table.prefill_tokens(head)
        work_s = model.prefill_s_array(table.history_tokens[head], tokens)
        slack_s = table.deadline_s[head] - view.base_s - work_s
        kv = table.held_tokens(head) + table.remaining_tokens[head]
        room = view.pool.free_tokens - len(view.decoding)
        most = min(fitting_tokens, view.most_chunk_tokens)
        packed = packing.pack(head, slack_s, tokens, kv, most, room, budget.time_s)
        return np.concatenate([packed, rows[len(head) :]])

    # -- what outlasts the iteration

    def _account(self, draft: _Draft) -> None:
        view, ranking, filling = draft.view, draft.ranking, draft.filling
        self._computing = frozenset(filling.computing - {0}) if filling is not None else frozenset()
        if filling is None:
            return self._nobody_waits(view.base_s)
        own_rows = _among(filling.rows, ranking.infeasible)
        own = sum(tokens for row, tokens in filling.prefill if row in own_rows)
        everything = sum(tokens for _, tokens in filling.prefill)
        self.share.earn(everything, len(ranking.infeasible) > 0)
        self.share.spend(own)
        self.share.account(view.base_s, own, everything)
        if len(filling.prefill) == len(view.waiting) and not filling.full:
            self.share.rest(view.model.iteration_s(filling.shape))
        if not len(ranking.infeasible) or int(ranking.infeasible[0]) in own_rows:
            self.share.served(view.base_s)
        if filling.prefill:
            self._prefilled_s = view.base_s
        return None

    def _shed(self, view: View, ranking: Ranking, prefill: list[tuple[int, int]]) -> list[int]:
        """Of the infeasible that have not begun, those that the line ahead would keep waiting past the queue limit."""
        limit_s, rows, table = self.config.queue_limit_s, ranking.infeasible, view.table
        if limit_s is None or not len(rows):
            return []
        waits = self.share.wait_s(np.cumsum(table.prefill_tokens(rows)))
        # one with KV of its own (parked, or cut) has begun
        untouched = (table.output_tokens[rows] == 0) & (rows != view.chunked) & ~table.begun[rows]
        taken = {row for row, _ in prefill}
        return [row for row in rows[untouched & (waits > limit_s)].tolist() if row not in taken]

    def _hopeless(self, view: View, rows: np.ndarray) -> np.ndarray:
        """Of infeasible `rows`, those that have not begun and could not keep their promise even alone; bool[n]."""
        if self.config.refuse != "hopeless" or not len(rows):
            return np.zeros(len(rows), bool)
        table = view.table
        work_s = view.model.prefill_s_array(table.history_tokens[rows], table.prefill_tokens(rows))
        late = view.base_s + view.model.coefficients.t0_extend + work_s > table.deadline_s[rows]
        untouched = (table.output_tokens[rows] == 0) & (rows != view.chunked) & ~table.begun[rows]
        return np.asarray(late & untouched)


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
