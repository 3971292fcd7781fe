"""The front door: which flags are ours, and what is filled in when a flag is left out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo import launch_server
from sglang_slo.cli import COMMANDS
from sglang_slo.cli import main as cli
from sglang_slo.core.slo import SloClass

OMP = "SGLANG_CPU_OMP_THREADS_BIND"


@pytest.fixture(autouse=True)
def a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SLO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sglang_slo.cpu.demo_model.demo_model_path", lambda: tmp_path / "demo")


def test_our_flags_are_taken_and_sglangs_are_passed_on() -> None:
    argv = ["--model-path", "m", "--slo-ttft-ms", "500", "--tp", "2", "--slo-park=off"]
    config, rest = launch_server.read_slo_flags(argv)
    assert (config.ttft_ms, config.park) == (500, False)
    assert rest == ["--model-path", "m", "--tp", "2"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--slo-ttft", "5"], "--slo-ttft"),
        (["--slo-ttft-ms", "-5"], "slo-ttft-ms"),
        (["--slo-tbt-ms", "nan"], "slo-tbt-ms"),
        (["--slo-policy", "maybe"], "--slo-policy"),
        (["--slo-default-class", "gold"], "slo-default-class"),
        (["--slo-config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_an_unusable_setting_ends_with_its_name(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        launch_server.read_slo_flags(argv)
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_without_a_model_the_demo_model_is_served_and_said_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = launch_server.with_defaults(["--max-total-tokens", "99"])
    assert argv == ["--max-total-tokens", "99", "--model-path", str(tmp_path / "demo"), "--dtype", "float32"]
    assert "random" in capsys.readouterr().err


@pytest.mark.parametrize("model", [["--model-path", "m"], ["--model=m"], ["m"]])
def test_a_named_model_is_served_as_it_is(model: list[str]) -> None:
    expected = ["--model-path", "m"] if model == ["m"] else model
    assert launch_server.with_defaults(model) == expected


def test_a_model_in_sglangs_own_config_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "sglang.yaml"
    file.write_text("model-path: m\nattention_backend: triton\n")
    argv = ["--config", str(file)]
    assert launch_server.with_defaults(argv) == argv


def binds_all(*, numa_index: int, world_size: int) -> None:
    """As a newer SGLang binds ranks to cores."""


def binds_a_replica(*, tp_rank: int, tp_size: int) -> None:
    """As an older SGLang does."""


@pytest.mark.parametrize(
    ("binds", "cores", "ranks", "replicas", "shares"),
    [
        (binds_all, 4, 2, 1, "0,1|2,3"),
        (binds_all, 3, 2, 1, "0|1,2"),
        (binds_all, 1, 2, 1, "0|0"),
        (binds_all, 4, 1, 1, ""),
        (binds_all, 4, 1, 2, "0,1|2,3"),
        (binds_all, 4, 2, 2, "0|1|2|3"),
        (binds_a_replica, 4, 2, 2, "0,1|2,3"),
        (binds_a_replica, 4, 1, 2, ""),
    ],
)
def test_on_a_cpu_the_ranks_that_sglang_binds_share_the_cores(
    binds: Any, cores: int, ranks: int, replicas: int, shares: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OMP, "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr("sglang.srt.utils.numa_utils.init_threads_binding", binds)
    args = SimpleNamespace(device="cpu", tp_size=ranks, dp_size=replicas, pp_size=1)
    launch_server.bind_cpus(args)
    assert os.environ[OMP] == shares


def test_contradicting_flags_end_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_slo.runtime.scheduler.flags.refusals", lambda args, config: ["--x: because"])
    with pytest.raises(SystemExit, match="--x: because"):
        launch_server.say_how_it_runs(None, launch_server.SloConfig(), set())


def test_the_front_door_does_not_claim_what_only_a_built_scheduler_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_slo.runtime.scheduler.flags.refusals", lambda args, config: [])
    monkeypatch.setattr("sglang_slo.attention.attention_line", lambda args, given: "attention")
    args = SimpleNamespace(enable_metrics=False, host="127.0.0.1", port=30000)
    launch_server.say_how_it_runs(args, launch_server.SloConfig(), set())
    said = capsys.readouterr().err
    assert "scheduling by deadline" not in said and "http://127.0.0.1:30000/slo" in said


def test_what_is_promised_is_said_at_the_start() -> None:
    classes = {"chat": SloClass(1000, 50), "batch": SloClass()}
    config = launch_server.SloConfig(classes=classes, default_class="batch")
    assert launch_server.promises(config) == [
        "class chat: ttft 1000 ms, tbt 50 ms",
        "class batch: best effort",
        "requests that say nothing: class batch",
    ]
    assert launch_server.promises(launch_server.SloConfig(ttft_ms=9)) == [
        "requests that say nothing: ttft 9 ms"
    ]


def test_the_command_lists_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli(["nonsense"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and all(name in said for name in COMMANDS)


def test_the_command_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(launch_server, "main", seen.append)
    cli(["serve", "--tp", "2"])
    assert seen == [["--tp", "2"]]
