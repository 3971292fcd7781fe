"""Runs are done once, found again by what they depend on, and searched for capacity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_slo.twin import capacity as capacity_module
from sglang_slo.twin import compare, flags, runs
from sglang_slo.twin.__main__ import main
from sglang_slo.twin.runs import Spec

SPEC = Spec("mix-generated", "stock", max_requests=20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SLO_CACHE_DIR", str(tmp_path))


def test_a_kept_run_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = runs.run_all([SPEC], 1)
    monkeypatch.setattr(runs, "_run_one", lambda spec: pytest.fail("run twice"))
    [again] = runs.run_all([replace(SPEC, name="by another name")], 1)
    assert again.scheduler == "by another name"
    assert again.requests.end_s.tolist() == first.requests.end_s.tolist()


@pytest.mark.parametrize(
    "other",
    [
        {"load": 2.0},
        {"seed": 1},
        {"max_requests": 21},
        {"scheduler": "slo"},
        {"argv": ("--enable-mixed-chunk",)},
        {"workload": "chat70b-generated"},
    ],
)
def test_whatever_changes_a_result_changes_its_key(other: dict[str, object]) -> None:
    assert runs.key(SPEC) != runs.key(replace(SPEC, **other))  # type: ignore[arg-type]
    assert runs.key(SPEC) == runs.key(replace(SPEC, name="only a name"))


def test_a_file_named_by_a_flag_is_part_of_the_key(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text("{}")
    spec = replace(SPEC, argv=("--slo-profile", str(profile)))
    before = runs.key(spec)
    profile.write_text("{ }")
    assert runs.key(spec) != before


def test_bisection_brackets_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        goodput_rps = 1.0

        def __init__(self, load: float) -> None:
            self.attainment = 1.0 if load <= 2.7 else 0.5

    monkeypatch.setattr(capacity_module, "run_all", lambda specs, *_: [Fake(specs[0].load)])
    found = capacity_module.capacity(SPEC, 0.9, 0.01)
    assert found.load <= 2.7 < found.above and found.above / found.load <= 1.01
    nothing = capacity_module.capacity(SPEC, 1.1)
    assert nothing.load == 0.0 and nothing.above == capacity_module.LOWEST_LOAD
    everything = capacity_module.capacity(SPEC, 0.4)
    assert everything.load == capacity_module.HIGHEST_LOAD


def test_our_flags_are_told_from_sglangs() -> None:
    ours, others = flags.split(["--slo-chunk", "fixed", "--chunked-prefill-size", "512", "--slo-park=off"])
    assert ours == ["--slo-chunk", "fixed", "--slo-park=off"]
    assert others == ["--chunked-prefill-size", "512"]


@pytest.mark.parametrize(
    ("prefixes", "newer", "tried"),
    [
        (False, set(), {"fcfs", "priority"}),
        (True, set(), {"fcfs", "lpm", "priority"}),
        (True, {"hrrn"}, {"fcfs", "lpm", "priority", "hrrn"}),
    ],
)
def test_the_grid_leaves_out_only_what_cannot_differ(
    monkeypatch: pytest.MonkeyPatch, prefixes: bool, newer: set[str], tried: set[str]
) -> None:
    [done] = runs.run_all([SPEC], 1)
    done.requests.cached_tokens[:] = prefixes
    seen: list[Spec] = []

    def fake(specs: list[Spec], *_: object) -> list[object]:
        seen.extend(specs)
        return [replace(done, scheduler=s.title) for s in specs]

    monkeypatch.setattr(compare, "run_all", fake)
    installed = frozenset({"--schedule-conservativeness"}), frozenset(newer)
    monkeypatch.setattr(compare, "stock_has", lambda: installed)
    results = compare.best_stock(SPEC)
    assert len(results) == len(seen) == 12 * len(tried) + compare.FINALISTS
    assert {s.name.split()[1] for s in seen} == tried


def test_bad_input_is_refused_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--workload", "nope"]) == 2
    assert "nope" in capsys.readouterr().err
    assert main(["run", "--workload", "mix-generated", "--load", "-1"]) == 2
    assert main(["capacity", "--workload", "mix-generated", "--target", "2"]) == 2
    assert "--target" in capsys.readouterr().err
    assert main(["dance"]) == 2
