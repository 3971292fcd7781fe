"""Calibrated bounds hold on what comes next, and come to hold again after a shift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core.calibration import BUCKETS, Calibration, bucket_of, conformal_offsets, hoeffding_pad
from sglang_slo.core.lengths import MEDIAN, QUANTILES

WATCHED = [MEDIAN, 5, 6, 7]  # 0.5, 0.8, 0.9, 0.95


def _stream(calibration: Calibration, logs: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Issue, then learn, one after the other; whether each length was within each issued level [n, Q]."""
    covered = np.zeros((len(logs), len(QUANTILES)), bool)
    for i, (log_length, point) in enumerate(zip(logs, guess, strict=True)):
        raw = np.full((1, len(QUANTILES)), point)
        issued = calibration.apply(raw)
        covered[i] = log_length <= issued[0]
        calibration.add(raw[0], float(log_length), issued[0])
    return covered


def test_a_point_guess_becomes_bounds_that_hold_at_every_level():
    rng = np.random.default_rng(0)
    guess = rng.normal(5, 1, 3000)
    covered = _stream(Calibration(), guess + rng.normal(0.2, 0.6, 3000), guess)
    assert np.abs(covered[500:].mean(axis=0) - QUANTILES).max() < 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coverage_is_back_within_500_requests_after_a_shift(seed):
    rng = np.random.default_rng(seed)
    guess = rng.normal(5, 0.4, 2000)
    error = np.concatenate([rng.normal(-0.5, 0.4, 1000), rng.normal(0.9, 0.7, 1000)])
    covered = _stream(Calibration(), guess + error, guess)
    after = covered[1250:1500].mean(axis=0)
    assert np.abs(after - QUANTILES)[WATCHED].max() < 0.05
    assert np.abs(covered[1500:].mean(axis=0) - QUANTILES)[WATCHED].max() < 0.03


def test_without_errors_nothing_is_padded():
    raw = np.sort(np.random.default_rng(0).uniform(1, 8, (5, 9)), axis=1)
    assert np.allclose(Calibration().apply(raw), raw)


@settings(deadline=None)
@given(st.lists(st.floats(-500, 500), min_size=1, max_size=60), st.floats(0, 0.999))
def test_hoeffding_padding_is_within_the_trimmed_range(errors, p):
    pad = float(hoeffding_pad(np.array(errors), p))
    assert 0 <= pad <= max(errors) - min(errors) + 1e-9


def test_hoeffding_is_vacuous_from_0865_on():
    errors = np.random.default_rng(0).normal(0, 100, 500)
    low, high = np.quantile(errors, [0.05, 0.95])
    assert float(hoeffding_pad(errors, 0.9)) == pytest.approx(high - low)
    assert float(hoeffding_pad(errors, 0.5)) < high - low


def test_hoeffding_wastes_tokens_where_conformal_does_not():
    rng = np.random.default_rng(0)
    guess = rng.normal(5, 0.5, 600)
    calibration = Calibration()
    calibration.seed(np.repeat(guess[:, None], 9, axis=1), guess + rng.normal(0, 0.4, 600))
    raw = np.full((1, 9), 5.0)
    assert calibration.apply(raw, "hoeffding")[0, 6] > calibration.apply(raw, "conformal")[0, 6]


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=9, max_size=9), st.floats(-3, 20))
def test_calibrated_quantiles_are_monotone_and_at_least_one_token(errors, point):
    calibration = Calibration()
    calibration.seed(np.repeat(np.linspace(0, 9, 9)[:, None], 9, axis=1), np.linspace(0, 9, 9) + errors)
    for bound in ("conformal", "hoeffding"):
        out = calibration.apply(np.full((1, 9), point), bound)
        assert (np.diff(out) >= 0).all() and (out >= 0).all()


def test_few_errors_take_the_largest_for_levels_they_cannot_tell():
    errors = np.repeat(np.arange(5.0)[:, None], 9, axis=1)
    assert conformal_offsets(errors)[-1] == 4.0
    assert conformal_offsets(errors)[MEDIAN] == 2.0


def test_a_bucket_with_few_errors_borrows_everybodys():
    calibration = Calibration()
    calibration.seed(np.full((100, 9), 2.0), np.full(100, 2.7))
    assert calibration.apply(np.full((1, 9), 8.0))[0, MEDIAN] == pytest.approx(8.7, abs=1e-3)


def test_buckets_are_octaves_and_take_any_number():
    rows = np.log(np.array([[1.0], [2.1], [4.1], [1e9]])) * np.ones((1, 9))
    assert bucket_of(rows).tolist() == [0, 1, 2, BUCKETS - 1]
    assert 0 <= bucket_of(np.full((1, 9), np.nan))[0] < BUCKETS


def test_memory_does_not_grow_with_what_was_learnt():
    calibration = Calibration(window=32)
    size = sum(v.nbytes for v in vars(calibration).values() if isinstance(v, np.ndarray))
    rng = np.random.default_rng(0)
    _stream(calibration, rng.normal(5, 1, 500), rng.normal(5, 1, 500))
    assert sum(v.nbytes for v in vars(calibration).values() if isinstance(v, np.ndarray)) == size


def test_an_unknown_bound_is_refused_by_name():
    with pytest.raises(ValueError, match="bound: need conformal or hoeffding"):
        Calibration().apply(np.zeros((1, 9)), "normal")
