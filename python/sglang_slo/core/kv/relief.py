"""Who leaves the running batch because KV is short, in which mode, and who comes back from the host (CacheOPT C4, C5).

Whom to give up is decided as a set, by what a request has left to lose and by the KV that giving it up frees:

    1. the infeasible: nothing they were promised can be missed any more, or nothing was promised, or they are given up
       because those who have begun are owed more KV than there is (`owed`)
    2. those with slack to spend (pace, mean, end to end; P99 with a gap to spare): back before it is used up
    3. the others: each of these that leaves misses its promise

and within 3 lower importance first, then by score, largest first. The score is the KV held, h: one that holds twice as
much makes room for twice as many newcomers, each of which attains with the same chance (Moore's rule with KV in the
place of time: to lose the fewest jobs, drop the largest). Where predicted lengths have shown to be worth it, the score is
h A with the KV area A that it still needs, token-iterations: it holds h + t after t more iterations of R, so

    A = E[ integral_0^R (h + t) dt ] = E[h R + R^2 / 2]

Always: nobody whose first token is in flight leaves, one request stays, and for a newcomer at most one of group 3 leaves
(unless less important), whose score is `DISPLACE_FACTOR` times the newcomer's own: so each such exchange frees more than
it costs, and cannot be turned round.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from sglang_slo.core.kv import preemption
from sglang_slo.core.kv.ledger import Need
from sglang_slo.core.kv.pool import NOBODY, RELIEF_ITERATIONS, Pool
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.latency import LatencyModel, decode_shape
from sglang_slo.core.lengths import remaining_moments
from sglang_slo.core.slo import GapRule

DISPLACE_FACTOR = (
    1.5  # a newcomer may displace one whose score is so many times its own; 1 to 3 keep the same share
)
MIN_SLACK_S = (
    30.0  # slack below which a request does not leave to spend it: without it they would come and go
)


class ReliefSettings(Protocol):
    """What is read of the settings; `SloConfig` says what each means and accepts."""

    @property
    def preempt(self) -> str: ...
    @property
    def victims(self) -> str: ...
    @property
    def kv(self) -> str: ...


@dataclass(frozen=True)
class Relief:
    """Who leaves. `victims`: (row, mode); `positions` int[k]: their places in the running batch, as the plan found it."""

    victims: list[tuple[int, PreemptMode]] = field(default_factory=list)
    positions: np.ndarray = field(default_factory=lambda: NOBODY)
    park_chunked: bool = False  # whether the half-prefilled request lets go of its KV, too

    def __bool__(self) -> bool:
        return bool(self.victims) or self.park_chunked

    def copies(self, pool: Pool) -> bool:
        """Whether some of the room is there only when a copy to the host is over."""
        return pool.host.hides and any(mode is PreemptMode.SWAP for _, mode in self.victims)


@dataclass(frozen=True)
class Groups:
    """Positions of those who may leave, each group in its order."""

    infeasible: np.ndarray
    with_slack: np.ndarray
    others: np.ndarray
    score: np.ndarray  # float[n], of all positions

    @property
    def all(self) -> np.ndarray:
        return np.concatenate((self.infeasible, self.with_slack, self.others))


def scores(pool: Pool, rows: np.ndarray, by_area: bool) -> np.ndarray:
    """What giving each of `rows` up is worth; float[n], see the module: tokens, or tokens x token-iterations."""
    table = pool.table
    held = table.held_tokens(rows).astype(np.float64)
    if not by_area:
        return held
    first, second = remaining_moments(
        table.log_quantiles[rows], table.output_tokens[rows], table.declared_tokens[rows]
    )
    return np.asarray(held * (held * first + second / 2))


def slack_s(pool: Pool, rows: np.ndarray, model: LatencyModel, ready_s: float) -> np.ndarray:
    """How long each of `rows` may be away and still be back in time, seconds; float[n], negative: not at all.

    Only of those whose rule allows pauses: under the rule that every gap counts there is none to spend.
    """
    table = pool.table
    last, rule = table.last_token_s[rows], table.gap_rule[rows]
    due = table.due_s(rows)
    pausable = (rule == GapRule.PACE) | ~np.isfinite(table.tbt_s[rows])
    p99 = (rule == GapRule.P99) & np.isfinite(table.tbt_s[rows]) & (table.spare_gaps(rows) > 0)
    due = np.where(p99, np.maximum(due, last + table.max_pause_s[rows]), due)
    away = due - ready_s - model.prefill_s_array(np.zeros(len(rows)), table.context_tokens(rows))
    return np.asarray(np.where(pausable | p99, away, -math.inf))


def groups(
    pool: Pool, model: LatencyModel, ready_s: float, victims: str, trusted: bool, protected: bool = False
) -> Groups:
    """Who may leave, in the order of the module; `victims`: auto, kv, area or latest (`--slo-victims`).

    `protected`: instead, those who are left alone for a while (`stays_until_s`).
    """
    table, rows = pool.table, pool.decoding
    allowed = pool.leavers.allowed & ((table.stays_until_s[rows] > ready_s) == protected)
    if victims == "latest":
        positions = np.flatnonzero(allowed)
        latest = positions[np.argsort(-table.seq[rows[positions]])]
        return Groups(latest, NOBODY, NOBODY, np.zeros(len(rows)))
    by_area = victims == "area" or (victims == "auto" and trusted)
    score = scores(pool, rows, by_area)
    feasible = table.feasible(rows) & ~np.isin(rows, pool.given_up)
    slack = slack_s(pool, rows, model, ready_s)
    spare = feasible & (slack >= MIN_SLACK_S)
    seq, importance = table.seq[rows], table.importance[rows]

    def ordered(pick: np.ndarray, *keys: np.ndarray) -> np.ndarray:
        positions = np.flatnonzero(pick & allowed)
        found: np.ndarray = positions[
            np.lexsort((-seq[positions], *(key[positions] for key in reversed(keys))))
        ]
        return found

    return Groups(
        ordered(~feasible, -score),
        ordered(spare, importance, -slack),
        ordered(feasible & ~spare, importance, -score),
        score,
    )


class ReliefPlanner:
    """Decides for one scheduler; keeps nothing between iterations."""

    def __init__(self, settings: ReliefSettings) -> None:
        self._settings = settings

    def for_growth(self, pool: Pool, model: LatencyModel, ready_s: float, trusted: bool) -> Relief:
        """Victims, if the decodes are about to run out of KV: those who stay can then grow for `RELIEF_ITERATIONS`.

        Protected ones come last, and leave rather than that SGLang chooses: somebody has to.
        """
        table, rows = pool.table, pool.decoding
        if self._settings.preempt == "stock" or len(rows) == 0:
            return Relief()
        if pool.least_free_tokens >= len(rows) * preemption.most_growth_tokens(table.step, table.page_tokens):
            return Relief()
        if pool.lasts(self._lead(pool, model)):
            return Relief()
        order = groups(pool, model, ready_s, self._settings.victims, trusted).all
        if len(order) < len(rows) - 1:
            stay = groups(pool, model, ready_s, self._settings.victims, trusted, protected=True).all
            order = np.concatenate((order, stay))
        order = order[: len(rows) - 1]
        growth = pool.growth_tokens(RELIEF_ITERATIONS)
        count = _fewest_for(growth, pool.leavers.freed_tokens, pool.free_tokens, order)
        window, freed = pool.window, pool.leavers.window_tokens
        if window is not None and freed is not None:
            there = _fewest_for(window.growth_tokens(growth), freed, window.free_tokens, order)
            count = max(count, there)
        leaving = np.sort(order[:count])
        short = not pool.without(leaving).all_can_decode() and pool.chunked >= 0
        return self.relief(pool, leaving, model, short)

    def _lead(self, pool: Pool, model: LatencyModel) -> int:
        """Iterations ahead to act: a swap needs some to hide its copy."""
        if not (pool.host.on and pool.host.hides) or self._settings.preempt not in ("auto", "swap"):
            return 1
        contexts = pool.table.context_tokens(pool.decoding)
        copy_s = preemption.swap_s(model, int(contexts.max())) / 2
        verified = pool.table.step.verified_tokens
        seconds = model.iteration_s(decode_shape(len(contexts), int(contexts.sum()), verified=verified))
        return preemption.lead_iterations(copy_s, seconds)

    def who_may_leave(self, pool: Pool, model: LatencyModel, ready_s: float, trusted: bool) -> Groups | None:
        """Those whom newcomers of this iteration may take the place of; None: nobody."""
        if "stock" in (self._settings.preempt, self._settings.kv) or len(pool.decoding) == 0:
            return None
        return groups(pool, model, ready_s, self._settings.victims, trusted)

    def for_newcomer(
        self,
        pool: Pool,
        row: int,
        model: LatencyModel,
        found: Groups,
        trusted: bool,
        entered: list[Need],
        need: Need,
        overdue: bool = False,
    ) -> Relief:
        """The fewest victims whose leaving lets `row` in; none if nobody's leaving does, or KV is not what it lacks.

        `found`: who may leave. `need`: what it asks of the ledger, behind what those who `entered` in this iteration were
        charged. Infeasible ones and those with slack leave as many as it takes, and of the others at most one of a score far
        above its own, or any number of less important ones. For an `overdue` one, that has waited for `--slo-lost-wait-s`, as
        many as it takes: to let it block the line until KV drains would cost every newcomer meanwhile.
        """
        free = np.concatenate((found.infeasible, found.with_slack))
        chosen = self._fewest(pool, entered, need, free)
        if chosen is None:
            orders = [found.all] if overdue else self._displacing(pool, row, found, trusted)
            for order in orders:
                chosen = self._fewest(pool, entered, need, order)
                if chosen is not None:
                    break
        return Relief() if chosen is None else self.relief(pool, np.sort(chosen), model, False)

    def _displacing(self, pool: Pool, row: int, found: Groups, trusted: bool) -> list[np.ndarray]:
        """Orders of victims with those among them who miss their promise by it: one large one, or the less important."""
        table = pool.table
        free = np.concatenate((found.infeasible, found.with_slack))
        orders = []
        importance = table.importance[pool.decoding[found.others]]
        by_area = self._settings.victims == "area" or (self._settings.victims == "auto" and trusted)
        own = float(scores(pool, np.array([row]), by_area)[0])
        equals = found.others[importance <= table.importance[row]]
        if len(equals):
            largest = equals[np.argmax(found.score[equals])]
            if found.score[largest] > DISPLACE_FACTOR * own:
                orders.append(np.concatenate(([largest], free)))
        lesser = found.others[importance < table.importance[row]]
        if len(lesser):
            orders.append(np.concatenate((free, lesser)))
        return orders

    @staticmethod
    def _fewest(pool: Pool, entered: list[Need], need: Need, order: np.ndarray) -> np.ndarray | None:
        """The first victims of `order` whose leaving lets the need in; None if not even all of them do. One stays."""
        order = order[: max(len(pool.decoding) - 1, 0)]
        copying = pool.leaving_tokens > 0
        pool = replace(pool, free_tokens=pool.free_tokens + pool.leaving_tokens, leaving_tokens=0)
        freed = np.cumsum(np.concatenate(([0], pool.leavers.freed_tokens[order])))

        def fits(count: int) -> bool:
            after = pool.without(order[:count])
            free = after.free_tokens - after.next_tokens
            if free < need.tokens + sum(other.tokens for other in entered):
                return False
            if after.window is not None and after.window.free_tokens - after.next_tokens < need.window:
                return False
            ledger = after.ledger()
            for other in entered:
                ledger.admits(other)
            overdraft = after.overdraft_tokens if need.overdraft else 0
            return ledger.admits(replace(need, overdraft=overdraft))

        if copying and fits(0):
            return None  # those who left for it are still being copied out
        counts = range(max(int(np.searchsorted(freed, need.tokens - pool.free_tokens)), 1), len(order) + 1)
        if not counts or not fits(len(order)):
            return None
        fewest = bisect.bisect_left(counts, True, key=fits)
        return order[: counts[fewest]]

    # -- in which mode

    def relief(self, pool: Pool, leaving: np.ndarray, model: LatencyModel, park_chunked: bool) -> Relief:
        """The victims at `leaving`, positions in order, each in its cheapest mode."""
        who, swapped = pool.leavers, 0
        room = _room_left(pool, leaving) if len(leaving) else 0
        victims = []
        for i in leaving.tolist():
            kv, shared = int(who.kv_tokens[i]), int(who.shared_tokens[i])
            may_swap = pool.host.on and who.may_swap[i] and swapped + kv <= pool.host.room_tokens
            costs = preemption.costs(
                model, kv, shared, int(who.cached_tokens[i]), room, kv if may_swap else 0
            ).among(bool(who.may_keep[i]), bool(may_swap), bool(who.may_recompute[i]))
            mode = preemption.preempt_mode(costs, self._settings.preempt)
            room -= kv - shared if mode is PreemptMode.KEEP else 0
            swapped += kv if mode is PreemptMode.SWAP else 0
            victims.append((int(pool.decoding[i]), mode))
        return Relief(victims, leaving, park_chunked)


def _fewest_for(growth: np.ndarray, freed: np.ndarray, free: int, order: np.ndarray) -> int:
    """How many of `order` have to leave a pool so that the rest can grow: what each would have taken is saved too."""
    return int(np.searchsorted(np.cumsum((freed + growth)[order]), int(growth.sum()) - free)) + 1


def _room_left(pool: Pool, leaving: np.ndarray) -> int:
    """KV that stays free or evictable at the forecast peak of those who stay, once all who wait are in, tokens.

    A victim comes back behind them: what they take by then is evicted from the tree.
    """
    after = pool.without(leaving)
    peak = getattr(after.ledger(), "peak", pool.capacity_tokens)
    return int(pool.capacity_tokens - peak - pool.table.held_tokens(pool.waiting).sum())
