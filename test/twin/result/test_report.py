"""Figures are never without their spread, and what got worse is found."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.core.slo import Slo
from sglang_slo.twin.result import report
from sglang_slo.twin.result.requests import empty_requests
from sglang_slo.twin.result.run_result import Iterations, RunResult


def make_result(kept: int, ttft_s: float = 0.5, n: int = 10) -> RunResult:
    rows = empty_requests(
        np.zeros(n, int), np.zeros(n), np.ones(n, int), np.full(n, 2), [Slo(1, 1, "a"), Slo(1, 1, "b")]
    )
    rows.ttft_s = np.where(np.arange(n) < kept, ttft_s, 2.0)
    rows.tbt_s = rows.max_gap_s = np.full(n, 0.1)
    rows.end_s = np.full(n, 3.0)
    its = Iterations(np.empty(0), np.empty(0), *[np.empty(0, np.int64)] * 7)
    return RunResult("w", "s", {}, "p", 1, 1.0, ["a", "b"], 100, rows, its)


def test_several_values_show_their_range_and_one_stands_alone() -> None:
    assert report.share_with_spread([0.5, 0.7]) == "0.600 (0.500-0.700)"
    assert report.share_with_spread([0.5]) == "0.500"
    assert report.with_spread([1.0, 3.0], " s") == "2 s (1-3)"
    with pytest.raises(ValueError, match="no value"):
        report.spread([])


def test_worse_is_found_in_the_direction_of_each_measure() -> None:
    worse = report.what_got_worse([make_result(5, 0.9)], [make_result(8, 0.2)])
    text = "\n".join(worse)
    assert "attainment:" in text and "attainment of a" in text and "first token, median" in text


def test_nothing_is_worse_than_itself_or_than_what_it_beats() -> None:
    assert report.what_got_worse([make_result(8)], [make_result(8)]) == []
    assert not any("attainment" in line for line in report.what_got_worse([make_result(9)], [make_result(1)]))


def test_tables_have_one_row_per_scheduler_and_no_column_for_an_empty_class() -> None:
    table = report.classes_table({"ours": [make_result(9)], "stock": [make_result(1)]})
    assert table.splitlines()[0] == "|  | all | a |"
    assert len(table.splitlines()) == 4
    assert len(report.measures_table({"ours": [make_result(9)]}).splitlines()) == 2 + len(report.MEASURES)
