"""Forty prompts with a common beginning come at once: it is computed once, and nobody is given up for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.plan import Planner
from sglang_slo.core.view import View
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import BLOCK_TOKENS, Workload, load_workload

COUNT, SHARED_BLOCKS = 40, 24


def _crowd() -> Workload:
    base = load_workload("agent-generated", max_requests=COUNT)
    shared = tuple(range(500, 500 + SHARED_BLOCKS))
    return replace(
        base,
        arrival_s=0.5 + np.arange(COUNT) * 1e-4,
        blocks=[(0, *shared, 9000 + i) for i in range(COUNT)],
        input_tokens=np.full(COUNT, (SHARED_BLOCKS + 1) * BLOCK_TOKENS),
        output_tokens=np.full(COUNT, 8),
        class_id=np.zeros(COUNT, np.int64),
    )


def test_a_prefix_cached_while_others_wait_is_computed_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    given_up: list[int] = []
    plan = Planner.plan

    def watched(self: Planner, view: View) -> IterationPlan:
        found = plan(self, view)
        given_up.append(found.infeasible)
        return found

    monkeypatch.setattr(Planner, "plan", watched)
    ours = driver.run(_crowd(), "slo")
    stock = driver.run(_crowd(), "stock", ["--schedule-policy", "lpm", "--chunked-prefill-size", "2048"])
    assert ours.attainment == 1.0
    # those that begin while the first is still being cut compute what it has not come to yet
    assert ours.prefill_tokens <= 1.08 * stock.prefill_tokens
    # until the first is through, each is thought to have the whole of it to compute
    assert given_up[-1] == 0 and np.mean(np.array(given_up) > 0) < 0.5
