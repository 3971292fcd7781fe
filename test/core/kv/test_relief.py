"""Whom to give up: the properties that hold for every set of running requests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core.kv.ledger import ForecastLedger, Need
from sglang_slo.core.kv.pool import HostKv, Leavers, Pool
from sglang_slo.core.kv.relief import DISPLACE_FACTOR, MIN_SLACK_S, Relief, ReliefPlanner, groups, scores
from sglang_slo.core.kv.returns import returns
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.table import RequestTable

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
GAP = Slo(5.0, 0.1)
PACE = Slo(5.0, 0.1, gap_rule=GapRule.PACE)

# (KV held, missed its promise, importance, may leave)
runners = st.lists(
    st.tuples(st.integers(1, 500), st.booleans(), st.integers(0, 2), st.booleans()), min_size=1, max_size=8
)


def _pool(
    held: list[int], free: int = 0, slo: Slo = GAP, allowed: list[bool] | None = None, **fields: object
) -> Pool:
    table = RequestTable(32)
    rows = [table.add(slo, 0.0, tokens, 1000) for tokens in held]
    for row in rows:
        table.last_token_s[row] = table.first_token_s[row] = 0.0
    kv = np.array(held, np.int64)
    yes, none = np.ones(len(held), bool), np.zeros(len(held), np.int64)
    may = yes if allowed is None else np.array(allowed)
    return Pool(
        table=table,
        decoding=np.array(rows, np.int64),
        capacity_tokens=sum(held) + free,
        free_tokens=free,
        look_up_leavers=lambda: Leavers(may, kv, kv, none, none, ~yes, ~yes, yes),
        **fields,  # type: ignore[arg-type]
    )


def _room_for(pool: Pool, row: int, need: Need) -> Relief:
    """Who leaves so that a newcomer gets in, in an iteration into which nobody else came."""
    planner = ReliefPlanner(SloConfig())
    found = planner.who_may_leave(pool, MODEL, 0.0, False)
    return Relief() if found is None else planner.for_newcomer(pool, row, MODEL, found, False, [], need)


def _mixed(rows: list[tuple[int, bool, int, bool]], free: int = 0) -> Pool:
    pool = _pool([r[0] for r in rows], free, allowed=[r[3] for r in rows])
    pool.table.lost[pool.decoding] = [r[1] for r in rows]
    pool.table.importance[pool.decoding] = [r[2] for r in rows]
    return pool


@settings(deadline=None)
@given(runners)
def test_the_order_is_infeasible_then_less_important_then_largest(
    rows: list[tuple[int, bool, int, bool]],
) -> None:
    found = groups(_mixed(rows), MODEL, 0.0, "kv", False)
    keys = [(not rows[i][1], rows[i][2] if not rows[i][1] else 0, -rows[i][0]) for i in found.all]
    assert keys == sorted(keys)
    assert sorted(found.all.tolist()) == [i for i, row in enumerate(rows) if row[3]]


@settings(deadline=None)
@given(runners, st.integers(0, 60))
def test_no_more_leave_than_the_growth_of_the_others_needs_and_one_stays(
    rows: list[tuple[int, bool, int, bool]], free: int
) -> None:
    pool = _mixed(rows, free)
    relief = ReliefPlanner(SloConfig()).for_growth(pool, MODEL, 0.0, False)
    assert len(relief.victims) < max(len(rows), 1)
    assert all(rows[i][3] for i in relief.positions.tolist())
    if len(relief.victims) > 1:
        order = list(groups(pool, MODEL, 0.0, "kv", False).all.tolist())[: len(relief.victims)]
        assert sorted(order) == relief.positions.tolist()
        fewer = sum(rows[i][0] + 32 for i in order[:-1])
        assert fewer < 32 * len(rows) - free


@settings(deadline=None)
@given(runners, st.lists(st.booleans(), min_size=8, max_size=8), st.integers(0, 60))
def test_those_left_alone_leave_last_and_only_where_the_others_do_not_suffice(
    rows: list[tuple[int, bool, int, bool]], alone: list[bool], free: int
) -> None:
    pool = _mixed(rows, free)
    stays = np.array(alone[: len(rows)])
    pool.table.stays_until_s[pool.decoding[stays]] = 10.0
    leaving = set(ReliefPlanner(SloConfig()).for_growth(pool, MODEL, 0.0, False).positions.tolist())
    others = {i for i, row in enumerate(rows) if row[3] and not stays[i]}
    if any(stays[i] for i in leaving):
        assert others <= leaving
        assert sum(rows[i][0] + 32 for i in others) < 32 * len(rows) - free
    elif len(rows) > 1 and free < 32 * len(rows) and any(row[3] for row in rows):
        assert leaving or free >= len(rows)  # somebody has to, or there is room for now
    protected = groups(pool, MODEL, 0.0, "kv", False, protected=True).all.tolist()
    assert sorted(protected) == [i for i, row in enumerate(rows) if row[3] and stays[i]]


@settings(deadline=None)
@given(runners, st.integers(1, 600), st.integers(0, 200))
def test_whoever_leaves_for_a_newcomer_lets_it_in(
    rows: list[tuple[int, bool, int, bool]], prompt: int, free: int
) -> None:
    pool = _mixed(rows, free)
    row = pool.table.add(GAP, 0.0, prompt, 10)
    need = pool.need(row, prompt)
    relief = _room_for(pool, row, need)
    if not relief:
        return
    after = pool.without(relief.positions)
    assert after.free_tokens >= prompt and after.ledger().admits(need)
    unmissed = [i for i in relief.positions.tolist() if not rows[i][1]]
    assert len(unmissed) <= 1
    assert all(rows[i][0] > DISPLACE_FACTOR * prompt for i in unmissed)


def test_a_more_important_newcomer_displaces_any_number_of_less_important_ones() -> None:
    pool = _pool([300, 300, 300, 300])
    row = pool.table.add(Slo(5.0, 0.1, importance=1), 0.0, 500, 10)
    need = pool.need(row, 500)
    relief = _room_for(pool, row, need)
    assert len(relief.victims) >= 2
    pool.table.importance[pool.decoding] = 1
    assert not _room_for(pool, row, need)


def test_slack_is_spent_only_by_those_whose_rule_has_any_and_not_to_the_last() -> None:
    pool = _pool([100, 100, 100], slo=PACE)
    pool.table.out_tokens[pool.decoding] = [2000, 10, 2000]  # due at 200 s, 1 s, 200 s
    pool.table.gap_rule[pool.decoding[2]] = GapRule.EVERY
    found = groups(pool, MODEL, 0.0, "kv", False)
    assert found.with_slack.tolist() == [0]
    assert groups(pool, MODEL, 200.0 - MIN_SLACK_S, "kv", False).with_slack.tolist() == []


def test_with_trusted_lengths_the_area_decides_and_without_the_kv_held() -> None:
    pool = _pool([100, 150])
    pool.table.log_quantiles[pool.decoding] = [[math.log(900)] * 9, [math.log(2)] * 9]
    assert groups(pool, MODEL, 0.0, "auto", False).others.tolist() == [1, 0]
    assert groups(pool, MODEL, 0.0, "auto", True).others.tolist() == [0, 1]
    assert groups(pool, MODEL, 0.0, "kv", True).others.tolist() == [1, 0]


@given(st.integers(1, 500), st.integers(1, 2000))
def test_the_area_of_a_known_length_is_the_sum_over_its_iterations(held: int, length: int) -> None:
    pool = _pool([held])
    pool.table.declared_tokens[pool.decoding] = 10_000
    pool.table.log_quantiles[pool.decoding] = math.log(length)
    area = sum(held + t + 0.5 for t in range(length))  # midpoints: the integral of held + t
    assert scores(pool, pool.decoding, True)[0] == pytest.approx(held * area, rel=1e-3, abs=held * 1.0)


def test_no_second_victim_leaves_while_the_first_ones_kv_is_copied_out() -> None:
    pool = _pool([600, 700], free=50, host=HostKv(on=True, hides=True, room_tokens=10_000))
    row = pool.table.add(GAP, 0.0, 300, 10)
    need = pool.need(row, 300)
    assert len(_room_for(pool, row, need).victims) == 1
    copying = replace(pool, leaving_tokens=400, capacity_tokens=pool.capacity_tokens + 400)
    assert not _room_for(copying, row, need)


def test_what_is_copied_beside_compute_is_not_free_yet() -> None:
    for hides, free in ((True, 100), (False, 400)):
        pool = _pool([300, 200], free=100, host=HostKv(on=True, hides=hides))
        after = pool.without(np.array([0]), np.array([True]))
        assert after.free_tokens == free and after.free_tokens + after.leaving_tokens == 400


def test_stock_preemption_gives_nobody_up() -> None:
    planner = ReliefPlanner(SloConfig(preempt="stock"))
    assert not planner.for_growth(_pool([100, 100]), MODEL, 0.0, False)


def _host(pool: Pool, tokens: list[int], deadlines: list[float]) -> Pool:
    rows = [pool.table.add(GAP, 0.0, n, 1000) for n in tokens]
    pool.table.deadline_s[rows] = deadlines
    return replace(pool, host=HostKv(np.array(rows), np.array(tokens), on=True))


def _returning(
    pool: Pool, free: int, nearest: float = math.inf, overdue: int = -1, blocked: bool = False
) -> list[int]:
    return returns(pool, pool.ledger(), free, 10, nearest, overdue, blocked, 0.0)


def test_the_nearest_deadline_that_can_be_kept_comes_back_first_then_by_arrival() -> None:
    pool = _host(_pool([10], free=3000, near=10, far=100), [100, 100, 100], [math.inf, 5.0, -1.0])
    host = pool.host.rows.tolist()
    assert _returning(pool, 3000) == [host[1], host[0], host[2]]


def test_one_on_the_host_does_not_overtake_a_nearer_deadline_that_was_refused() -> None:
    pool = _host(_pool([10], free=3000, near=10, far=100), [100], [5.0])
    assert _returning(pool, 3000, nearest=4.0) == []
    assert _returning(pool, 3000, nearest=6.0) == pool.host.rows.tolist()


def test_one_that_has_nothing_to_lose_waits_for_the_far_forecast() -> None:
    pool = _host(_pool([10], free=400, near=10, far=500), [100], [math.inf])
    assert isinstance(pool.ledger(), ForecastLedger)
    assert _returning(pool, 400) == []
    assert _returning(pool, 400, overdue=int(pool.host.rows[0])) == pool.host.rows.tolist()
    assert pool.ledger().admits(Need(101, 1000))


def test_nobody_comes_back_past_one_that_is_not_overtaken_any_more() -> None:
    pool = _host(_pool([10], free=3000, near=10, far=100), [100], [math.inf])
    assert _returning(pool, 3000, overdue=99, blocked=True) == []
