"""Pictures: drawn from results alone, complete, and the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang_slo.core.slo import Slo
from sglang_slo.twin import plot
from sglang_slo.twin.result.requests import empty_requests
from sglang_slo.twin.result.run_result import Iterations, RunResult

PNG = b"\x89PNG"


def make_result(name: str, finished: bool = True, n: int = 20, passes: int = 9000) -> RunResult:
    rows = empty_requests(
        np.arange(n) % 2,
        np.arange(n, dtype=float),
        np.full(n, 10),
        np.full(n, 5),
        [Slo(0.5, 0.05, "a"), Slo(slo_class="b")],
    )
    if finished:
        rows.ttft_s = np.linspace(0.1, 1.0, n)
        rows.tbt_s = rows.max_gap_s = np.linspace(0.0, 0.1, n)
        rows.end_s = rows.arrival_s + 2
    whole = np.arange(passes)
    its = Iterations(whole * 0.01, np.full(passes, 0.01), *[whole % 7 for _ in range(7)])
    return RunResult("w", name, {}, "p", 1, 1.0, ["a", "b"], 100, rows, its)


@pytest.mark.parametrize("finished", [True, False])
def test_compare_writes_every_picture_also_when_nothing_finished(tmp_path: Path, finished: bool) -> None:
    written = plot.compare([make_result("ours", finished), make_result("stock", finished)], tmp_path / "new")
    assert len(written) == 3
    assert all(path.read_bytes().startswith(PNG) for path in written)


def test_same_figures_same_bytes(tmp_path: Path) -> None:
    curves = {"ours": {0.5: [0.9, 0.95], 1.0: [0.8]}, "stock": {0.5: [0.5]}}
    first, again = (
        plot.attainment_against_load(curves, {"bound": {0.5: [1.0]}}, "t", tmp_path / name).read_bytes()
        for name in ("a.png", "b.png")
    )
    assert first == again


def test_thinning_keeps_the_peak() -> None:
    y = np.zeros(100_000)
    y[31_337] = 5.0
    x, thin = plot._thinned(np.arange(100_000.0), y)
    assert len(x) == len(thin) <= 4000
    assert thin.max() == 5.0


def test_a_workload_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    result = make_result("ours")
    result.workload = "../../x y"
    assert all(path.parent == tmp_path for path in plot.compare([result], tmp_path))
