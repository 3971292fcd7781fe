"""The floor under a measured device: below it everywhere, and not far."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.core.latency import LatencyModel
from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.devices.floor import floor
from sglang_slo.twin.devices.load import named


@pytest.fixture(scope="module", params=["", ",quant=fp8_block"])
def ratios(request: pytest.FixtureRequest) -> np.ndarray:
    """Floor over device of passes at random, none of them on the grid but by chance."""
    pytest.importorskip("aiconfigurator_core")
    device, _ = named("meta-llama/Meta-Llama-3.1-8B,h200_sxm" + request.param)
    model, rng, out = LatencyModel(floor(device)), np.random.default_rng(0), []
    while len(out) < 3000:
        decodes, context = int(rng.integers(0, 300)), int(rng.integers(16, 12_000))
        chunk = int(min(rng.lognormal(6, 1.5) + 1, 16_384)) if rng.random() < 0.6 or not decodes else 0
        load = Pass(((int(rng.integers(0, 30_000)), chunk),) if chunk else (), (context,) * decodes)
        if load.context_tokens <= device.kv_capacity_tokens:
            out.append(model.iteration_s(load.shape) / device.iteration_s(load))
    return np.array(out)


def test_no_pass_is_faster_than_the_floor(ratios: np.ndarray) -> None:
    assert ratios.max() <= 1


def test_the_floor_is_near(ratios: np.ndarray) -> None:
    assert ratios.mean() > 0.8


def test_a_formula_is_its_own_floor() -> None:
    device, profile = named("a100-opt-13b")
    assert floor(device) == profile.coefficients
