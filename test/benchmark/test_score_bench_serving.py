"""Scoring bench_serving's files: the project's definition, and clear words for files that cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from score_bench_serving import DetailsError, main, read_runs, score
from sglang_slo.core.slo import BEST_EFFORT, GapRule, Slo

RUN: dict[str, Any] = {
    "duration": 10.0,
    "ttfts": [0.1, 0.9, 0.1, 0.0],
    "itls": [[0.02, 0.03], [0.02], [0.2, 0.01], []],
    "output_lens": [3, 2, 3, 0],
    "errors": ["", "", "", "refused"],
}


def test_kept_missed_and_failed_are_told_apart() -> None:
    found = score(RUN, Slo(0.5, 0.05))
    assert (found.requests, found.completed) == (4, 3)
    assert found.attainment == 0.25
    assert found.misses == {"ttft": 1, "gap": 1, "error": 1}
    assert found.attainment_by_rule == {"every": 0.25, "paced": 0.25, "p99": 0.25, "mean": 0.25}
    assert found.longest_pause_max_s == pytest.approx(0.2)
    assert (found.goodput_rps, found.token_goodput_tps, found.throughput_tps) == (0.1, 0.3, 0.8)


def test_without_limits_all_that_completed_is_kept() -> None:
    assert score(RUN, BEST_EFFORT).attainment == 0.75


def test_one_pause_is_a_miss_unless_the_99th_percentile_was_asked_for() -> None:
    gaps = [0.01 + i / 1e6 for i in range(150)]
    run = {"duration": 1.0, "ttfts": [0.1], "itls": [[*gaps, 9.0]], "output_lens": [152], "errors": [""]}
    found = score(run, Slo(1.0, 0.02))
    assert (found.attainment, found.misses, found.attainment_by_rule["p99"]) == (0.0, {"gap": 1}, 1.0)
    assert score(run, Slo(1.0, 0.02, gap_rule=GapRule.P99)).attainment == 1.0


def test_a_chunk_spread_over_its_tokens_is_one_delivery_again() -> None:
    run = {
        "duration": 1.0,
        "ttfts": [0.1],
        "itls": [[0.03, *[1.0 / 8] * 8]],
        "output_lens": [10],
        "errors": [""],
    }
    found = score(run, Slo(tbt_s=0.2))
    assert found.longest_pause_max_s == pytest.approx(1.0) and found.attainment == 0.0
    assert found.attainment_by_rule == {"every": 0.0, "paced": 0.0, "p99": 0.0, "mean": 1.0}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[]", "need an object"),
        (json.dumps({"duration": 1.0}), "ttfts: missing; was bench_serving run with --output-details"),
        (json.dumps({**RUN, "errors": []}), "different lengths"),
    ],
)
def test_an_unusable_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "run.jsonl", json.dumps(RUN), line)
    with pytest.raises(DetailsError, match=said) as error:
        read_runs(path)
    assert f"{path}:2" in str(error.value)


def test_an_empty_or_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DetailsError, match="no runs"):
        read_runs(write(tmp_path / "empty.jsonl", ""))
    assert main([str(tmp_path / "nowhere.jsonl")]) == 2


def test_command_prints_a_line_of_json_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.jsonl", json.dumps(RUN), json.dumps(RUN))
    assert main([str(path), "--ttft-ms", "500", "--tbt-ms", "50", "--json"]) == 0
    assert [json.loads(line)["attainment"] for line in capsys.readouterr().out.splitlines()] == [0.25, 0.25]


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(SystemExit):
        main([str(write(tmp_path / "run.jsonl", json.dumps(RUN))), "--ttft-ms", value])
