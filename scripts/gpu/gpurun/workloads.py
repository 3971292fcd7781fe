"""The workloads of the parts, as the YAML files that the replay and the twin both read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gpurun.run import Run

CPU_CLASSES = {"chat": {"ttft_ms": 4000, "tbt_ms": 400}, "batch": {"ttft_ms": 30000, "tbt_ms": 2000}}
PRESSURE_CLASSES = {"chat": {"ttft_ms": 2000, "tbt_ms": 60}, "batch": {"ttft_ms": 30000, "tbt_ms": 1000}}


def mix_file(run: Run) -> Path:
    """The shipped `mix` on the profile measured here (the modelled one before that); small on a CPU."""
    from sglang_slo.twin.devices.profiles import DATA

    if run.device == "cpu":
        content = _two_classes(CPU_CLASSES, rates=(2.0, 0.8), inputs=(3.8, 4.8), outputs=(2.0, 2.0))
    else:
        name = "mix" if run.data else "mix-generated"
        content = yaml.safe_load((DATA / "workloads" / f"{name}.yaml").read_text())
    return _write(run, "mix", content)


def pressure_file(run: Run) -> Path:
    """Long answers against a small KV pool. Clients declare the true length."""
    if run.device == "cpu":
        content = _two_classes(CPU_CLASSES, rates=(6.0, 2.0), inputs=(4.4, 5.0), outputs=(4.0, 4.0))
    else:
        content = _two_classes(PRESSURE_CLASSES, rates=(6.0, 2.0), inputs=(5.0, 6.0), outputs=(5.8, 6.2))
    return _write(run, "pressure", content)


def request_count(run: Run, workload: Path, load: float) -> int:
    """Requests that arrive within the span of one replay at this load, within the size allowed."""
    from sglang_slo.twin.workloads.workload import load_workload

    arrival_s = load_workload(str(workload), load=load, data=run.data).arrival_s
    return max(int((arrival_s <= run.sizes.span_s).sum()), 1)


def _two_classes(
    classes: dict[str, Any],
    rates: tuple[float, float],
    inputs: tuple[float, float],
    outputs: tuple[float, float],
) -> dict[str, Any]:
    """Chat and batch as Poisson streams. `rates` in requests/s; `inputs`, `outputs`: log-mean of tokens."""
    streams = [
        {
            "class": name,
            "lengths": {"input": {"lognormal": [i, 0.6]}, "output": {"lognormal": [o, 0.6]}},
            "arrivals": {"poisson_rps": rate},
        }
        for name, rate, i, o in zip(("chat", "batch"), rates, inputs, outputs, strict=True)
    ]
    return {"seed": 7, "declared_max_new_tokens": True, "classes": classes, "streams": streams}


def _write(run: Run, name: str, content: dict[str, Any]) -> Path:
    content["profile"] = str(run.profile) if run.profile.exists() else "h200-llama3-8b"
    content["max_requests"] = run.sizes.max_requests if name == "mix" else run.sizes.pressure_requests
    path = run.out / "workloads" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
