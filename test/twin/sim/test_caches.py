"""Caches other than the plain radix tree, in the twin: SGLang's own trees and pools, with ample KV and with short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from invariants import Watched
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import Workload, load_workload

NO_TREE = ["--disable-radix-cache"]


def ample() -> Workload:
    """Chat, code and long batch work, with no prompt like another."""
    return load_workload("mix-generated", max_requests=60)


def crowded(name: str = "reason-generated", kv_tokens: int = 12_000, load: float = 4.0) -> Workload:
    """Outputs that do not fit the KV pool together."""
    workload = load_workload(name, max_requests=40, load=load)
    profile = replace(workload.profile, kv_capacity_tokens=kv_tokens)
    return replace(workload, profile=profile, declared_max_new_tokens=None)


def served(workload: Workload, argv: list[str]) -> RunResult:
    """The run, with every request served, no iteration left to stock scheduling, and every invariant held."""
    result = driver.run(workload, "slo", argv, watcher=Watched)
    assert result.requests.finished.all() and not result.fallbacks
    return result


@pytest.mark.parametrize("workload", [ample, crowded])
def test_without_a_tree_as_many_are_served_in_time_as_with_one_where_no_prompt_is_like_another(
    workload: object,
) -> None:
    load = workload()  # type: ignore[operator]
    assert abs(served(load, NO_TREE).attainment - served(load, []).attainment) <= 0.03


HOST = ["--enable-hierarchical-cache", "--hicache-ratio", "2"]


def talks() -> Workload:
    """Agents whose prompts begin with what they were told before, on a device that holds too little of it."""
    workload = load_workload("agent-generated", max_requests=60)
    return replace(workload, profile=replace(workload.profile, kv_capacity_tokens=60_000))


@pytest.mark.parametrize("workload", [ample, crowded, talks])
def test_with_a_hierarchical_cache_everyone_is_served_and_nothing_waits_for_ever(workload: object) -> None:
    """Where KV is short, what is being copied to the host is locked: whoever waits for it has to get it in the end."""
    served(workload(), HOST)  # type: ignore[operator]


def test_a_hierarchical_cache_saves_computing() -> None:
    with_host, without = served(talks(), HOST), served(talks(), [])
    assert with_host.attainment >= without.attainment
    assert with_host.prefill_tokens < without.prefill_tokens
