"""Bounds and remaining lengths hold what they say, whatever the quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core.lengths import (
    MEDIAN,
    QUANTILES,
    bound_total_tokens,
    confidence_from_load,
    declared_only,
    expected_remaining_tokens,
    remaining_tokens,
)

quantile_rows = st.lists(st.floats(-3, 14), min_size=9, max_size=9)
LOG_NORMAL_Z = np.array([-1.64485, -0.84162, -0.38532, 0.0, 0.38532, 0.84162, 1.28155, 1.64485, 2.32635])


def _log_normal(mu: float, sigma: float, n: int = 1) -> np.ndarray:
    return np.tile(mu + sigma * LOG_NORMAL_Z, (n, 1))


@settings(deadline=None)
@given(quantile_rows, st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 0.999))
def test_remaining_is_at_least_one_and_never_passes_the_declared_maximum(
    row, generated, declared, confidence
):
    r = remaining_tokens(np.array([row]), np.array([generated]), np.array([declared]), confidence)
    assert r.dtype == np.int64
    assert 1 <= r[0] <= max(1, declared - generated)


@settings(deadline=None)
@given(quantile_rows, st.integers(0, 10**5), st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_confidence_never_means_fewer_tokens(row, generated, p1, p2):
    args = np.array([sorted(row)]), np.array([generated]), np.array([10**7])
    low, high = sorted((p1, p2))
    assert remaining_tokens(*args, low)[0] <= remaining_tokens(*args, high)[0]


@pytest.mark.parametrize("column", range(len(QUANTILES)))
def test_bound_at_a_grid_level_is_the_quantile_itself(column):
    logs = _log_normal(5.0, 0.7)
    bound = bound_total_tokens(logs, float(QUANTILES[column]), np.array([10**6]))
    assert bound[0] == np.ceil(np.exp(logs[0, column]) - 1e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("generated", [0, 40, 150, 400])
def test_survivors_pass_the_remaining_bound_as_rarely_as_stated(confidence, generated):
    lengths = np.exp(np.random.default_rng(0).normal(5.0, 0.8, 200_000))
    alive = lengths[lengths > generated]
    r = remaining_tokens(_log_normal(5.0, 0.8), np.array([generated]), np.array([10**6]), confidence)[0]
    assert abs((alive > generated + r).mean() - (1 - confidence)) < 0.02


def test_a_request_that_outlives_every_quantile_still_has_a_finite_tail():
    r = remaining_tokens(_log_normal(4.0, 0.3), np.array([5000]), np.array([10**6]), 0.9)[0]
    assert 100 < r < 10_000


def test_without_knowledge_the_client_is_taken_at_its_word():
    declared = np.array([1, 17, 8192])
    logs = declared_only(declared)
    for p in (0.5, 0.9, 0.99):
        assert (bound_total_tokens(logs, p, declared) == declared).all()


@settings(deadline=None)
@given(quantile_rows, st.integers(0, 10**5), st.integers(1, 10**5))
def test_expected_remaining_lies_between_one_and_what_is_allowed(row, generated, declared):
    e = expected_remaining_tokens(np.array([row]), np.array([generated]), np.array([declared]))[0]
    assert 1 <= e <= max(1, declared - generated) + 1e-6


def test_expected_remaining_orders_requests_by_how_much_is_left():
    logs = np.concatenate([_log_normal(m, 0.5) for m in (3.0, 5.0, 7.0)])
    e = expected_remaining_tokens(logs, np.array([10, 10, 10]), np.full(3, 8192))
    assert e[0] < e[1] < e[2]


@settings(deadline=None)
@given(st.floats(0, 100), st.floats(0, 100))
def test_confidence_falls_with_load_between_its_ends(a, b):
    low, high = sorted((a, b))
    p = [confidence_from_load(x, 0.6, 0.9) for x in (low, high)]
    assert 0.6 <= p[1] <= p[0] <= 0.9


def test_confidence_meets_both_ends_and_forgives_no_measurement():
    assert confidence_from_load(0.0, 0.6, 0.9) == 0.9
    assert confidence_from_load(1.0, 0.6, 0.9) == pytest.approx(0.6)
    assert confidence_from_load(float("nan"), 0.6, 0.9) == 0.9
    assert confidence_from_load(3.0, 0.6, 0.9) == 0.6


def test_a_confidence_of_one_is_refused_by_name():
    with pytest.raises(ValueError, match=r"confidence: need a number in \[0, 1\)"):
        remaining_tokens(_log_normal(5, 1), np.array([0]), np.array([10]), 1.0)


def test_rows_do_not_depend_on_their_neighbours():
    rng = np.random.default_rng(1)
    logs, g, d = (
        np.sort(rng.normal(5, 1, (40, 9)), axis=1),
        rng.integers(0, 900, 40),
        rng.integers(1, 4000, 40),
    )
    together = remaining_tokens(logs, g, d, 0.9)
    alone = [remaining_tokens(logs[i : i + 1], g[i : i + 1], d[i : i + 1], 0.9)[0] for i in range(40)]
    assert together.tolist() == alone
    assert int(np.flatnonzero(QUANTILES == 0.5)[0]) == MEDIAN
