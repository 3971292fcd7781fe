"""A result: scored by the shared definition, the same after writing and reading, honest about losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.twin.result.requests import empty_requests
from sglang_slo.twin.result.run_result import Iterations, RunResult
from sglang_slo.twin.result.table import render


def result() -> RunResult:
    """Three requests: kept, late, never finished."""
    rows = empty_requests(
        np.array([0, 0, 1]), np.array([0.0, 1.0, 2.0]), np.array([10, 20, 30]), np.array([5, 6, 7]),
        [Slo(1.0, 0.05, "chat"), Slo(0.5, 0.05, "code")],
    )  # fmt: skip
    rows.ttft_s[:2], rows.tbt_s[:2], rows.tpot_s[:2] = [1.0, 1.5], [0.05, 0.01], [0.02, 0.01]
    rows.pace_lag_s[:2] = 0.0
    rows.max_gap_s[:2], rows.end_s[:2] = [0.05, 0.01], [2.0, 4.0]
    columns = {f: np.array([1, 2]) for f in Iterations.__dataclass_fields__}
    its = Iterations(**{**columns, "start_s": np.array([0.0, 2.0]), "duration_s": np.array([2.0, 2.0])})
    return RunResult("w", "stock", {}, "p", 1, 1.0, ["chat", "code"], 100, rows, its, wall_s=3.25)


def test_a_limit_met_exactly_is_kept_and_the_unfinished_is_not() -> None:
    assert result().requests.attained.tolist() == [True, False, False]
    assert result().attainment == 1 / 3
    assert result().goodput_rps == 1 / 4


def test_measures_are_plain_json_in_one_line_and_tell_classes_apart() -> None:
    text = result().to_json()
    measures = json.loads(text)
    assert "\n" not in text and measures["wall_s"] == 3.25
    assert measures["classes"]["chat"]["attainment"] == 0.5
    assert measures["classes"]["code"] | {"finished": 0, "attainment": 0.0} == measures["classes"]["code"]
    assert measures["ttft_s"]["max"] is None  # never came: not a number
    assert "wall_s" not in json.loads(result().to_json(wall=False))


def test_every_request_is_judged_by_every_rule_and_the_longest_pause_stands_beside_it() -> None:
    rows = result().requests
    rows.tbt_s[0], rows.tpot_s[0], rows.max_gap_s[0], rows.pace_lag_s[0] = 0.05, 0.06, 9.0, 8.0
    changed = result()
    changed.requests = rows
    chat = changed.measures()["classes"]["chat"]
    assert chat["attainment_by_rule"] == {"every": 0.0, "paced": 0.0, "p99": 0.5, "mean": 0.0}
    assert chat["longest_pause_s"] == {"p99": 9.0, "max": 9.0}
    assert {k: v for k, v in chat["misses"].items() if v} == {"ttft": 1, "gap": 1}
    assert changed.measures()["classes"]["code"]["misses"]["error"] == 1
    rows.refused[2] = True
    assert changed.measures()["classes"]["code"]["misses"] == dict.fromkeys(chat["misses"], 0) | {"shed": 1}
    rows.gap_rule[0], rows.max_pause_s[0] = GapRule.P99, 10.0
    assert changed.measures()["classes"]["chat"]["attainment"] == 0.5


def test_a_result_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    result().write(tmp_path / "r.npz")
    assert RunResult.read(tmp_path / "r.npz").to_json() == result().to_json()


def test_the_table_has_a_row_for_each_and_says_never() -> None:
    text = render([("ours", result()), ("stock", result())])
    assert len(text.splitlines()) == 4
    assert "33.3%" in text and "never" in text
