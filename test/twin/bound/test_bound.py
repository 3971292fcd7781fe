"""The bound: never below what any schedule reaches, and not needlessly far above it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_scheduler import best_attained, some_schedule

from sglang_slo.core.latency import Coefficients
from sglang_slo.core.slo import Slo
from sglang_slo.twin.bound.least_work import Jobs
from sglang_slo.twin.bound.relaxation import most_attained
from sglang_slo.twin.bound.upper_bound import bound, jobs_of
from sglang_slo.twin.workloads.workload import load_workload

DEVICE = Coefficients(t0_extend=0.0, t0_decode=0.0, c_tok=1.0, c_attn=0.0, w=0.0, c_kv=0.0)


def make_jobs(
    rows: list[tuple[float, int, int, float, float]],
    device: Coefficients = DEVICE,
    capacity: int = 1000,
    blocks: list[tuple[int, ...] | None] | None = None,
    gaps_per_exception: int | None = None,
) -> Jobs:
    """Jobs of (arrival s, input tokens, output tokens, TTFT limit s, TBT limit s); blocks of 2 tokens."""
    rows = sorted(rows)
    return Jobs(
        arrival_s=np.array([r[0] for r in rows], float),
        input_tokens=np.array([r[1] for r in rows], np.int64),
        output_tokens=np.array([r[2] for r in rows], np.int64),
        limits=[Slo(r[3], r[4]) for r in rows],
        blocks=blocks or [None] * len(rows),
        block_tokens=2,
        device=device,
        kv_capacity_tokens=capacity,
        gaps_per_exception=gaps_per_exception,
    )


small = st.integers(0, 8).map(lambda k: k / 4)
devices = st.builds(
    Coefficients,
    small,
    small,
    small,
    st.sampled_from([0.0, 0.25]),
    small,
    st.sampled_from([0.0, 0.25]),
    small,
)
limits = st.one_of(st.integers(1, 24).map(lambda k: k / 2), st.just(math.inf))
requests = st.tuples(st.integers(0, 6).map(float), st.integers(1, 4), st.integers(1, 3), limits, limits)
paths = st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=2, max_size=2).map(lambda p: (0, *p)))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(requests, paths), min_size=1, max_size=3),
    devices,
    st.integers(4, 20),
    st.sampled_from([None, "paced", 1, 2, 3]),
    small,
    small,
)
def test_no_schedule_of_a_tiny_workload_exceeds_the_bound(
    rows: list[tuple[tuple[float, int, int, float, float], tuple[int, ...] | None]],
    device: Coefficients,
    capacity: int,
    rule: int | str | None,
    before_s: float,
    after_s: float,
) -> None:
    rows.sort(key=lambda row: row[0])
    exceptions = rule if isinstance(rule, int) else None
    jobs = make_jobs([r for r, _ in rows], device, capacity, [p for _, p in rows], exceptions)
    jobs = replace(jobs, paced=rule == "paced", before_s=before_s, after_s=after_s)
    assert best_attained(jobs) <= most_attained(jobs).attained


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_limits_that_a_schedule_just_kept_are_attained_by_all(seed: int) -> None:
    rng = random.Random(seed)

    device = Coefficients(
        *(rng.choice([0.0, 0.5, 1.0]) for _ in range(3)),
        rng.choice([0.0, 0.25]),
        rng.choice([0.0, 1.0]),
        0.25,
        rng.choice([0.0, 0.5]),
    )
    rows = sorted(
        (float(rng.randint(0, 6)), rng.randint(1, 9), rng.randint(1, 4), math.inf, math.inf)
        for _ in range(rng.randint(1, 4))
    )
    n = len(rows)
    paths = [(0, rng.randint(0, 1), rng.randint(0, 1), i) if rng.random() < 0.8 else None for i in range(n)]
    capacity = max(r[1] + r[2] for r in rows) + rng.randint(0, 20)
    jobs = make_jobs(rows, device, capacity, paths, rng.choice([None, 1, 2, 3]))
    jobs = replace(jobs, block_tokens=4, before_s=rng.choice([0.0, 0.5]), after_s=rng.choice([0.0, 0.5]))
    kept = []
    for i, (ttft_s, gaps) in enumerate(some_schedule(jobs, rng)):
        judged = sorted(gaps)[: len(gaps) - jobs.exceptions(i)]
        kept.append(Slo(ttft_s, max(judged, default=math.inf)))
    assert most_attained(replace(jobs, limits=kept)).attained == len(rows)


def test_a_device_busy_with_one_cannot_attain_two() -> None:
    jobs = make_jobs([(0, 4, 1, 5.0, math.inf)] * 2)
    assert most_attained(jobs).attained == best_attained(jobs) == 1


def test_of_many_short_and_one_long_the_short_are_counted() -> None:
    # Moore: the long one alone would cost three short ones.
    jobs = make_jobs([(0, 3, 1, 4.0, math.inf)] + [(0, 1, 1, 4.0, math.inf)] * 4)
    assert most_attained(jobs).attained == 4


def test_a_shared_prefix_is_charged_once() -> None:
    rows = [(0.0, 5, 1, 7.0, math.inf)] * 2
    apart = make_jobs(rows, blocks=[(0, 1, 2, 3), (0, 4, 5, 6)])
    together = make_jobs(rows, blocks=[(0, 1, 2, 3), (0, 1, 2, 6)])
    assert most_attained(apart).attained == 1
    assert most_attained(together).attained == best_attained(together) == 2


def test_a_prefix_that_someone_lost_may_have_computed_is_free_before_he_is_due() -> None:
    # The first comer has no chance, but what it leaves in the cache helps the second.
    rows = [(0.0, 5, 1, 0.5, math.inf), (4.0, 5, 1, 2.0, math.inf)]
    jobs = make_jobs(rows, blocks=[(0, 1, 2, 3), (0, 1, 2, 6)])
    assert most_attained(jobs).attained == best_attained(jobs) == 1


def test_kv_that_holds_one_does_not_attain_two_that_never_pause() -> None:
    device = replace(DEVICE, c_tok=0.0, t0_extend=1.0, t0_decode=1.0)
    jobs = make_jobs([(0, 8, 9, 1.0, 1.0)] * 2, device, capacity=17)
    assert most_attained(jobs).attained == 1
    assert most_attained(replace(jobs, kv_capacity_tokens=34)).attained == 2


def test_one_long_gap_in_a_hundred_frees_the_tokens_from_their_deadlines() -> None:
    device = replace(DEVICE, c_tok=0.0, t0_extend=1.0, t0_decode=1.0)
    jobs = make_jobs([(0, 8, 101, 1.0, 1.0)] * 2, device, capacity=109)
    assert most_attained(jobs).attained == 1
    assert most_attained(replace(jobs, gaps_per_exception=100)).attained == 2


def test_limits_below_a_lone_pass_are_hopeless() -> None:
    device = replace(DEVICE, t0_extend=1.0, t0_decode=1.0)
    jobs = make_jobs(
        [(0, 4, 2, 4.9, math.inf), (0, 4, 2, math.inf, 1.9), (0, 4, 2, math.inf, math.inf)], device
    )
    solved = most_attained(jobs)
    assert (solved.attained, solved.hopeless) == (1, 2)


@pytest.mark.parametrize(
    "name", ["mix-generated", "reason-generated", "agent-generated", "chat70b-generated"]
)
def test_the_rule_that_judges_every_gap_is_never_above_the_other(name: str) -> None:
    workload = load_workload(name, load=2.0, max_requests=120)
    assert bound(workload, "every").attainment <= bound(workload, "p99").attainment


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="rule: need one of every, paced, p99"):
        jobs_of(load_workload("mix-generated", max_requests=5), "median")


@pytest.mark.parametrize(("name", "scheduler"), [("mix-generated", "slo"), ("agent-generated", "stock")])
def test_the_real_schedulers_stay_within_the_bound(name: str, scheduler: str) -> None:
    command = [sys.executable, "-m", "sglang_slo.twin", "run", "--workload", name, "--scheduler", scheduler]
    done = subprocess.run(
        [*command, "--load", "4", "--max-requests", "60", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    workload = load_workload(name, load=4.0, max_requests=60)
    assert json.loads(done.stdout)["attainment"] <= bound(workload).attainment + 1e-9
