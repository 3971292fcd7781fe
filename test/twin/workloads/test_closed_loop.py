"""Closed loops: never more in flight than clients, the next request as the last one ends; and their check on real runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_slo.twin import validate
from sglang_slo.twin.devices.measured import HostTimes
from sglang_slo.twin.devices.spec import DeviceSpec
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.serving_runs import NEEDED, TIMES, ServingRun, read_runs
from sglang_slo.twin.workloads.streams import WorkloadError
from sglang_slo.twin.workloads.workload import load_workload, staggered_outputs


def loop(folder: Path, start: str) -> str:
    path = folder / "loop.yaml"
    stream = {"class": "any", "lengths": {"input": {"fixed": 40}, "output": {"fixed": 12}}}
    whole = {"classes": {"any": {}}, "streams": [stream], "max_requests": 20}
    path.write_text(json.dumps({**whole, "loop": {"clients": 4, "start": start}}))
    return str(path)


@pytest.mark.parametrize("scheduler", driver.SCHEDULERS)
def test_a_client_sends_its_next_request_as_the_one_before_ends(tmp_path: Path, scheduler: str) -> None:
    rows = driver.run(load_workload(loop(tmp_path, "staggered")), scheduler).requests
    assert rows.finished.all()
    assert (rows.arrival_s[:4] == 0).all()
    ends = np.sort(rows.end_s)
    assert np.abs(np.sort(rows.arrival_s)[4:] - ends[:-4]).max() < 2e-3
    in_flight = [((rows.arrival_s <= t) & (rows.end_s > t)).sum() for t in rows.arrival_s]
    assert max(in_flight) == 4


def test_staggered_clients_end_their_first_answers_evenly_spread() -> None:
    outputs = staggered_outputs(np.full(10, 100), 4)
    assert outputs.tolist() == [25, 50, 75, 100, 100, 100, 100, 100, 100, 100]


def run_of(i: int, tokens: int, clients: int) -> ServingRun:
    return ServingRun(f"run{i}", "0.5", DeviceSpec("m", "s"), 100, tokens, clients, 50.0, 10.0 + i)


def test_the_fit_finds_the_constants_that_the_real_runs_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of(i, tokens, clients) for i, (tokens, clients) in enumerate([(50, 4), (200, 16), (400, 64)])]
    true = HostTimes(0.002, 3e-5)

    def check(run: ServingRun, host: HostTimes, start: str) -> validate.Checked:
        passes, places = run.output_tokens + 3.0, (run.output_tokens + 3.0) * run.clients
        lacking = (true.iteration_s - host.iteration_s) * passes + (true.request_s - host.request_s) * places
        tpot = (run.request_ms - run.ttft_ms - lacking * 1e3) / (run.output_tokens - 1)
        return validate.Checked(run, start, run.ttft_ms, tpot, passes, places)

    monkeypatch.setattr(validate, "check", check)
    found = validate.fit_host(runs, "at_once")
    assert (found.iteration_s, found.request_s) == pytest.approx((true.iteration_s, true.request_s))


def write_rows(folder: Path, **changes: str) -> Path:
    row = dict(
        zip(NEEDED, ("a", "sglang", "org/M-8B-Instruct", "h200", "agg", "10", "20", "4", "2"), strict=True)
    )
    row |= {**dict.fromkeys(TIMES, "12.5"), "pp_size": "1", **changes}
    path = folder / "rows.csv"
    path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    return path


def test_runs_are_read_by_model_and_system_and_the_others_are_counted(tmp_path: Path) -> None:
    runs, left_out = read_runs(write_rows(tmp_path), "M-8B", "h200")
    assert (len(runs), left_out) == (1, {})
    assert (runs[0].device.tp, runs[0].clients, runs[0].request_ms) == (2, 4, 12.5 + 12.5 * 19)
    assert read_runs(write_rows(tmp_path), "M-8B", "h100") == ([], {})
    assert read_runs(write_rows(tmp_path, pp_size="2"), "M-8B", "h200") == ([], {"pipeline": 1})


@pytest.mark.parametrize(("field", "value"), [("isl", "x"), ("silicon_ttft_ms", ""), ("batch_size", "0")])
def test_a_bad_row_is_named(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(WorkloadError, match=f"rows.csv:2: {field}"):
        read_runs(write_rows(tmp_path, **{field: value}), "M-8B", "h200")
