"""Latency profiles by name or path: what the fake worker's time comes from.

A profile is the JSON of `core.latency.LatencyModel`, the same file a server measures and keeps. The shipped
ones (`data/profiles/`) are roofline models of a device, marked `measured: false`. `meta.schedule_s` and
`meta.process_s` are the scheduler's own CPU time per iteration before a launch and after a result; the twin
hides them behind the computation wherever the overlap scheduler does.
"""

from __future__ import annotations

from pathlib import Path

from sglang_slo.core.latency import LatencyModel, ProfileError

DATA = Path(__file__).parents[1] / "data"
SCHEDULE_S = (
    2e-4  # CPU time of receiving, planning and launching one iteration, as profiled in the twin itself
)
PROCESS_S = 1e-4  # CPU time of taking one iteration's results


def names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in (DATA / "profiles").glob("*.json"))


def load_profile(name_or_path: str, beside: Path | None = None) -> LatencyModel:
    """A shipped profile by name, else a file (relative paths also against `beside`). Raises ProfileError."""
    shipped = DATA / "profiles" / f"{name_or_path}.json"
    if shipped.exists():
        model = LatencyModel.load(shipped)
    else:
        places = [Path(name_or_path)] + ([beside / name_or_path] if beside else [])
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            raise ProfileError(f"profile: need a file or one of {', '.join(names())}, got {name_or_path!r}")
        model = LatencyModel.load(found)
    if model.kv_capacity_tokens < 1024:
        raise ProfileError(
            f"profile {name_or_path}: kv_capacity_tokens: need at least 1024, got {model.kv_capacity_tokens}"
        )
    return model


def cpu_times_s(model: LatencyModel) -> tuple[float, float]:
    """Scheduler CPU seconds per iteration: (before the launch, after the result)."""
    return float(model.meta.get("schedule_s", SCHEDULE_S)), float(model.meta.get("process_s", PROCESS_S))
