"""The virtual engine: planning hides behind computing, results come after, the clock only goes forward."""

from __future__ import annotations

import pytest

from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.twin.devices import Pass, ProfiledDevice
from sglang_slo.twin.sim.engine import VirtualEngine

DEVICE = ProfiledDevice(
    LatencyModel(
        Coefficients(t0_extend=0.010, t0_decode=0.002, c_tok=1e-4, c_attn=0.0, w=0.0, c_kv=0.0),
        meta={"schedule_s": 0.001, "process_s": 0.0005},
    )
)
LONG = Pass(((0, 1000),))  # 0.110 s
SHORT = Pass((), [1] * 10)  # 0.003 s


def test_a_pass_launched_while_another_computes_begins_at_its_end() -> None:
    engine = VirtualEngine(DEVICE)
    first = engine.launch(LONG)
    second = engine.launch(SHORT)
    assert first == pytest.approx((0.001, 0.111))
    assert second == pytest.approx((0.111, 0.114))
    assert engine.now_s == pytest.approx(0.002)  # both launches hide behind the first pass


def test_a_result_is_out_when_its_pass_has_ended_and_been_processed() -> None:
    engine = VirtualEngine(DEVICE)
    _, end = engine.launch(LONG)
    engine.launch(SHORT)
    engine.take_result(end)
    assert engine.now_s == pytest.approx(0.1115)


def test_an_idle_device_waits_for_the_launch() -> None:
    engine = VirtualEngine(DEVICE)
    engine.wait_until(5.0)
    assert engine.launch(SHORT) == pytest.approx((5.001, 5.004))


def test_time_never_runs_backwards() -> None:
    engine = VirtualEngine(DEVICE)
    engine.wait_until(2.0)
    engine.wait_until(1.0)
    engine.take_result(0.5)
    assert engine.now_s == pytest.approx(2.0005)


def test_noise_is_seeded_and_keeps_the_mean() -> None:
    def durations(seed: int) -> list[float]:
        engine = VirtualEngine(DEVICE, noise_sigma=0.3, seed=seed)
        return [end - start for start, end in (engine.launch(SHORT) for _ in range(4000))]

    assert durations(1) == durations(1)
    assert durations(1) != durations(2)
    assert sum(durations(1)) / 4000 == pytest.approx(0.003, rel=0.02)


def test_a_pass_begins_only_when_what_it_needs_is_there() -> None:
    engine = VirtualEngine(DEVICE)
    engine.not_before(0.5)
    start, end = engine.launch(SHORT)
    assert start == pytest.approx(0.5)
    assert end - start == pytest.approx(0.003)
