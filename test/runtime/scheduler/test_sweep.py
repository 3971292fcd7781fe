"""Rows of requests that left on a path of SGLang's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import real_scheduler as real


def test_a_request_that_is_nowhere_any_more_ends_while_the_server_is_idle(tmp_path: Path) -> None:
    lost, *others = [real.request(f"r{i}", prompt, 4) for i, prompt in enumerate(real.prompts(3, 20))]
    ended = []

    def lose_one(scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            gone = scheduler.slo_lifecycle.gone
            scheduler.slo_lifecycle.gone = lambda req: (ended.append(req.rid), gone(req))
            scheduler.slo_planner.plan = _without(scheduler, lost.rid)
            return [lost, *others]
        scheduler.waiting_queue[:] = [req for req in scheduler.waiting_queue if req.rid != lost.rid]
        return []

    done = real.run(lose_one, 2, ["--max-total-tokens", "2000"], tmp_path)
    assert sorted(done.tokens) == sorted(r.rid for r in others)
    assert ended.count(lost.rid) == 1
    assert not done.scheduler.slo_registry.reqs and len(done.scheduler.slo_registry.table) == 0


def _without(scheduler: Any, rid: str) -> Any:
    """Plans that leave one request in the queue."""
    plan = scheduler.slo_planner.plan

    def others(view: Any) -> Any:
        found = plan(view)
        registry = scheduler.slo_registry.reqs
        found.prefill[:] = [(row, n) for row, n in found.prefill if registry[row].rid != rid]
        return found

    return others
