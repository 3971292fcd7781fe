"""Devices: what is measured is added up as it was measured, never falls, and stays unknown to the scheduler."""

from __future__ import annotations

import importlib.util
import itertools

import pytest

from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.twin.devices import DeviceError, DeviceSpec, Pass, ProfiledDevice, database
from sglang_slo.twin.devices.grid import Grid, Line, octaves
from sglang_slo.twin.devices.load import named
from sglang_slo.twin.devices.measured import HostTimes, measured
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import load_workload

measured_kernels = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None, reason="needs the extra `devices`"
)
LLAMA = "Llama-3.1-8B,h200_sxm"


def test_a_pass_says_what_is_in_it() -> None:
    load = Pass(((100, 10), (0, 4)), [7, 8, 9])
    assert (load.extend, load.new_tokens, load.requests, load.context_tokens) == (True, 17, 5, 138)
    assert load.shape.pairs == 10 * 105 + 4 * 2
    assert Pass((), [5, 6]).shape.extend is False


def test_a_profile_is_a_device_that_takes_what_it_says() -> None:
    profile = LatencyModel(Coefficients(0.01, 0.002, 1e-5, 1e-9, 0.003, 1e-8), kv_capacity_tokens=5000)
    load = Pass(((100, 10),), [7] * 3)
    assert ProfiledDevice(profile).iteration_s(load) == profile.iteration_s(load.shape)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("llama", "system"),
        ("llama,h200,tp=x", "tp"),
        ("llama,h200,tp=0", "tp"),
        ("llama,h200,tp", "tp"),
        ("llama,h200,colour=red", "colour"),
        ("llama,h200,tp=1,tp=2", "tp=2"),
    ],
)
def test_a_bad_spec_is_refused_by_field(text: str, field: str) -> None:
    with pytest.raises(DeviceError, match=field):
        DeviceSpec.parse(text)


def test_a_spec_survives_being_written() -> None:
    spec = DeviceSpec.parse("a/b,h100_sxm,tp=4,quant=fp8_block,kv=fp8")
    assert DeviceSpec.parse(str(spec)) == spec == DeviceSpec("a/b", "h100_sxm", 4, "fp8_block", "fp8")


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "PACKAGE", "no_such_package")
    with pytest.raises(DeviceError, match=r"sglang-slo\[devices\]"):
        database.Database(DeviceSpec.parse("some-model,h200_sxm"))


def test_a_line_and_a_grid_never_fall_though_their_source_does() -> None:
    line = Line(lambda n: 10.0 - n % 3)
    assert line.at(0) == 0
    assert all(line.at(n) <= line.at(n + 1) for n in range(50))
    grid = Grid(lambda x, y: x + y - 5 * (x % 2) - 5 * (y % 3), range(10), range(10))
    assert all(grid.at(x, y) <= grid.at(x + 0.5, y + 0.5) for x in range(8) for y in range(8))


def test_a_grid_is_exact_on_straight_lines_and_goes_on_beyond_its_end() -> None:
    grid = Grid(lambda x, y: 1 + 2 * x + 3 * y + x * y, octaves(1, 64, 2), octaves(1, 64, 2))
    for x, y in itertools.product((1, 3.7, 64, 100), (1, 9.2, 64, 200)):
        assert grid.at(x, y) == pytest.approx(1 + 2 * x + 3 * y + x * y)


@measured_kernels
def test_a_chunk_costs_more_behind_more_history_and_beside_more_decodes() -> None:
    device = measured(DeviceSpec.parse(LLAMA), HostTimes())  # kernels alone
    alone = device.iteration_s(Pass(((0, 512),)))
    behind = device.iteration_s(Pass(((8192, 512),)))
    crowded = device.iteration_s(Pass(((8192, 512),), [2048] * 64))
    assert alone == pytest.approx(0.0138, rel=0.05)  # the database's own sums, read by hand
    assert behind - alone == pytest.approx(0.0031, rel=0.05)
    assert crowded > behind + 0.004


@measured_kernels
def test_no_pass_is_shorter_for_more_work() -> None:
    device, _ = named(LLAMA)
    sizes = [device.iteration_s(Pass(((0, n),))) for n in range(1, 4000, 7)]
    decodes = [device.iteration_s(Pass((), [1000] * n)) for n in range(1, 300)]
    assert sizes == sorted(sizes) and decodes == sorted(decodes)


@measured_kernels
def test_the_kv_pool_is_what_the_weights_leave_of_the_share_for_both() -> None:
    device = measured(DeviceSpec.parse(LLAMA))
    small, large = device.kv_capacity(0.5), device.kv_capacity(0.9)
    assert (large - small) * 131072 == pytest.approx(0.4 * device.memory.total, rel=1e-4)
    assert small < device.kv_capacity_tokens
    with pytest.raises(DeviceError, match="mem-fraction-static"):
        device.kv_capacity(0.1)


@measured_kernels
@pytest.mark.parametrize(
    ("text", "field"),
    [("gpt-9,h200_sxm", "model"), ("Llama-3.1-8B,tpu", "system"), (LLAMA + ",quant=q", "quant")],
)
def test_what_the_database_lacks_is_said(text: str, field: str) -> None:
    with pytest.raises(DeviceError, match=field):
        named(text)


@measured_kernels
def test_the_scheduler_starts_from_a_fit_and_not_from_the_device() -> None:
    device, profile = named(LLAMA)
    mixed = Pass(((8192, 512),), [2048] * 64)
    assert 0 < abs(profile.iteration_s(mixed.shape) / device.iteration_s(mixed) - 1) < 0.5
    assert profile.kv_capacity_tokens == device.kv_capacity_tokens


@measured_kernels
def test_a_run_on_measured_kernels_takes_the_devices_times_and_repeats_to_the_byte() -> None:
    load = load_workload("mix-generated", max_requests=30, device=LLAMA)
    first, again = (driver.run(load, "slo") for _ in range(2))
    assert first.to_json(wall=False) == again.to_json(wall=False)
    assert "measured" in first.profile
    alone = (first.iterations.decodes == 1) & (first.iterations.prefills == 0)
    context = first.iterations.context_tokens[alone].tolist()
    assert first.iterations.duration_s[alone].tolist() == pytest.approx(
        [load.on.iteration_s(Pass((), [c])) for c in context]
    )
