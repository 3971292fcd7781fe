"""Where a server's first latency model comes from, and that measuring it leaves no trace in the pools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.shapes import H200, timed, traffic
from sglang_slo import profile as command
from sglang_slo.config import SloConfig
from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.runtime.latency import startup_profile as profile
from sglang_slo.runtime.latency.measure import Case, cases

KEY = {"version": 1, "model": "some/model x"}
MEASURED = LatencyModel(H200, name="m", measured=True, meta={"key": KEY, "fit": {"median_error": 0.01}})


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler of one rank that would measure MEASURED; `measured` counts how often it did."""
    monkeypatch.setenv("SGLANG_SLO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(command.MEASURE_ENV, raising=False)
    built = SimpleNamespace(
        slo_config=SloConfig(),
        slo_ranks=SimpleNamespace(tp_size=1, tp_rank=0),
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        measured=0,
    )

    def measure(*args: Any) -> LatencyModel:
        built.measured += 1
        return MEASURED

    monkeypatch.setattr(profile, "key", lambda scheduler: KEY)
    monkeypatch.setattr(profile, "measure", measure)
    return built


def test_a_given_profile_is_used_and_nothing_measured(scheduler: Any, tmp_path: Path) -> None:
    MEASURED.save(tmp_path / "given.json")
    scheduler.slo_config = SloConfig(profile=str(tmp_path / "given.json"))
    assert profile.startup_model(scheduler) == MEASURED
    assert scheduler.measured == 0


def test_a_given_profile_that_is_unusable_is_an_error(scheduler: Any, tmp_path: Path) -> None:
    scheduler.slo_config = SloConfig(profile=str(tmp_path / "none.json"))
    with pytest.raises(ProfileError, match=r"none\.json"):
        profile.startup_model(scheduler)


def test_the_same_set_up_is_measured_once(scheduler: Any) -> None:
    assert profile.startup_model(scheduler) == profile.startup_model(scheduler) == MEASURED
    assert scheduler.measured == 1


def test_another_set_up_is_measured_for_itself(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.startup_model(scheduler)
    monkeypatch.setattr(profile, "key", lambda scheduler: {**KEY, "tp": 2})
    profile.startup_model(scheduler)
    assert scheduler.measured == 2


def test_a_broken_stored_profile_is_measured_anew(scheduler: Any) -> None:
    profile.startup_model(scheduler)
    profile.path_of(KEY).write_text("{")
    assert profile.startup_model(scheduler) == MEASURED
    assert scheduler.measured == 2
    assert LatencyModel.load(profile.path_of(KEY)) == MEASURED


def test_a_profile_that_fits_badly_serves_but_is_not_kept(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rough = LatencyModel(H200, meta={"key": KEY, "fit": {"median_error": 0.6}})
    monkeypatch.setattr(profile, "measure", lambda *args: rough)
    assert profile.startup_model(scheduler) == rough
    assert not profile.path_of(KEY).exists()


def test_serving_starts_on_a_guess_if_measuring_fails(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(profile, "measure", broken)
    assert profile.startup_model(scheduler) is profile.GUESS
    assert not profile.path_of(KEY).exists()


def test_a_machine_too_busy_to_measure_on_is_told_in_one_line(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profile, "measure", lambda *_: profile.model_of(timed(traffic(3)), KEY))
    assert profile.startup_model(scheduler) is profile.GUESS
    assert "too few" in caplog.text and "Traceback" not in caplog.text


def test_a_cache_that_cannot_be_written_does_not_stop_the_server(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGLANG_SLO_CACHE_DIR", str(tmp_path / "file"))
    assert profile.startup_model(scheduler) == MEASURED


def test_asked_to_measure_the_stored_profile_is_neither_used_nor_replaced(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.startup_model(scheduler)
    before = profile.path_of(KEY).stat().st_mtime_ns
    asked = {"out": str(tmp_path / "out.json"), "seconds": 9}
    monkeypatch.setenv(command.MEASURE_ENV, json.dumps(asked))
    profile.startup_model(scheduler)
    assert scheduler.measured == 2
    assert LatencyModel.load(tmp_path / "out.json") == MEASURED
    assert profile.path_of(KEY).stat().st_mtime_ns == before


def test_the_fit_tells_its_errors() -> None:
    model = profile.model_of(timed(traffic(60), sigma=0.05), KEY)
    assert model.measured and model.meta["key"] == KEY
    assert 0 < model.meta["fit"]["median_error"] < 0.1 < 1.0 < model.margin_extend + 1e-9 < 1.5


def test_too_few_cases_make_no_model() -> None:
    with pytest.raises(ValueError, match="too few"):
        profile.model_of(timed(traffic(3)), KEY)


# -- the cases


@pytest.mark.parametrize(
    ("kv", "slots", "chunk", "context"),
    [(400_000, 2048, 8192, 131_072), (30_000, 64, 2048, 16_384), (2000, 4, 256, 1024), (100, 1, 16, 64)],
)
def test_cases_fit_into_the_server(kv: int, slots: int, chunk: int, context: int) -> None:
    for case in cases(kv, slots, chunk, context):
        assert case.kv_tokens <= kv
        assert case.decodes + len(case.chunks) <= slots
        assert case.longest < context
        assert all(new <= chunk for _, new in case.chunks)


def test_cases_tell_all_coefficients_apart() -> None:
    truth = LatencyModel(H200)
    all_cases = cases(400_000, 2048, 8192, 131_072)
    model = profile.model_of([(c.shape, truth.iteration_s(c.shape)) for c in all_cases], KEY)
    for shape in traffic(300):
        assert model.iteration_s(shape) == pytest.approx(truth.iteration_s(shape), rel=0.02)


def test_a_case_is_the_shape_that_its_requests_have() -> None:
    shape = Case(((100, 20), (0, 10)), decodes=4, context=50).shape
    assert (shape.extend, shape.new_tokens, shape.context_tokens) == (True, 34, 330)
    assert shape.pairs == 20 * 110 + 10 * 5


# -- the command


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--out"),
        (["--out", "/nowhere/at/all/p.json"], "--out"),
        (["--out", "p.json", "--seconds", "0"], "--seconds"),
        (["--out", "p.json", "--url", "localhost:1"], "--url"),
        (["--out", "p.json", "--url", "http://x", "--tp", "2"], "--url"),
        (["--out", "p.json", "--slo-profile", "q.json"], "--slo-profile"),
    ],
)
def test_a_bad_flag_is_named(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(argv)
    assert named in capsys.readouterr().err


def test_a_running_server_tells_its_model() -> None:
    latency = asdict(H200)
    latency |= {"margin_extend": 1.2, "margin_decode": 1.1, "drift": 1.1, "samples": 300, "refits": 4}
    status = {"replicas": [{"now": {"latency": latency, "kv": {"capacity": 5000}}}]}
    model = command.from_status(status, "http://x")
    assert (model.coefficients, model.kv_capacity_tokens) == (H200, 5000)
    assert (model.margin_extend, model.margin_decode) == (1.2, 1.1)


@pytest.mark.parametrize("status", [{}, {"replicas": []}, {"replicas": [{"now": {}}]}, []])
def test_a_server_without_a_model_is_told(status: Any) -> None:
    with pytest.raises(ProfileError, match="http://x"):
        command.from_status(status, "http://x")


def test_no_server_is_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "p.json"), "--url", "http://127.0.0.1:9"]) == 1
    assert "error" in capsys.readouterr().err


# -- on a real scheduler

BUILD = """
import json
from sglang_slo import launch_server
from sglang_slo.config import SloConfig
SloConfig().to_env()
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang_slo.runtime.sglang import process
args = prepare_server_args(launch_server.with_defaults(["--log-level", "error", "--random-seed", "1"]))
process.publish(args)
from sglang_slo.runtime.latency import measure as bench, startup_profile as profile
from sglang_slo.runtime.scheduler.scheduler import SloScheduler
profile.MEASURE_S = 1e4  # the number of cases bounds it, however slow the machine is
few = [c for c in bench.cases(8000, 32, 256, 4096) if c.shape.new_tokens <= 64]
bench.Bench.cases = lambda self: few
before = {}
measure = profile.measure
def state(s):
    pool, slots = s.token_to_kv_pool_allocator, s.req_to_token_pool
    return [pool.free_pages.tolist(), slots.free_slots[:], s.tree_cache.evictable_size(), s.forward_ct]
def spy(scheduler, *rest):
    before["state"] = state(scheduler)
    return measure(scheduler, *rest)
profile.measure = spy
built = process.build(SloScheduler, args)
model = built.slo_model
print(json.dumps({"same": state(built) == before["state"], "name": model.name, "fit": model.meta.get("fit"),
                  "few": len(few), "kv": model.kv_capacity_tokens, "bytes": model.kv_bytes_per_token}))
"""


@pytest.mark.server
def test_measuring_leaves_the_pools_as_they_were(tmp_path: Path) -> None:
    environment = {**os.environ, "SGLANG_SLO_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["same"]
    assert told["name"].startswith("demo-model")
    assert told["fit"]["cases"] == told["few"] >= 8
    assert told["kv"] == 65536 and told["bytes"] > 0
