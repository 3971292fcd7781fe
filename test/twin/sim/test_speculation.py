"""Speculative decoding in SGLang's own batches, KV and relays: all are served, limits are kept, and nothing leaks."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crowded_pool import crowded
from invariants import Watched, check_nothing_left, page_tokens
from sglang_slo.runtime.sglang import kv, speculation
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.sim.speculation import Acceptance
from sglang_slo.twin.workloads.workload import Workload, load_workload

pytestmark = pytest.mark.skipif(not speculation.COVERED, reason="stock scheduling on this SGLang")

CHAIN = [
    "--speculative-num-steps",
    "3",
    "--speculative-eagle-topk",
    "1",
    "--speculative-num-draft-tokens",
    "4",
]
EAGLE = ["--speculative-algorithm", "EAGLE", *CHAIN]
ALGORITHMS = {
    "EAGLE": EAGLE,
    "STANDALONE": ["--speculative-algorithm", "STANDALONE", *CHAIN],
    "NGRAM": ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "8"],
}
BOLD = ["--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-max-preemptions", "8"]


class Closely(Watched):
    """`Watched`, with single pages and locks looked at more often, and with what SGLang asks for the next step."""

    thorough_every = 10
    last: Any = None  # the scheduler
    mixed = 0  # batches of prefill and decodes

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        Closely.last = self
        super().process_input_requests(recv_reqs)

    def get_new_batch_prefill(self: Any, running_batch: Any) -> Any:
        if getattr(self, "slo_on", False):
            self._next_step_is_foreseen(running_batch)
        return super().get_new_batch_prefill(running_batch)  # type: ignore[misc]

    def _next_step_is_foreseen(self: Any, running_batch: Any) -> None:
        live = [place for place, req in enumerate(running_batch.reqs) if not req.finished()]
        reqs = [running_batch.reqs[place] for place in live]
        table, rows = self.slo_registry.table, self.slo_registry.rows(reqs)
        counts, left = (kv.slot_counts(reqs), kv.computed_counts(reqs)), table.remaining_tokens[rows]
        ours = table.step.growth_tokens(*counts, left, 1, table.tokens_per_step, page_tokens(self)).sum()
        assert ours == (running_batch.new_tokens_required_next_decode(live) if live else 0)

    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        Closely.mixed += bool(batch.forward_mode.is_extend() and batch.decoding_reqs)
        return super().run_batch(batch, *args, **kwargs)  # type: ignore[misc]


def run(workload: Workload, *flags: str) -> tuple[RunResult, Counter[str]]:
    """A run in which every invariant holds in every iteration, and its preemptions by way."""
    Closely.mixed = 0
    result = driver.run(workload, "slo", list(flags), watcher=Closely)
    s = Closely.last
    assert s.slo_on and not s.spec_algorithm.is_none()
    assert result.requests.finished.all() and not result.fallbacks
    assert s.slo_observer.trouble.count == 0
    check_nothing_left(s)
    return result, s.slo_preempt.counts


def ample(acceptance: float = 0.6, requests: int = 60) -> Workload:
    return replace(load_workload("mix-generated", max_requests=requests), acceptance=acceptance)


@functools.cache
def attainment(scheduler: str, *flags: str, requests: int = 60) -> float:
    return driver.run(ample(requests=requests), scheduler, list(flags)).attainment


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_limits_are_kept_as_without_speculation(algorithm: str) -> None:
    result, preempted = run(ample(requests=150), *ALGORITHMS[algorithm])
    assert not preempted.total()
    mixes = algorithm == "EAGLE"  # the others' decodes SGLang cannot mix
    without = attainment("slo", *([] if mixes else ["--slo-mix", "never"]), requests=150)
    assert result.attainment >= without - 0.03
    assert bool(Closely.mixed) == mixes


def test_where_stock_keeps_few_limits_ours_keeps_three_times_as_many() -> None:
    stock = attainment("stock", *EAGLE)
    assert stock < 0.3 and attainment("slo", *EAGLE) >= 3 * stock


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_whether_no_draft_or_every_draft_is_accepted_all_are_served(acceptance: float) -> None:
    # beside prefill a decode gives one token whatever is accepted
    result, _ = run(ample(acceptance), *EAGLE, "--slo-mix", "never")
    each = Closely.last.slo_registry.table.tokens_per_step
    assert each == 1.0 if acceptance == 0.0 else each > 3.0
    assert result.attainment >= 0.6


@pytest.mark.parametrize(
    "flags", [EAGLE, [*EAGLE, "--page-size", "64"], ALGORITHMS["NGRAM"]], ids=["1", "64", "ngram"]
)
@pytest.mark.parametrize("rule", ["forecast", "full"])
def test_with_kv_short_our_own_admission_holds(flags: list[str], rule: str) -> None:
    _, preempted = run(crowded(), *flags, "--slo-kv", rule)
    assert not preempted["stock"]  # nobody is left to SGLang's retraction


@pytest.mark.parametrize("page", ["1", "64"])
@pytest.mark.parametrize("way", ["keep", "recompute"])
def test_with_kv_short_each_way_out_and_back_is_taken(page: str, way: str) -> None:
    _, preempted = run(crowded(), *EAGLE, *BOLD, "--page-size", page, "--slo-preempt", way)
    assert preempted[way] > 0


def test_without_overlap_all_are_served() -> None:
    run(crowded(), *EAGLE, "--disable-overlap-schedule")


def test_without_a_prefix_cache_all_are_served() -> None:
    run(crowded(), *EAGLE, "--disable-radix-cache", "--page-size", "16")


def test_cached_prefixes_are_found() -> None:
    result, _ = run(load_workload("agent-generated", max_requests=40), *EAGLE)
    assert result.requests.cached_tokens.sum() > 0


def test_no_kv_goes_to_the_host_alone() -> None:
    """The draft model's would stay behind. A server does not start so; an engine leaves it out and says so."""
    _, preempted = run(crowded(), *EAGLE, *BOLD, "--slo-preempt", "swap", "--slo-host-kv-gb", "4")
    assert not preempted["swap"] and preempted["recompute"] > 0


def test_bursts_depend_on_the_request_and_its_place_alone() -> None:
    lots = Acceptance(ample())
    requests, lengths = np.arange(50), np.arange(50) * 37 + 5
    both = lots.tokens(requests, lengths, 4)
    assert set(both.tolist()) == {1, 2, 3, 4}
    assert (lots.tokens(requests[::-1], lengths[::-1], 4)[::-1] == both).all()
    assert (Acceptance(ample(0.0)).tokens(requests, lengths, 4) == 1).all()
    assert (Acceptance(ample(1.0)).tokens(requests, lengths, 4) == 4).all()
