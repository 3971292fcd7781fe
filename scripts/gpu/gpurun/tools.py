"""The programs that the parts call: the replay of benchmark/, SGLang's benchmark, the profiler, the twin."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from child_process import tail
from gpurun.run import ARMS, Run
from gpurun.server import OURS, Server

LOOSE = ("x-slo-ttft-ms=600000", "x-slo-tbt-ms=1000")  # limits that a saturated device can keep
PROFILE_S = {"cuda": 60, "cpu": 4}  # how long the profiler measures


def bench_serving(
    run: Run,
    server: Server,
    prompts: int,
    input_tokens: int,
    output_tokens: int,
    headers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The scalar figures of `sglang.bench_serving` on random ids, all sent at once. Lengths: the most, half at least."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        run.python(
            "-m",
            "sglang.bench_serving",
            "--backend",
            "sglang",
            "--base-url",
            server.url,
            "--dataset-name",
            "random-ids",
            "--num-prompts",
            str(prompts),
            "--random-range-ratio",
            "0.5",
            "--random-input-len",
            str(input_tokens),
            "--random-output-len",
            str(output_tokens),
            "--seed",
            "1",
            "--disable-tqdm",
            "--output-file",
            str(report),
            *(["--header", *headers] if headers else []),
        )
        figures = json.loads(report.read_text().splitlines()[-1])
    return {key: value for key, value in figures.items() if isinstance(value, int | float | str)}


def replay(run: Run, server: Server, workload: Path, load: float, requests: int) -> dict[str, Any]:
    """Every measure of a replay over HTTP, by the harness of benchmark/, scored by the twin's code.

    Raises RuntimeError if no request was answered: that is a broken server, not a low attainment.
    """
    from client import replay as over_http
    from sglang_slo.twin.workloads.workload import load_workload

    work = load_workload(str(workload), load=load, data=run.data, max_requests=requests)
    result = over_http(work, server.url, server.arm.name)
    if result.notes["errors"] >= len(work):
        raise RuntimeError(f"{server.arm.name}: all {len(work)} requests failed\n{tail(server.log)}")
    return dict(json.loads(result.to_json()))


def twin(run: Run, workload: Path, real: dict[str, Any]) -> Any:
    """The measures of one scheduler in virtual time, with the settings that the server of a `real` run had."""
    arm, server = ARMS[real["arm"]], real["server"]
    settings = {
        "--max-total-tokens": server.get("max_total_num_tokens"),
        "--chunked-prefill-size": server.get("chunked_prefill_size"),
        "--max-running-requests": server.get("max_running_requests"),
    }
    same = [
        w for flag, value in settings.items() if value and flag not in arm.flags for w in (flag, str(value))
    ]
    said = run.python(
        "-m", "sglang_slo.twin", "run", "--workload", str(workload), "--load", str(real["load"]), "--json",
        "--max-requests", str(real["max_requests"]), "--scheduler", "slo" if arm.module == OURS else "stock",
        *(["--data", str(run.data)] if run.data else []), *same, *arm.flags,
    )  # fmt: skip
    return json.loads(said.strip().splitlines()[-1])


def measure_profile(run: Run) -> None:
    """Start one server on the whole device, let it measure itself, and leave its profile at `run.profile`."""
    seconds = PROFILE_S[run.device]
    flags = [flag for flag in run.flags(1) if flag != "--sleep-on-idle"]
    partial = run.profile.with_name("profile.measuring.json")
    run.python("-m", "sglang_slo.profile", "--out", str(partial), "--seconds", str(seconds), *flags)
    partial.replace(run.profile)
