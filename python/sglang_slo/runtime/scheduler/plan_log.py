"""What each rank decided, one line per iteration, into the folder that `SGLANG_SLO_PLAN_LOG` names; off by default.

For checks that all tensor-parallel ranks decide alike: each writes a file of its own, `rank-<n>.log`, a line at a
time. Requests are named by their rows of the table, which are handed out alike on every rank.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sglang_slo.core.iteration_plan import IterationPlan

ENV = "SGLANG_SLO_PLAN_LOG"


class PlanLog:
    """An open log of one rank, or nothing if none was asked for."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(ENV)
        # Lives as long as the process: there is no place to close it.
        self._out: TextIO | None = None
        if folder:
            self._out = open(Path(folder) / f"rank-{rank}.log", "a", buffering=1)  # noqa: PTH123, SIM115

    def add(self, iteration: int, now_s: float, plan: IterationPlan) -> None:
        """Note the plan of an iteration; `now_s`: the tick's time, which it was made at."""
        if self._out is None:
            return
        decode = "all" if plan.decode is None else ",".join(str(i) for i in plan.decode.tolist())
        prefill = ",".join(f"{row}:{tokens}" for row, tokens in plan.prefill)
        times = f"predicted_s={plan.predicted_s:.6f} budget_s={plan.budget_s:.6f}"
        self._out.write(
            f"{iteration} {now_s!r} prefill={prefill} decode={decode} mixed={plan.mixed} {times}\n"
        )
