"""Who is given up where those who have begun are owed more KV than there is: for every set of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core.kv.owed import HORIZON_S, OWED_SHARE, given_up, line_s
from sglang_slo.core.kv.pool import HostKv, Leavers, Pool
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.latency import Coefficients, LatencyModel, decode_shape
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
GAP, PACE = Slo(5.0, 0.1), Slo(5.0, 0.1, gap_rule=GapRule.PACE)
MEAN, END = Slo(5.0, tpot_s=0.1), Slo(e2e_s=500.0)
NOW = 100.0

# (KV held, seconds of slack, rule, importance, where it is)
begun = st.lists(
    st.tuples(
        st.integers(10, 5000),
        st.floats(-5.0, 120.0),
        st.sampled_from([GAP, PACE, MEAN, END]),
        st.integers(0, 1),
        st.sampled_from(["device", "queue", "host"]),
    ),
    min_size=1,
    max_size=12,
)


def _world(rows: list[tuple[int, float, Slo, int, str]], capacity: int) -> tuple[Pool, np.ndarray]:
    """A pool that all of them have begun in, and who waits."""
    table = RequestTable(32)
    places: dict[str, list[int]] = {"device": [], "queue": [], "host": []}
    for held, slack, slo, importance, place in rows:
        row = table.add(replace(slo, importance=importance), 0.0, held, 1000)
        table.output_tokens[row] = table.out_tokens[row] = 1
        table.last_token_s[row] = table.token_s[row] = table.first_token_s[row] = NOW + slack - 0.1
        table.deadline_s[row] = NOW + slack
        places[place].append(row)
    device = np.array(places["device"], np.int64)
    host = np.array(places["host"], np.int64)
    held = table.held_tokens(device)
    yes, none = np.ones(len(device), bool), np.zeros(len(device), np.int64)
    pool = Pool(
        table=table,
        decoding=device,
        capacity_tokens=capacity,
        free_tokens=max(capacity - int(held.sum()), 0),
        look_up_leavers=lambda: Leavers(yes, held, held, none, none, ~yes, yes, yes),
        host=HostKv(host, table.held_tokens(host), 10**6, False, True),
    )
    return pool, np.array(places["queue"], np.int64)


def _owed(pool: Pool, rows: np.ndarray) -> float:
    """Token-seconds within the horizon, by the definition."""
    table, total = pool.table, 0.0
    iteration_s = MODEL.iteration_s(decode_shape(max(len(pool.decoding), 1), pool.capacity_tokens))
    for row in rows.tolist():
        one = np.array([row])
        line = float(line_s(table, one)[0])
        due = table.due_s(one)[0] if row in pool.decoding else table.deadline_s[row]
        seconds = min(max(NOW + HORIZON_S - due, 0.0), HORIZON_S)
        total += float(table.held_tokens(one)[0]) * min(seconds / line * iteration_s, HORIZON_S)
    return total


@settings(deadline=None)
@given(begun, st.integers(100, 20_000))
def test_what_the_others_are_owed_fits_and_no_one_is_given_up_for_nothing(
    rows: list[tuple[int, float, Slo, int, str]], capacity: int
) -> None:
    pool, waiting = _world(rows, capacity)
    table = pool.table
    gone = given_up(pool, waiting, MODEL, NOW)
    everyone = np.concatenate((pool.decoding, waiting, pool.host.rows))
    away = ~np.isin(everyone, pool.decoding)
    counts = np.isfinite(line_s(table, everyone)) & ~(away & (table.deadline_s[everyone] < NOW))
    counted = everyone[counts]
    assert set(gone.tolist()) <= set(counted.tolist())
    most = OWED_SHARE * capacity * HORIZON_S
    left = counted[~np.isin(counted, gone)]
    assert _owed(pool, left) <= most * (1 + 1e-9)
    if len(gone):  # without the last of them it would have been too much
        assert _owed(pool, np.append(left, gone[-1])) > most * (1 - 1e-9)
    keys = [(table.importance[row], -table.held_tokens(np.array([row]))[0]) for row in gone.tolist()]
    assert keys == sorted(keys)
    kept = [(table.importance[row], -table.held_tokens(np.array([row]))[0]) for row in left.tolist()]
    assert not keys or not kept or max(keys) <= min(kept)


def test_one_with_slack_beyond_the_horizon_is_owed_nothing_and_one_held_to_every_gap_never_counts() -> None:
    pool, waiting = _world([(5000, HORIZON_S + 1, PACE, 0, "host"), (5000, 0.0, GAP, 0, "device")], 100)
    assert not len(given_up(pool, waiting, MODEL, NOW))


def _view(pool: Pool, waiting: np.ndarray) -> View:
    return View(pool.table, waiting, True, NOW, MODEL, replace(pool, waiting=waiting), 100, 8192, 5.0)


def test_who_is_given_up_leaves_first_however_many_it_takes() -> None:
    fast = Slo(5.0, 0.01, gap_rule=GapRule.PACE)
    many = [(2000, 1.0, fast, 0, "device")] * 4 + [(500, 40.0, PACE, 0, "device")]
    pool, nobody = _world(many, 8600)
    given_up_now = set(given_up(pool, nobody, MODEL, NOW).tolist())
    assert len(given_up_now) == 2 and given_up_now < set(pool.decoding[:4].tolist())
    newcomer = pool.table.add(Slo(2.0, 0.1), NOW - 1.5, 3000, 100)
    plan = Planner(SloConfig(preempt="recompute")).plan(_view(pool, np.array([newcomer])))
    # of those that would miss their promise by it, a newcomer displaces one at most
    assert {row for row, _ in plan.victims} == given_up_now
    assert [row for row, _ in plan.prefill] == [newcomer]


def test_room_is_made_for_one_on_the_host_that_would_be_late_otherwise() -> None:
    # one that decodes has slack to spend, one on the host has nearly spent its own; nobody waits in the queue
    pool, nobody = _world(
        [(900, 55.0, PACE, 0, "device"), (100, 50.0, PACE, 0, "device"), (500, 1.0, PACE, 0, "host")], 1010
    )
    plan = Planner(SloConfig()).plan(_view(pool, nobody))
    assert plan.victims == [(int(pool.decoding[0]), PreemptMode.SWAP)]
    assert plan.returns == pool.host.rows.tolist()
    pool.table.deadline_s[pool.host.rows] = NOW + 20.0  # there is time yet
    assert Planner(SloConfig()).plan(_view(pool, nobody)).victims == []
