"""Sliding windows in SGLang's own pools and tree: all are served, no pool leaks, and limits are kept as without."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from crowded_pool import crowded
from invariants import Watched, check_nothing_left
from sglang_slo.runtime.sglang import pools
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.workloads.workload import Workload, load_workload

pytestmark = pytest.mark.skipif(not pools.WINDOWS, reason="runs on stock scheduling there")


def model(window: int) -> dict[str, Any]:
    """A layer that looks back over `window` tokens, as gpt-oss's do, and one that looks back over all."""
    return {
        "num_hidden_layers": 2,
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1, 0],
        "sliding_window": window,
        "sliding_window_size": window,
    }


class Closely(Watched):
    """`Watched`, with single slots looked at more often, and the least that was free of each pool."""

    thorough_every = 10
    last: Any = None  # the scheduler
    least = 1 << 40  # free in the window's pool, tokens

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        Closely.last = self
        Closely.least = min(Closely.least, self.slo_ports.kv.window_free_tokens())
        super().process_input_requests(recv_reqs)


def run(workload: Workload, window: int, ratio: float, *flags: str) -> tuple[RunResult, Counter[str]]:
    """A run in which every invariant of each pool holds in every iteration, and its preemptions by way."""
    Closely.least = 1 << 40
    argv = ["--swa-full-tokens-ratio", str(ratio), *flags]
    result = driver.run(workload, "slo", argv, watcher=Closely, model=model(window))
    s = Closely.last
    assert s.slo_on and s.is_hybrid_swa
    assert result.requests.finished.all() and not result.fallbacks
    assert s.slo_observer.trouble.count == 0
    check_nothing_left(s)
    return result, s.slo_preempt.counts


def ample() -> Workload:
    return load_workload("mix-generated", max_requests=60)


@functools.cache
def with_full_attention() -> float:
    return driver.run(ample(), "slo").attainment


@pytest.mark.parametrize("page", [1, 64])
def test_with_ample_kv_limits_are_kept_as_with_full_attention(page: int) -> None:
    result, preempted = run(ample(), 128, 0.8, "--page-size", str(page))
    assert not preempted.total()
    assert abs(result.attainment - with_full_attention()) <= 0.03


@pytest.mark.parametrize("page", [1, 16])
def test_with_the_windows_pool_short_all_are_served_and_nobody_is_left_to_sglang(page: int) -> None:
    """Tokens are ample: the window's pool alone says who may enter and who has to leave."""
    _, preempted = run(crowded(8192), 128, 0.12, "--page-size", str(page))
    assert Closely.least < 400
    assert not preempted["stock"]


@pytest.mark.parametrize("way", ["keep", "recompute"])
def test_with_both_pools_short_each_way_out_and_back_is_taken(way: str) -> None:
    bold = ("--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-max-preemptions", "8")
    _, preempted = run(crowded(3072), 64, 0.4, "--slo-preempt", way, *bold)
    assert preempted[way] > 0


def test_prefixes_are_found_where_their_windows_are_still_there() -> None:
    workload = load_workload("agent-generated", max_requests=40)
    workload = replace(workload, profile=replace(workload.profile, kv_capacity_tokens=60_000))
    result, _ = run(workload, 1024, 0.2)
    assert result.requests.cached_tokens.sum() > 0


def test_deadlines_are_kept_that_stock_scheduling_misses() -> None:
    stock = driver.run(ample(), "stock", ["--swa-full-tokens-ratio", "0.8"], model=model(128))
    assert stock.attainment < 0.3
    assert run(ample(), 128, 0.8)[0].attainment >= 3 * stock.attainment


def test_nothing_is_swapped_where_a_copy_would_have_one_pools_kv(caplog: pytest.LogCaptureFixture) -> None:
    _, preempted = run(crowded(3072), 64, 0.4, "--slo-host-kv-gb", "4")
    assert not preempted["swap"] and Closely.last.slo_preempt.line is None
    assert "--slo-host-kv-gb has no effect" in caplog.text
