"""The fit of the latency model: finds the truth, bears noise and outliers, and knows what it cannot know."""

from __future__ import annotations

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.shapes import H200, timed, traffic
from sglang_slo.core.fit import fit, guesses, margins, predict_s, residual_quantile
from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel, decode_shape
from sglang_slo.core.samples import Samples

TEST = Samples.of(timed(traffic(1000, seed=9)))
MIXED_UP = Coefficients(*(np.array(astuple(H200)) * [1.25, 0.75, 1.25, 0.75, 1.25, 0.75, 1]).tolist())
PER_REQUEST = replace(H200, c_req=2e-4, c_kv=0.0)  # works request by request
SLOW, FAST = (LatencyModel(H200).scaled(f).coefficients for f in (1.25, 0.75))


def error(found: Coefficients) -> float:
    """Mean relative error of the predictions on traffic that was not fitted to."""
    return float(np.mean(np.abs(predict_s(found, TEST) / predict_s(H200, TEST) - 1)))


def test_arrays_are_predicted_as_one_by_one() -> None:
    shapes = traffic(50)
    alone = [LatencyModel(H200).iteration_s(shape) for shape in shapes]
    assert predict_s(H200, Samples.of(timed(shapes))) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("prior", [SLOW, FAST, MIXED_UP])
def test_exact_measurements_give_the_exact_model_from_a_wrong_profile(prior: Coefficients) -> None:
    assert error(fit(Samples.of(timed(traffic(512))), prior)) < 1e-3


@pytest.mark.parametrize("prior", [SLOW, FAST, MIXED_UP])
def test_noise_of_15_percent_leaves_errors_of_a_few(prior: Coefficients) -> None:
    assert error(fit(Samples.of(timed(traffic(512), sigma=0.15)), prior)) < 0.03


def test_a_device_that_works_request_by_request_is_learned_from_a_profile_that_knows_of_none() -> None:
    samples = Samples.of(timed(traffic(512), PER_REQUEST))
    found = fit(samples, H200)
    off = np.abs(predict_s(found, samples) / samples.seconds - 1)
    assert float(off.mean()) < 0.01
    assert found.c_req == pytest.approx(PER_REQUEST.c_req, rel=0.1)


def test_a_right_profile_stays_as_it_is() -> None:
    assert astuple(fit(Samples.of(timed(traffic(512))), H200)) == pytest.approx(astuple(H200), rel=1e-6)


def test_stalls_of_the_host_do_not_bend_the_model() -> None:
    measured = timed(traffic(512), sigma=0.02)
    stalled = [(shape, s * 20 if i % 20 == 0 else s) for i, (shape, s) in enumerate(measured)]
    assert error(fit(Samples.of(stalled), FAST)) < 0.025


def test_without_a_profile_the_model_is_found_from_the_samples_alone() -> None:
    samples = Samples.of(timed(traffic(200), sigma=0.02))
    guess = Coefficients(2e-3, 1e-3, 5e-5, 0.0, 2e-3, 1e-8)
    assert error(fit(samples, guess, prior_spread=3.0, starts=guesses(samples))) < 0.03


def test_what_no_sample_shows_stays_as_profiled() -> None:
    decodes = timed(traffic(300, decode_share=1.0), LatencyModel(H200).scaled(1.5).coefficients)
    found = fit(Samples.of(decodes), H200)
    unseen = (found.t0_extend, found.c_tok, found.c_attn)
    assert unseen == pytest.approx((H200.t0_extend, H200.c_tok, H200.c_attn), rel=1e-6)
    shape = decode_shape(40, 60_000)
    assert LatencyModel(found).iteration_s(shape) == pytest.approx(
        1.5 * LatencyModel(H200).iteration_s(shape), rel=0.01
    )


def test_no_samples_leave_the_prior() -> None:
    assert fit(Samples.of([]), H200) is H200


def test_a_sample_of_no_weight_changes_nothing() -> None:
    samples = Samples.of(timed(traffic(100)))
    odd = Samples.of([(BatchShape(True, 500, 0.0, 500), 3.0)])
    both = Samples(
        *(
            np.concatenate((getattr(samples, name), getattr(odd, name)))
            for name in Samples.__dataclass_fields__
        )
    )
    both = replace(both, weight=np.append(np.ones(100), 0.0))
    assert astuple(fit(both, SLOW)) == pytest.approx(astuple(fit(samples, SLOW)), rel=1e-3)


measured = st.lists(
    st.tuples(
        st.builds(
            BatchShape,
            extend=st.booleans(),
            new_tokens=st.integers(1, 20_000),
            pairs=st.floats(0, 1e9),
            context_tokens=st.integers(0, 10**6),
            requests=st.integers(1, 500),
        ),
        st.floats(1e-5, 60.0),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(measured)
def test_whatever_is_measured_coefficients_are_finite_and_not_negative(
    rows: list[tuple[BatchShape, float]],
) -> None:
    samples = Samples.of(rows)
    for found in (fit(samples, H200), fit(samples, H200, 3.0, guesses(samples))):
        assert all(math.isfinite(value) and value >= 0 for value in astuple(found))


@settings(deadline=None)
@given(measured)
def test_the_same_samples_give_the_same_model(rows: list[tuple[BatchShape, float]]) -> None:
    assert fit(Samples.of(rows), H200) == fit(Samples.of(rows), H200)


# -- the quantile of residuals


@given(st.lists(st.floats(1e-3, 1e3), max_size=200), st.floats(0.5, 0.9999))
def test_the_quantile_stays_within_its_bounds(ratios: list[float], level: float) -> None:
    assert 1.0 <= residual_quantile(np.array(ratios), level, most=2.0) <= 2.0


def test_the_margin_of_passes_with_prefill_is_not_thinned_by_decodes() -> None:
    """One iteration in five has prefill, and takes 15 % longer than predicted one time in ten: 2 % of all."""
    prefill, decode = BatchShape(True).with_chunk(0, 500), decode_shape(10, 10_000)
    rows = [(prefill if i % 5 == 0 else decode, 1.15 if i % 50 == 0 else 1.0) for i in range(1000)]
    assert margins(Samples.of(rows), np.ones(1000), 0.95) == (1.15, 1.0)


def test_decodes_alone_have_no_less_margin_than_all_together() -> None:
    prefill, decode = BatchShape(True).with_chunk(0, 500), decode_shape(10, 10_000)
    rows = [(prefill, 1.2)] * 50 + [(decode, 1.0)] * 50
    assert margins(Samples.of(rows), np.ones(100), 0.9) == (1.2, 1.2)


def test_a_kind_never_seen_has_the_margin_of_all() -> None:
    rows = [(decode_shape(10, 10_000), 1.1)] * 40
    assert margins(Samples.of(rows), np.ones(40), 0.9) == (1.1, 1.1)


def test_exact_predictions_need_no_margin() -> None:
    assert residual_quantile(np.ones(40), 0.999) == 1.0


@pytest.mark.parametrize("n", [32, 100_000])
def test_few_samples_or_many_the_quantile_covers_the_tail(n: int) -> None:
    """Of 32 samples none lies in the tail of 0.1 %: it is what their spread says."""
    true = math.exp(3.09 * 0.15)
    found = [
        residual_quantile(np.random.default_rng(seed).lognormal(0, 0.15, n), 0.999) for seed in range(15)
    ]
    assert float(np.median(found)) == pytest.approx(true, rel=0.06)


def test_rare_stalls_do_not_widen_the_margin_of_the_rest() -> None:
    ratios = np.where(np.arange(4000) % 200 == 0, 50.0, 1.0)
    assert residual_quantile(ratios, 0.99) == 1.0
