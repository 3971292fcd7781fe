"""When KV runs short and how a request is preempted: the properties that hold for every input."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core.kv import preemption
from sglang_slo.core.kv.preemption import Costs, PreemptMode
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.steps import PLAIN

relaxed = settings(deadline=None)


def _model(c_attn: float = 1e-9, bytes_per_s: float = 25e9, overhead_s: float = 5e-4) -> LatencyModel:
    c = Coefficients(2e-3, 1e-3, 5e-5, c_attn, 2e-3, 1e-8)
    return LatencyModel(
        c, swap_bytes_per_s=bytes_per_s, swap_overhead_s=overhead_s, kv_bytes_per_token=131072
    )


@relaxed
@given(st.integers(1, 20000), st.integers(0, 20000), st.integers(0, 20000), st.integers(0, 20000))
def test_keeping_never_costs_more_than_computing_again(
    context: int, shared: int, cached: int, room: int
) -> None:
    shared, cached = min(shared, context), min(cached, context)
    costs = preemption.costs(_model(), context, shared, cached, room, host_room=0)
    assert 0 <= costs.keep_s <= costs.recompute_s
    assert math.isinf(costs.swap_s)


def test_a_copy_that_will_be_lost_whole_is_worth_nothing() -> None:
    costs = preemption.costs(_model(), 1000, 0, 400, room=0, host_room=0)
    assert costs.keep_s == costs.recompute_s
    assert preemption.preempt_mode(costs, "auto") is PreemptMode.RECOMPUTE


@relaxed
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_auto_takes_the_cheapest_way(keep: float, swap: float, recompute: float) -> None:
    costs = Costs(keep, swap, recompute)
    way = preemption.preempt_mode(costs, "auto")
    assert getattr(costs, f"{way.value}_s") == min(keep, swap, recompute)


def test_a_mode_is_obeyed_and_a_full_host_means_recompute() -> None:
    assert preemption.preempt_mode(Costs(0, 1, 9), "recompute") is PreemptMode.RECOMPUTE
    assert preemption.preempt_mode(Costs(9, 9, 0), "keep") is PreemptMode.KEEP
    assert preemption.preempt_mode(Costs(0, 9, 0), "swap") is PreemptMode.SWAP
    assert preemption.preempt_mode(Costs(0, math.inf, 9), "swap") is PreemptMode.RECOMPUTE


def test_a_mode_that_is_wrong_for_a_request_is_never_taken() -> None:
    costs = Costs(1, 2, 3)
    assert preemption.preempt_mode(costs.among(False, True, False), "keep") is PreemptMode.SWAP
    assert preemption.preempt_mode(costs.among(True, False, False), "recompute") is PreemptMode.KEEP
    assert preemption.preempt_mode(costs.among(False, False, True), "auto") is PreemptMode.RECOMPUTE


@relaxed
@given(st.floats(0, 1e-7), st.floats(1e9, 1e11), st.floats(0, 1e-2))
def test_swap_and_recompute_cost_the_same_at_the_crossing(
    c_attn: float, rate: float, overhead: float
) -> None:
    model = _model(c_attn, rate, overhead)
    n = preemption.crossing_tokens(model)
    if math.isinf(n):
        assert preemption.swap_s(model, 10**6) >= model.prefill_s(0, 10**6)
        return
    swap = 2 * (overhead + n * model.kv_bytes_per_token / rate)
    assert math.isclose(swap, 5e-5 * n + c_attn * n * n / 2, rel_tol=1e-6, abs_tol=1e-9)
    beyond = int(n) + 2
    assert preemption.swap_s(model, beyond) <= model.prefill_s(0, beyond)


@relaxed
@given(st.lists(st.integers(0, 9999), max_size=50), st.integers(1, 64))
def test_growth_is_at_least_one_and_at_most_the_horizon_each(remaining: list[int], iterations: int) -> None:
    left = np.array(remaining, np.int64)
    growth = PLAIN.growth_tokens(np.zeros_like(left), left, left, iterations).sum()
    assert len(remaining) <= growth <= len(remaining) * iterations


def test_longer_copies_are_begun_earlier_within_a_bound() -> None:
    leads = [preemption.lead_iterations(s, 0.02) for s in (0.0, 0.01, 0.05, 9.0)]
    assert leads == [1, 2, 4, preemption.LONGEST_LEAD]
