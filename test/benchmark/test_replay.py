"""Side by side: fair order, figures with spread, and the page put together from kept pieces."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

import results
from child_process import ChildError
from pieces import SCENES, Setup
from replay import Side, alternating, pooled, ratio, report
from servers import server, with_model
from sglang_slo.core.slo import Slo
from sglang_slo.twin.devices.profiles import DATA
from sglang_slo.twin.result.requests import empty_requests
from sglang_slo.twin.result.run_result import Iterations, RunResult
from sglang_slo.twin.runs import Spec, run_all
from sglang_slo.twin.workloads.workload import load_workload
from truth import Figure, Share, read_iterations, replayed, shares

SETUP = Setup((1, 2), 1, None, Path("plots"))


def make_result(name: str, kept: int, n: int = 10) -> RunResult:
    rows = empty_requests(
        np.arange(n) % 2, np.zeros(n), np.ones(n, int), np.full(n, 2), [Slo(1, 1, "a"), Slo(1, 1, "b")]
    )
    rows.ttft_s = np.where(np.arange(n) < kept, 0.5, 2.0)
    rows.tbt_s = rows.max_gap_s = np.full(n, 0.1)
    rows.end_s = np.full(n, 3.0)
    its = Iterations(np.empty(0), np.empty(0), *[np.empty(0, np.int64)] * 7)
    return RunResult("w", name, {}, "p", 1, 1.0, ["a", "b"], 0, rows, its, notes={"errors": 0.0})


def test_no_side_always_goes_first() -> None:
    a, b = Side("a"), Side("b")
    assert alternating([a, b], 3) == [a, b, b, a, a, b]


def test_report_gives_means_ranges_and_the_ratio_of_each_round() -> None:
    runs = [make_result("stock", 2), make_result("ours", 8), make_result("ours", 6), make_result("stock", 4)]
    text = report(runs, ["stock", "ours"])
    assert "0.300 (0.200-0.400)" in text and "0.700 (0.600-0.800)" in text
    assert "all: 2.33x stock (rounds: 4.00, 1.50)" in text


def test_a_ratio_to_nothing_is_said_in_words() -> None:
    assert ratio([0.5], [0.0]) == "stock kept none"
    assert ratio([0.0], [0.0]) == "none kept by either"


def test_pooling_keeps_every_request_of_every_round() -> None:
    whole = pooled([make_result("x", 2), make_result("y", 1), make_result("x", 4)], "x")
    assert len(whole.requests.ttft_s) == 20 and whole.requests.attained.sum() == 6


def test_both_servers_get_a_model_and_a_named_one_is_left_alone() -> None:
    assert with_model(["--model-path", "m"]) == ["--model-path", "m"]
    assert with_model(["--model=m"]) == ["--model=m"]


@pytest.mark.server
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    flags = ["--model-path", str(tmp_path), "--no-such-flag"]
    with pytest.raises(ChildError, match="no-such-flag"), server("stock", flags, tmp_path / "log"):
        pass


def test_the_page_holds_what_was_kept_and_nothing_of_what_was_not(tmp_path: Path) -> None:
    results.keep(SCENES[0], "parts", SETUP, "| a table |", tmp_path)
    text = results.page(tmp_path)
    assert "## mix" in text and "| a table |" in text and "seeds 1, 2" in text
    assert "## agent" not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("workloads", "pieces", "named"), [("mix,x", None, "--workloads"), (None, "y", "--pieces")]
)
def test_an_unknown_choice_names_its_flag(workloads: str | None, pieces: str | None, named: str) -> None:
    args = argparse.Namespace(workloads=workloads, pieces=pieces, max_requests=None)
    with pytest.raises(ValueError, match=named):
        results.chosen(args)


@pytest.mark.parametrize("argv", [["--loads", "1,x"], ["--seeds", "7,,8"]])
def test_a_number_that_is_none_names_its_flag(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([*argv, "--page-only", "--workloads", "mix"]) == 2
    assert argv[0] in capsys.readouterr().err


def test_truth_says_what_is_not_within() -> None:
    assert "NOT within" in Figure("x", 0.1, 0.12).line()
    assert "NOT" not in Figure("x", 0.1, 0.11).line()
    assert "NOT within" in Share("x", 0.9, 0.96).line()
    assert "NOT" not in Share("x", 0.9, 0.94).line()


def test_truth_replays_the_last_requests_of_the_log_in_order_and_compares_each_promise(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.jsonl"
    loose, tight = ({"ttft_limit_s": s, "tbt_limit_s": 1.0, "class": "custom"} for s in (60.0, 1e-6))
    rows = [
        {"arrival_s": at_s, "prompt_tokens": 20, "output_tokens": 3, "attained": at_s != 3.0, **limits}
        for at_s, limits in ((9.0, loose), (1.0, tight), (3.0, loose), (7.0, tight))
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got, workload = replayed(log, 3, DATA / "profiles" / "h200-llama3-8b.json", tmp_path)
    assert [row["arrival_s"] for row in got] == [3.0, 7.0, 9.0]
    [twin] = run_all([Spec(str(workload), "slo")], 1, None, keep=False)
    found = {s.name: (s.real, s.twin) for s in shares(got, twin, load_workload(str(workload)).limits)}
    assert list(found.values()) == [(2 / 3, 2 / 3), (1 / 2, 1.0), (1.0, 0.0)]
    with pytest.raises(ValueError, match="4 requests of 5"):
        replayed(log, 5, tmp_path / "p.json", tmp_path)


def test_truth_reads_the_iterations_of_the_replay_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("launched_s,duration_s\n0.0,0.5\n1.0,0.25\n2.0,0.125\n")
    assert read_iterations(log)["duration_s"].tolist() == [0.5, 0.25, 0.125]
    assert read_iterations(log, 1.0, 2.0)["duration_s"].tolist() == [0.25]
    log.write_text("launched_s,duration_s\n")
    with pytest.raises(ValueError, match="no iteration"):
        read_iterations(log)
