"""The pieces of the results page, on runs that are made up: what is put where, and what is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_replay import make_result

import pieces
from sglang_slo.twin.capacity import Capacity
from sglang_slo.twin.compare import PARTS
from sglang_slo.twin.predictors import PREDICTORS
from sglang_slo.twin.result.run_result import Iterations, RunResult
from sglang_slo.twin.runs import Spec

SCENE = pieces.Scene("mix", (0.5, 1.0), 1.0, "title")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pieces.Setup:
    def best(base: Spec, jobs: int | None, *_: object) -> list[RunResult]:
        results = [make_result("stock fcfs 512", 3), make_result("stock lpm 256", 5)]
        for result in results:
            result.settings = {"argv": result.scheduler.split()[1:]}
        return results

    def run_all(specs: list[Spec], jobs: int | None, progress: object, keep: bool = True) -> list[RunResult]:
        asked.extend(specs)
        return [make_result(s.name, 9 if s.scheduler == "slo" else 5 if s.argv else 2) for s in specs]

    asked: list[Spec] = []
    monkeypatch.setattr(pieces, "best_stock", best)
    monkeypatch.setattr(pieces, "run_all", run_all)
    monkeypatch.setattr(pieces, "_bound", lambda spec, rule: 1.0)
    monkeypatch.setattr(pieces, "capacity", lambda spec: Capacity(spec.title, 0.9, 1.5, 1.6, 7.0, ()))
    return pieces.Setup((1, 2, 3), 1, None, tmp_path / "plots")


def test_attainment_sets_ours_beside_the_best_setting_and_the_bound(setup: pieces.Setup) -> None:
    text = pieces.attainment(SCENE, setup)
    row = next(line for line in text.splitlines() if line.startswith("| 0.5 |"))
    assert "0.900 (0.900-0.900) | 0.500 (0.500-0.500) | 0.200" in row
    assert "| lpm 256 |" in row and row.endswith("| 0.900 |")
    assert "What got worse at load 1:" in text and "against best stock: nothing" in text


def test_what_stands_behind_the_shares_is_told_at_each_load() -> None:
    result = make_result("ours", 9)
    result.requests.max_gap_s = np.arange(10.0)
    result.kv_capacity_tokens = 100
    used, waiting, seconds = np.array([90, 10, 60]), np.array([2, 0, 1]), np.array([1.0, 5.0, 2.0])
    whole = np.zeros(3, np.int64)
    result.iterations = Iterations(seconds, seconds, whole, whole, whole, whole, used, waiting, whole)
    row = pieces._behind({0.5: {"ours": [result]}}).splitlines()[2]
    assert row == "| 0.5 | ours | 0.200 | 8.91 s | 9 s | 0.700 |"


def test_every_picture_that_the_page_shows_is_there(setup: pieces.Setup) -> None:
    text = pieces.attainment(SCENE, setup)
    shown = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(shown) == 4
    assert all((setup.plots.parent / name).exists() for name in shown)


def test_parts_are_all_switched_off_one_by_one(setup: pieces.Setup) -> None:
    lines = pieces.parts(SCENE, setup).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["ours", *PARTS]


def test_every_predictor_has_its_line_and_the_shifted_one_learns_elsewhere(setup: pieces.Setup) -> None:
    lines = pieces.lengths(SCENE, setup).splitlines()
    shown = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert shown == [*PREDICTORS[:-1], "shifted (from reason)"] and PREDICTORS[-1] == "shifted"
    assert all("0.900 (0.900-0.900)" in line for line in lines[2:])


def test_capacity_is_searched_for_ours_the_best_setting_and_the_defaults(setup: pieces.Setup) -> None:
    text = pieces.capacities(SCENE, setup)
    assert "best stock at load 1: lpm 256" in text and text.count("| 1.500 | 1.600 | 7.00 |") == 3
