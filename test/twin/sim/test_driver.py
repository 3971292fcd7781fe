"""The twin as a whole: deterministic, blind to true lengths, sound in every iteration, for stock and ours."""

from __future__ import annotations

import gc
import itertools
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import AbortReq

from invariants import Watched
from sglang_slo.runtime.scheduler.rank_sync import Tick
from sglang_slo.twin.compare import PARTS
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.sim import driver
from sglang_slo.twin.sim.recorder import request_number
from sglang_slo.twin.workloads.workload import Workload, load_workload

BOTH = pytest.mark.parametrize("scheduler", driver.SCHEDULERS)
MIXED = ["--enable-mixed-chunk", "--chunked-prefill-size", "512"]


def small(name: str, requests: int = 60, **kwargs: float) -> Workload:
    return load_workload(f"{name}-generated", max_requests=requests, **kwargs)  # type: ignore[arg-type]


def crowded(requests: int = 40, load: float = 4.0) -> Workload:
    """Outputs that do not fit the KV pool together: admission is wrong and somebody has to go."""
    workload = small("reason", requests, load=load)
    profile = replace(workload.profile, kv_capacity_tokens=12_000)
    return replace(workload, profile=profile, declared_max_new_tokens=None)


@BOTH
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(scheduler: str) -> None:
    first = driver.run(small("mix"), scheduler, MIXED).to_json(wall=False)
    again = driver.run(small("mix"), scheduler, MIXED).to_json(wall=False)
    other = driver.run(small("mix", seed=8), scheduler, MIXED).to_json(wall=False)
    assert first == again
    assert first != other


@BOTH
@pytest.mark.parametrize("workload", ["mix", "agent", "chat70b", "crowded"])
def test_invariants_hold_in_every_iteration(scheduler: str, workload: str) -> None:
    before = Watched.checked
    load = crowded() if workload == "crowded" else small(workload)
    result = driver.run(load, scheduler, ["--schedule-conservativeness", "0.1"], watcher=Watched)
    assert Watched.checked - before >= len(result.iterations.start_s)
    assert result.requests.finished.all()


def test_collecting_walks_no_imports_however_many_runs_there_were() -> None:
    driver.run(small("mix", 20), "slo", [])
    assert gc.get_freeze_count() > len(gc.get_objects())


@pytest.mark.parametrize("predictor", ["xgboost", "mean", "none", "oracle", "noisy"])
def test_everyone_is_served_whatever_predicts(predictor: str) -> None:
    result = driver.run(replace(small("mix", 20), predictor=predictor), "slo", [])
    assert result.requests.finished.all()
    assert not result.fallbacks


@pytest.mark.parametrize("part", PARTS)
def test_with_each_part_switched_off_everyone_is_served_and_the_device_never_waits(part: str) -> None:
    result = driver.run(small("mix", 20), "slo", list(PARTS[part]))
    assert result.requests.finished.all()
    assert not result.fallbacks
    assert _idle_s(result) < 1e-9


def _idle_s(result: RunResult) -> float:
    """Virtual seconds in which the device had nothing to do though somebody was there to be served."""
    passes, requests = result.iterations, result.requests
    begins, ends = (passes.start_s + passes.duration_s)[:-1], passes.start_s[1:]
    there = (requests.arrival_s <= begins[:, None]) & (requests.end_s >= ends[:, None])
    return float((ends - begins)[there.any(axis=1)].sum())


class Leaving(Watched):
    """Every so often a client gives up, with preference for those whose request is off the device."""

    left: set[str]  # requests aborted where no token could be on its way
    last: Any  # the scheduler
    chance: random.Random

    @classmethod
    def begin(cls, seed: int) -> None:
        cls.left, cls.last, cls.chance = set(), None, random.Random(seed)

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        Leaving.last = self
        if Leaving.chance.random() < 0.02:
            away = [req.rid for req in self.slo_preempt.alive()]
            there = away or [req.rid for req in self._holders() if not req.finished()]
            if there:
                rid = Leaving.chance.choice(sorted(there))
                at = next((i for i, r in enumerate(recv_reqs) if isinstance(r, Tick)), len(recv_reqs))
                recv_reqs.insert(at, AbortReq(rid=rid))  # as SGLang: all whose id begins so
                Leaving.left |= {r for r in away if r.startswith(rid)}
        super().process_input_requests(recv_reqs)


@pytest.mark.parametrize("way", ["swap", "auto"])
def test_invariants_hold_while_clients_leave_and_nothing_is_left_in_the_pools(way: str) -> None:
    """SGLANG_SLO_TEST_REQUESTS makes it longer, at a load that the pool just bears: else ever more would wait."""
    longer = int(os.environ.get("SGLANG_SLO_TEST_REQUESTS", "0"))
    flags = ["--slo-preempt", way, "--slo-host-kv-gb", "1", "--slo-max-preemptions", "8"]
    Leaving.begin(seed=1)
    load = crowded(longer, load=1.5) if longer else crowded(120)
    result = driver.run(load, "slo", flags, watcher=Leaving)
    s = Leaving.last
    assert s.slo_preempt.counts["swap"] > 0 and Leaving.left
    assert not any(result.requests.finished[request_number(rid)] for rid in Leaving.left)
    free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
    assert free == s.max_total_num_tokens
    assert len(s.req_to_token_pool.free_slots) == s.req_to_token_pool.size
    assert s.slo_preempt.idle and s.slo_preempt.line.pool.used_tokens == 0
    assert not s.slo_registry.reqs and s.slo_observer.trouble.count == 0


def test_a_crowded_pool_makes_stock_retract_and_the_recompute_is_counted() -> None:
    result = driver.run(crowded(), "stock", ["--schedule-conservativeness", "0.1"])
    assert result.retractions > 0
    assert result.recompute_tokens > 0
    # Each return also takes in one token that the model had not seen: the newest of its output.
    new = result.requests.input_tokens.sum() + result.retractions
    assert result.prefill_tokens == new + result.recompute_tokens


@BOTH
def test_hidden_lengths_change_no_decision_until_they_are_passed(scheduler: str) -> None:
    """Two worlds that differ in what will come are treated alike as long as nothing that came differs."""
    one, two = worlds_that_differ_in_what_will_come(scheduler, None)
    assert len(one) > 100
    assert one == two


def test_a_scheduler_that_peeks_is_caught() -> None:
    class Peeking:
        def get_next_batch_to_run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            total = self.twin_recorder._true_total
            self.waiting_queue.sort(key=lambda req: total[int(req.rid[1:])])
            return super().get_next_batch_to_run(*args, **kwargs)

    one, two = worlds_that_differ_in_what_will_come("stock", Peeking)
    assert one != two


def worlds_that_differ_in_what_will_come(
    scheduler: str, watcher: type | None
) -> list[list[tuple[float, ...]]]:
    """The iterations of two runs up to the first end of a request in either."""
    workload = replace(small("mix", 50, load=3.0), declared_max_new_tokens=2000)
    rng = np.random.default_rng(1)
    runs = [
        driver.run(
            replace(workload, output_tokens=rng.integers(80, 900, 50)), scheduler, MIXED, watcher=watcher
        )
        for _ in range(2)
    ]
    split = min(run.requests.end_s.min() for run in runs)
    return [before(run, split) for run in runs]


def before(result: RunResult, time_s: float) -> list[tuple[float, ...]]:
    """The iterations that were planned before anything of `time_s` could be known."""
    its = result.iterations
    columns = (its.start_s, its.duration_s, its.new_tokens, its.prefills, its.decodes, its.context_tokens)
    rows = itertools.takewhile(lambda row: row[0] + row[1] < time_s, zip(*columns, strict=True))
    return [tuple(float(v) for v in row) for row in rows]


@BOTH
def test_every_token_comes_out_and_none_before_its_pass_has_ended(scheduler: str) -> None:
    workload = small("chat70b")
    result = driver.run(workload, scheduler, MIXED)
    rows, its = result.requests, result.iterations
    ends = its.start_s + its.duration_s
    assert rows.finished.all()
    # First tokens appear at the end of a pass plus the time to process its result, never in between.
    _, process_s = driver.VirtualEngine(workload.on)._schedule_s, 1e-4
    for first in rows.arrival_s + rows.ttft_s:
        assert np.abs(ends + process_s - first).min() < 2e-3
    assert (rows.ttft_s > 0).all()
    # Passes do not overlap on the one device.
    assert (its.start_s[1:] >= ends[:-1] - 1e-9).all()


def test_shared_prefixes_are_found_by_the_radix_cache() -> None:
    result = driver.run(small("agent", 80), "stock")
    assert result.requests.cached_tokens.sum() > 0.1 * result.requests.input_tokens.sum()
    plain = driver.run(small("mix"), "stock")
    assert plain.requests.cached_tokens.sum() == 0


def test_stock_is_stock_whatever_our_settings_say() -> None:
    plain = driver.run(small("mix", 40), "stock")
    tuned = driver.run(small("mix", 40), "stock", ["--slo-chunk", "fixed"], name=plain.scheduler)
    assert plain.measures()["iterations"] == tuned.measures()["iterations"]
    assert (plain.requests.end_s == tuned.requests.end_s).all()


def test_small_chunks_in_mixed_batches_keep_gaps_that_the_defaults_break() -> None:
    """What the reference figures show on the real traces, in small: a known relation, not a known number."""
    default = driver.run(small("mix", 150), "stock")
    mixed = driver.run(small("mix", 150), "stock", MIXED)
    ours = driver.run(small("mix", 150), "slo")
    assert default.attainment + 0.1 < mixed.attainment < ours.attainment
    assert ours.measures()["gap_attainment"] > 0.99


def test_an_unknown_flag_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.run(small("mix", 5), "stock", ["--chunked-prefil-size", "5"])
    assert "--chunked-prefil-size" in capsys.readouterr().err
