"""The latency model a server starts with: a given profile, a stored one, or one measured at start-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_slo.core.latency import Coefficients, LatencyModel


def startup_model(scheduler: Any) -> LatencyModel:
    """The profile of `--slo-profile`, or a cautious guess that online fitting corrects."""
    path = scheduler.slo_config.profile
    if path is not None:
        return LatencyModel.load(Path(path))
    return LatencyModel(Coefficients(2e-3, 1e-3, 5e-5, 0.0, 2e-3, 1e-8), name="guess")
