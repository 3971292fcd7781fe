"""Planning takes time in the twin: ours, by its size, and nobody else's."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_slo.twin.sim import driver, planning_cost, virtual
from sglang_slo.twin.sim.planning_cost import PlanningCost
from sglang_slo.twin.workloads.workload import load_workload

WORKLOAD = load_workload("mix-generated", max_requests=30)


def first_tokens_s(scheduler: str, cost: PlanningCost, monkeypatch: pytest.MonkeyPatch) -> Any:
    """When first tokens came, of all requests together."""
    monkeypatch.setattr(virtual, "fitted", lambda: cost)
    return float(driver.run(WORKLOAD, scheduler, []).requests.ttft_s.sum())


def test_it_grows_with_what_is_planned() -> None:
    cost = planning_cost.fitted()
    assert 0 < cost.seconds(0, 0, False) < cost.seconds(512, 0, False) < cost.seconds(512, 4096, False)
    assert cost.seconds(64, 64, False) <= cost.seconds(64, 64, True)


def test_a_slow_plan_delays_first_tokens_and_stock_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, much = PlanningCost(0, 0, 0, 0), PlanningCost(0.05, 0, 0, 0)
    ours = first_tokens_s("slo", nothing, monkeypatch)
    assert first_tokens_s("slo", much, monkeypatch) > ours + 0.05 * len(WORKLOAD)
    assert first_tokens_s("stock", much, monkeypatch) == first_tokens_s("stock", nothing, monkeypatch)
