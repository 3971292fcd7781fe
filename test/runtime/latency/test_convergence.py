"""From a wrong profile to gaps kept on measured kernels: how fast, and by what steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sglang_slo.twin
from sglang_slo.core.fit import predict_s
from sglang_slo.core.latency import LatencyModel, decode_shape
from sglang_slo.runtime.latency.online_fit import MOST_GROWTH, OnlineFit
from sglang_slo.twin.devices.device import Device, Pass
from sglang_slo.twin.devices.load import named

GAP_S = 0.05
CONTEXT_TOKENS = 2000
PROFILES = Path(sglang_slo.twin.__file__).parent / "data" / "profiles"


@pytest.fixture(scope="module")
def h200() -> tuple[Device, LatencyModel]:
    """A measured device, and the profile that the start-up procedure makes of it."""
    pytest.importorskip("aiconfigurator_core")
    return named("meta-llama/Meta-Llama-3.1-8B,h200_sxm")


def start_of(name: str, right: LatencyModel) -> LatencyModel:
    """The profile to start from: the right one times a factor, or another model's."""
    try:
        return right.scaled(float(name))
    except ValueError:
        return LatencyModel.load(PROFILES / f"{name}.json")


def serve(
    device: Device, fitting: OnlineFit, until_s: float, sigma: float, slower: tuple[float, float] = (0.0, 1.0)
) -> Iterator[tuple[float, float]]:
    """Iterations of a loaded server whose chunks are as large as the model in force allows: (end, seconds) of each.

    `slower`: from when on the device takes how many times as long.
    """
    rng, now_s, decodes = np.random.default_rng(5), 0.0, 40
    while now_s < until_s:
        decodes = int(np.clip(decodes + rng.integers(-2, 3), 8, 110))
        history = int(rng.choice([0, 0, 0, 4000, 12000]))
        prefill = now_s % 10 < 7
        shape, chunks = decode_shape(decodes, decodes * CONTEXT_TOKENS, prefill), []
        if prefill:
            allowed = fitting.model.largest_safe_chunk(shape, history, 0.95 * GAP_S)
            tokens = max(min(allowed, 8192, int(rng.lognormal(7, 1))), 16)
            chunks, shape = [(history, tokens)], shape.with_chunk(history, tokens)
        seconds = device.iteration_s(Pass(tuple(chunks), [CONTEXT_TOKENS] * decodes))
        seconds *= rng.lognormal(-(sigma**2) / 2, sigma) if sigma else 1.0
        seconds *= slower[1] if now_s > slower[0] else 1.0
        now_s += seconds
        launch: Any = SimpleNamespace(shape=shape, duration_s=seconds, idle_s=0.0)
        fitting.add(launch)
        yield now_s, seconds


STARTS = ("0.25", "0.5", "0.75", "1.0", "1.25", "4", "h200-llama3-70b-fp8", "a100-opt-13b", "h200-llama3-8b")


@pytest.mark.parametrize("sigma", [0.0, 0.15])
@pytest.mark.parametrize("start", STARTS)
def test_gaps_are_kept_soon_after_starting_from_a_wrong_profile(
    start: str, sigma: float, h200: tuple[Device, LatencyModel]
) -> None:
    device, right = h200
    fitting = OnlineFit(start_of(start, right))
    late = []
    for end_s, seconds in serve(device, fitting, 30, sigma):
        if end_s > 5:
            late.append(seconds > GAP_S)
        fitting.maybe_refit()
    assert np.mean(late) <= (0.005 if sigma else 0.0)


@pytest.mark.parametrize("sigma", [0.0, 0.15])
@pytest.mark.parametrize("factor", [1.3, 1.6, 2.0])
def test_a_device_that_slows_down_is_noticed_within_a_few_iterations(
    factor: float, sigma: float, h200: tuple[Device, LatencyModel]
) -> None:
    device, right = h200
    fitting, late = OnlineFit(right), []
    for end_s, seconds in serve(device, fitting, 30, sigma, slower=(15.0, factor)):
        if end_s > 15.0:
            late.append(seconds > GAP_S)
        fitting.maybe_refit()
    assert sum(late[:64]) <= 12
    assert np.mean(late[64:]) <= 0.01


@pytest.mark.parametrize("start", STARTS)
def test_no_refit_makes_a_budget_jump(start: str, h200: tuple[Device, LatencyModel]) -> None:
    device, right = h200
    fitting, refits = OnlineFit(start_of(start, right)), 0
    for _ in serve(device, fitting, 15, 0.0):
        before = fitting.model
        after = fitting.maybe_refit()
        if after is None:
            continue
        refits += 1
        samples = fitting.window.diverse()
        for kind, old, new in (
            (samples.extend, before.margin_extend, after.margin_extend),
            (~samples.extend, before.margin_decode, after.margin_decode),
        ):
            safe_before = old * predict_s(before.coefficients, samples)[kind]
            safe_after = new * predict_s(after.coefficients, samples)[kind]
            assert (safe_before <= safe_after * MOST_GROWTH * (1 + 1e-9)).all()
    assert refits > 0
