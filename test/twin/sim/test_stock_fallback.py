"""Where our policy is off, or breaks, SGLang's own scheduling runs, and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sglang_slo.core.plan import Planner
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import load_workload

MIXED = ["--enable-mixed-chunk", "--chunked-prefill-size", "512"]


def _batches(result: RunResult) -> list[list[float]]:
    rows = result.iterations
    columns = (rows.start_s, rows.duration_s, rows.new_tokens, rows.decodes, rows.context_tokens)
    return [column.tolist() for column in columns]


@pytest.mark.parametrize(
    "flags", [[], MIXED, ["--disable-overlap-schedule"]], ids=["default", "mixed", "no overlap"]
)
def test_policy_off_makes_stocks_batches_iteration_by_iteration(flags: list[str]) -> None:
    workload = load_workload("mix-generated", max_requests=60, load=2.0)
    stock = driver.run(workload, "stock", flags)
    off = driver.run(workload, "slo", [*flags, "--slo-policy", "off"])
    assert _batches(stock) == _batches(off)
    assert np.array_equal(stock.requests.ttft_s, off.requests.ttft_s)


@pytest.mark.parametrize("fails", [1, 3], ids=["always", "every third time"])
def test_everything_is_served_and_counted_when_planning_raises(fails: int, monkeypatch: Any) -> None:
    plan, calls = Planner.plan, [0]

    def raising(self: Planner, view: Any) -> Any:
        calls[0] += 1
        if calls[0] % fails == 0:
            raise RuntimeError("planning is broken")
        return plan(self, view)

    monkeypatch.setattr(Planner, "plan", raising)
    workload = load_workload("mix-generated", max_requests=60, load=2.0)
    result = driver.run(workload, "slo", MIXED, allow_fallbacks=True)
    assert result.requests.finished.all()
    assert result.fallbacks == result.measures()["fallbacks"] == calls[0] // fails > 0


def test_a_run_whose_planning_failed_is_a_failed_run(monkeypatch: Any) -> None:
    def raising(self: Planner, view: Any) -> Any:
        raise RuntimeError("planning is broken")

    monkeypatch.setattr(Planner, "plan", raising)
    with pytest.raises(driver.FallbackError, match="planning is broken"):
        driver.run(load_workload("mix-generated", max_requests=5), "slo", MIXED)
