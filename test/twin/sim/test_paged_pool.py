"""KV in pages, in SGLang's own allocator and tree: all are served, nothing leaks, and limits are kept as at page size 1."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest

from crowded_pool import crowded
from invariants import Watched, check_nothing_left
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import Workload, load_workload

SIZES = pytest.mark.parametrize("page", [16, 64, 128])
BOLD = ["--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-max-preemptions", "8"]


class Closely(Watched):
    """`Watched`, with single pages and locks looked at more often."""

    thorough_every = 10
    last: Any = None  # the scheduler

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        Closely.last = self
        super().process_input_requests(recv_reqs)


def run(workload: Workload, page: int, *flags: str) -> tuple[RunResult, Counter[str]]:
    """A run in which every invariant holds in every iteration, and its preemptions by way."""
    result = driver.run(workload, "slo", ["--page-size", str(page), *flags], watcher=Closely)
    s = Closely.last
    assert s.page_size == page and s.slo_on
    assert result.requests.finished.all() and not result.fallbacks
    assert s.slo_observer.trouble.count == 0
    check_nothing_left(s)
    return result, s.slo_preempt.counts


@functools.cache
def at_page_size_one(name: str, requests: int) -> float:
    return driver.run(load_workload(name, max_requests=requests), "slo").attainment


@SIZES
def test_with_ample_kv_limits_are_kept_as_at_page_size_one(page: int) -> None:
    name, requests = "mix-generated", 100
    result, preempted = run(load_workload(name, max_requests=requests), page)
    assert not preempted.total()
    assert abs(result.attainment - at_page_size_one(name, requests)) <= 0.03


@SIZES
@pytest.mark.parametrize("way", ["swap", "keep", "recompute"])
def test_with_kv_short_each_way_out_and_back_is_taken(page: int, way: str) -> None:
    _, preempted = run(crowded(), page, *BOLD, "--slo-preempt", way, "--slo-host-kv-gb", "4")
    assert preempted[way] > 0
    if way == "swap":
        assert Closely.last.slo_preempt.swap_ins == preempted["swap"]


@SIZES
@pytest.mark.parametrize("rule", ["forecast", "full"])
def test_with_kv_short_our_own_admission_holds(page: int, rule: str) -> None:
    _, preempted = run(crowded(), page, "--slo-kv", rule, "--slo-host-kv-gb", "4")
    assert not preempted["stock"]  # nobody is left to SGLang's retraction


@SIZES
def test_cached_prefixes_are_found_in_whole_pages(page: int) -> None:
    result, _ = run(load_workload("agent-generated", max_requests=40), page)
    cached = result.requests.cached_tokens
    assert cached.sum() > 0 and not (cached % page).any()


@SIZES
def test_without_a_prefix_cache_all_are_served(page: int) -> None:
    flags = ("--disable-radix-cache", *BOLD, "--slo-preempt", "swap", "--slo-host-kv-gb", "4")
    _, preempted = run(crowded(), page, *flags)
    assert preempted["swap"] > 0 and not preempted["keep"]
