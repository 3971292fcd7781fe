"""The model in force while serving: corrected when it is wrong, left alone when it is right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.shapes import H200, timed, traffic
from sglang_slo.core.latency import BatchShape, LatencyModel
from sglang_slo.runtime.latency import online_fit
from sglang_slo.runtime.latency.online_fit import OnlineFit

TRUTH = LatencyModel(H200, name="truth")


def launch(shape: BatchShape, seconds: float | None, idle_s: float = 0.0) -> Any:
    return SimpleNamespace(shape=shape, duration_s=seconds, idle_s=idle_s)


def serve(
    fitting: OnlineFit, n: int, truth: LatencyModel = TRUTH, sigma: float = 0.0, idle_s: float = 0.0
) -> list[LatencyModel]:
    """Run n iterations past it; the models that came into force."""
    models = []
    for shape, seconds in timed(traffic(n, seed=n), truth.coefficients, sigma):
        fitting.add(launch(shape, seconds, idle_s))
        model = fitting.maybe_refit()
        if model is not None:
            models.append(model)
    return models


def off(model: LatencyModel, truth: LatencyModel = TRUTH) -> float:
    """Mean relative error of predictions."""
    shapes = traffic(500, seed=3)
    return float(np.mean([abs(model.iteration_s(s) / truth.iteration_s(s) - 1) for s in shapes]))


def test_a_right_profile_is_never_replaced() -> None:
    fitting = OnlineFit(TRUTH)
    assert serve(fitting, 1000) == []
    assert fitting.model is TRUTH
    assert fitting.drift == pytest.approx(1.0)


def test_times_that_differ_by_rounding_alone_are_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    monkeypatch.setattr(online_fit, "fit", lambda *args, **how: fits.append(args) or TRUTH.coefficients)
    fitting = OnlineFit(TRUTH)
    for shape in traffic(2000, seed=4):
        fitting.add(launch(shape, TRUTH.iteration_s(shape) * (1 + 1e-12)))
        fitting.maybe_refit()
    # after 8, 16, ... 256 iterations, then after every 256
    assert len(fits) <= 6 + 2000 // 256


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_a_profile_25_percent_wrong_is_right_within_500_noisy_iterations(factor: float) -> None:
    fitting = OnlineFit(TRUTH.scaled(factor))
    models = serve(fitting, 500, sigma=0.15)
    assert off(models[-1]) < 0.04
    assert fitting.drift == pytest.approx(1 / factor, rel=0.05)


def test_the_margin_covers_the_noise() -> None:
    model = serve(OnlineFit(TRUTH), 2000, sigma=0.15)[-1]
    late = [
        s > model.safe_iteration_s(shape) for shape, s in timed(traffic(5000, seed=8), sigma=0.15, seed=5)
    ]
    assert np.mean(late) < 2 * (1 - online_fit.LEVEL) + 0.001


def test_a_device_that_slows_down_is_followed() -> None:
    fitting = OnlineFit(TRUTH)
    serve(fitting, 600, sigma=0.05)
    slow = TRUTH.scaled(1.4)
    serve(fitting, 1500, slow, sigma=0.05)
    assert off(fitting.model, slow) < 0.05


def test_an_idle_device_does_not_make_the_model_slow() -> None:
    fitting = OnlineFit(TRUTH)
    serve(fitting, 300)
    assert serve(fitting, 100, TRUTH.scaled(1.5), idle_s=1.0) == []


def test_without_overlap_every_iteration_counts() -> None:
    fitting = OnlineFit(TRUTH, overlap=False)
    assert serve(fitting, 300, TRUTH.scaled(1.5), idle_s=1e-4)


def test_iterations_without_a_duration_are_left_out() -> None:
    fitting = OnlineFit(TRUTH)
    for seconds in (None, 0.0, -1.0, float("nan"), float("inf"), 1e4):
        fitting.add(launch(traffic(1)[0], seconds))
    assert fitting.window.added == 0


def test_a_fit_that_fails_leaves_the_model_in_force_and_is_let_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every iteration says that the device is another one."""
    tries = [0]

    def broken(*args: Any) -> None:
        tries[0] += 1
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(online_fit, "fit", broken)
    fitting = OnlineFit(TRUTH.scaled(0.5))
    assert serve(fitting, 200) == []
    assert tries == [1] and fitting.model.coefficients == TRUTH.scaled(0.5).coefficients


def test_the_same_iterations_give_the_same_models() -> None:
    one, two = OnlineFit(TRUTH.scaled(1.25)), OnlineFit(TRUTH.scaled(1.25))
    assert serve(one, 400, sigma=0.15) == serve(two, 400, sigma=0.15)


def test_metrics_are_plain_numbers() -> None:
    fitting = OnlineFit(TRUTH.scaled(1.25))
    serve(fitting, 300, sigma=0.15)
    figures = fitting.metrics()
    assert {"c_tok", "margin_extend", "margin_decode", "drift", "samples", "refits"} <= figures.keys()
    assert all(isinstance(value, int | float) for value in figures.values())
    assert figures["refits"] >= 1
