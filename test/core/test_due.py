"""When a request's next delivery is due, by its own rule, against the plain definition."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.table import CATCH_UP_SHARE, RequestTable

times = st.lists(st.floats(0.001, 2.0), min_size=1, max_size=20)  # gaps from the first token on
limits = st.floats(0.01, 1.0)


def _decoding(slo: Slo, gaps_s: list[float], inflight: int = 0) -> tuple[RequestTable, np.ndarray]:
    """One request that came at 0, whose first token was out at 1 s and the others after these gaps."""
    table = RequestTable(4)
    row = table.add(slo, 0.0, 10, 1000)
    table.first_token_s[row] = 1.0
    table.out_tokens[row], table.inflight_tokens[row] = len(gaps_s) + 1 - inflight, inflight
    table.last_token_s[row] = table.token_s[row] = 1.0 + sum(gaps_s)
    table.output_tokens[row] = len(gaps_s) + 1
    return table, np.array([row])


@given(times, limits)
def test_a_gap_is_due_one_limit_after_the_last_token(gaps_s: list[float], limit: float) -> None:
    for rule in (GapRule.EVERY, GapRule.P99):
        table, rows = _decoding(Slo(tbt_s=limit, gap_rule=rule), gaps_s)
        assert table.due_s(rows)[0] == table.last_token_s[rows[0]] + limit


@given(times, limits, st.integers(0, 1))
def test_a_reader_at_that_pace_never_waits(gaps_s: list[float], limit: float, inflight: int) -> None:
    table, rows = _decoding(Slo(tbt_s=limit, gap_rule=GapRule.PACE), gaps_s, inflight)
    next_token = len(gaps_s) + 1  # the first is token 0
    assert math.isclose(table.due_s(rows)[0], 1.0 + next_token * limit)


@given(times, limits)
def test_who_keeps_the_mean_all_along_ends_within_it(gaps_s: list[float], limit: float) -> None:
    table, rows = _decoding(Slo(tpot_s=limit), gaps_s)
    due = float(table.due_s(rows)[0])
    if sum(gaps_s) > (len(gaps_s) + 1) * limit:  # behind: it catches up
        assert math.isclose(due, float(table.last_token_s[rows[0]]) + CATCH_UP_SHARE * limit)
        return
    mean = (due - 1.0) / (len(gaps_s) + 1)  # if it ended with this token, then
    assert math.isclose(mean, limit)


@given(times, st.floats(50.0, 100.0), st.floats(1.0, 500.0))
def test_what_is_left_until_the_end_is_spread_over_what_is_expected(
    gaps_s: list[float], limit: float, expected: float
) -> None:
    table, rows = _decoding(Slo(e2e_s=limit), gaps_s)
    table.expected_tokens[rows] = expected
    last = float(table.last_token_s[rows[0]])
    assert math.isclose(float(table.due_s(rows)[0]), last + (limit - last) / expected)


@given(times, limits, limits, st.floats(0.0, 0.5))
def test_of_several_limits_the_nearest_counts_and_a_margin_only_brings_it_nearer(
    gaps_s: list[float], tbt: float, tpot: float, margin: float
) -> None:
    each = [_decoding(slo, gaps_s) for slo in (Slo(tbt_s=tbt), Slo(tpot_s=tpot))]
    table, rows = _decoding(Slo(tbt_s=tbt, tpot_s=tpot), gaps_s)
    assert table.due_s(rows)[0] == min(t.due_s(r)[0] for t, r in each)
    assert table.due_s(rows, margin)[0] <= table.due_s(rows)[0]


@given(times, limits, st.floats(0.0, 0.9), st.booleans())
def test_a_pace_leaves_its_margin_of_all_tokens_so_far_but_one_tokens_time_at_most(
    gaps_s: list[float], limit: float, margin: float, mean: bool
) -> None:
    assume(sum(gaps_s) < (len(gaps_s) + 1) * limit * (1 - 1e-9))
    slo = Slo(tpot_s=limit) if mean else Slo(tbt_s=limit, gap_rule=GapRule.PACE)
    table, rows = _decoding(slo, gaps_s)
    left_s = float(table.due_s(rows)[0] - table.due_s(rows, margin)[0])
    assert math.isclose(left_s, limit * min(margin * (len(gaps_s) + 1), 1.0), abs_tol=1e-9)


@given(times, limits, st.floats(0.0, 0.5))
def test_who_has_lost_its_line_is_not_due_at_once_for_ever(
    gaps_s: list[float], limit: float, margin: float
) -> None:
    paced, rows = _decoding(Slo(tbt_s=limit, gap_rule=GapRule.PACE), gaps_s)
    paced.lost[rows] = True
    gap, same = _decoding(Slo(tbt_s=limit), gaps_s)
    assert paced.due_s(rows, margin) == gap.due_s(same, margin)
    ending, rows = _decoding(Slo(e2e_s=0.5), gaps_s)  # it was over before the first token
    assert ending.due_s(rows, margin)[0] == math.inf


def test_without_a_limit_nothing_is_ever_due() -> None:
    table, rows = _decoding(Slo(), [0.1])
    assert table.due_s(rows)[0] == math.inf
    assert table.back_by_s(int(rows[0])) == math.inf


def test_without_a_limit_nothing_is_due_though_no_token_is_known_of() -> None:
    table = RequestTable(4)
    rows = np.array([table.add(Slo(), 0.0, 10, 1000), table.add(Slo(tbt_s=0.1), 0.0, 10, 1000)])
    with np.errstate(all="raise"):
        assert table.due_s(rows, 0.1).tolist() == [math.inf, -math.inf]


def test_a_mean_beside_one_that_has_no_token_yet_is_still_due() -> None:
    table, rows = _decoding(Slo(tpot_s=0.1), [0.05])
    fresh = table.add(Slo(), 0.0, 10, 1000)
    table.goes_on(fresh, 1.0)  # stock scheduling began it: no token of it was seen
    with np.errstate(all="raise"):
        assert table.due_s(np.array([rows[0], fresh]), 0.1)[1] == math.inf


def test_who_has_missed_its_promise_need_not_hurry_back() -> None:
    table, rows = _decoding(Slo(tbt_s=0.1), [0.05])
    assert math.isclose(table.back_by_s(int(rows[0])), 1.15)
    table.lost[rows] = True
    assert table.back_by_s(int(rows[0])) == math.inf


def test_the_percentile_rule_permits_a_pause_only_with_a_gap_to_spare_and_no_longer_than_it_says() -> None:
    slo = Slo(tbt_s=0.1, gap_rule=GapRule.P99, max_pause_s=2.0)
    table, rows = _decoding(slo, [0.05])
    table.gaps[rows], table.missed_gaps[rows] = 150, 1
    assert math.isclose(table.back_by_s(int(rows[0])), 1.15)
    table.missed_gaps[rows] = 0
    assert math.isclose(table.back_by_s(int(rows[0])), 1.05 + 2.0)
