"""Who is preempted, how, and when it must be back: the properties that hold for every input."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core import preemption
from sglang_slo.core.attainment import p99_s
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.preemption import Costs, Turn, WayOut
from sglang_slo.core.slo import BEST_EFFORT_BUCKET

relaxed = settings(deadline=None)


def _model(c_attn: float = 1e-9, bytes_per_s: float = 25e9, overhead_s: float = 5e-4) -> LatencyModel:
    c = Coefficients(2e-3, 1e-3, 5e-5, c_attn, 2e-3, 1e-8)
    return LatencyModel(
        c, swap_bytes_per_s=bytes_per_s, swap_overhead_s=overhead_s, kv_bytes_per_token=131072
    )


def _order(rows: list[tuple[int, int, int, int]], allowed: list[bool] | None = None) -> list[int]:
    """Victim order of (bucket, remaining, held, seq) tuples."""
    columns = [np.array(c, np.int64) for c in zip(*rows, strict=True)]
    everyone = np.ones(len(rows), bool) if allowed is None else np.array(allowed)
    return preemption.victim_order(*columns, everyone).tolist()


requests = st.lists(
    st.tuples(st.integers(0, 31), st.integers(0, 4096), st.integers(1, 4096)), min_size=1, max_size=30
).map(lambda rows: [(*row, i) for i, row in enumerate(rows)])


def test_loosest_then_longest_then_smallest_then_latest_leaves_first() -> None:
    assert _order([(1, 99, 9, 0), (2, 10, 9, 1)]) == [1, 0]
    assert _order([(1, 64, 9, 0), (1, 1024, 9, 1)]) == [1, 0]
    assert _order([(1, 100, 5, 0), (1, 101, 9, 1)]) == [0, 1]
    assert _order([(1, 100, 9, 0), (1, 100, 9, 1)]) == [1, 0]


@relaxed
@given(requests)
def test_order_does_not_depend_on_the_batchs_order(rows: list[tuple[int, int, int, int]]) -> None:
    shuffled = rows[::-1]
    assert [rows[i] for i in _order(rows)] == [shuffled[i] for i in _order(shuffled)]


@relaxed
@given(requests, st.data())
def test_the_disallowed_never_leave_and_the_allowed_all_can(
    rows: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    allowed = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    assert sorted(_order(rows, allowed)) == [i for i, ok in enumerate(allowed) if ok]


@relaxed
@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(-5, 2500))
def test_no_victim_more_than_needed(freed: list[int], need: int) -> None:
    order = np.arange(len(freed))
    chosen = preemption.victims(order, np.array(freed), need)
    if need <= 0:
        assert len(chosen) == 0
    elif sum(freed) >= need:
        assert sum(freed[i] for i in chosen) >= need > sum(freed[i] for i in chosen[:-1])
    else:
        assert len(chosen) == len(freed)


@relaxed
@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=250), st.integers(0, 300))
def test_spare_gaps_are_those_that_the_99th_percentile_forgives(gaps_s: list[float], more: int) -> None:
    limit = 0.1
    missed = sum(g > limit for g in gaps_s)
    spare = int(preemption.may_miss(np.array([len(gaps_s)]), np.array([missed]), np.array([more]))[0])
    kept = [limit] * more
    attains = p99_s(gaps_s + kept) <= limit
    assert attains == (spare >= 0)
    if spare > 0 and more > 0:
        assert p99_s(gaps_s + kept[:-1] + [9.0]) <= limit
    if spare == 0 and more > 0:
        assert p99_s(gaps_s + kept[:-1] + [9.0]) > limit


def test_a_limit_that_is_lost_protects_nobody() -> None:
    bucket = preemption.protection(np.array([0, 3]), np.array([False, True]))
    assert bucket.tolist() == [BEST_EFFORT_BUCKET, 3]


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
    assert preemption.way_out(costs, "auto") is WayOut.RECOMPUTE


@relaxed
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_auto_takes_the_cheapest_way(keep: float, swap: float, recompute: float) -> None:
    costs = Costs(keep, swap, recompute)
    way = preemption.way_out(costs, "auto")
    assert getattr(costs, f"{way.value}_s") == min(keep, swap, recompute)


def test_a_mode_is_obeyed_and_a_full_host_means_recompute() -> None:
    assert preemption.way_out(Costs(0, 1, 9), "recompute") is WayOut.RECOMPUTE
    assert preemption.way_out(Costs(9, 9, 0), "keep") is WayOut.KEEP
    assert preemption.way_out(Costs(0, 9, 0), "swap") is WayOut.SWAP
    assert preemption.way_out(Costs(0, math.inf, 9), "swap") is WayOut.RECOMPUTE


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


def test_only_who_has_no_gap_to_spare_has_to_be_back_in_time() -> None:
    back = preemption.return_by_s
    assert back(9.9, 0.1, spare_gaps=0) == 10.0
    assert back(9.9, 0.1, spare_gaps=1) == math.inf
    assert back(9.9, 0.1, spare_gaps=-1) == math.inf
    assert back(9.9, math.inf, spare_gaps=0) == math.inf


@relaxed
@given(st.lists(st.integers(0, 9999), max_size=50), st.integers(1, 64))
def test_growth_is_at_least_one_and_at_most_the_horizon_each(remaining: list[int], iterations: int) -> None:
    growth = preemption.growth_tokens(np.array(remaining, np.int64), iterations)
    assert len(remaining) <= growth <= len(remaining) * iterations


def test_longer_copies_are_begun_earlier_within_a_bound() -> None:
    leads = [preemption.lead_iterations(s, 0.02) for s in (0.0, 0.01, 0.05, 9.0)]
    assert leads == [1, 2, 4, preemption.LONGEST_LEAD]


def _turn(
    deadline_s: float = math.inf,
    waiting: tuple[float, ...] = (),
    now: float = 10.0,
    held_up_by_seq: float = math.inf,
) -> Turn:
    return preemption.turn(
        deadline_s,
        np.array(waiting),
        now,
        since_s=8.0,
        work_s=0.2,
        share=0.05,
        overdue_s=60.0,
        seq=5,
        held_up_by_seq=held_up_by_seq,
    )


def test_a_swapped_request_goes_first_by_its_own_deadline_only_while_that_can_be_kept_and_is_the_nearest() -> (
    None
):
    assert _turn(10.5, waiting=(11.0, math.inf)) is Turn.HASTY
    assert _turn(11.5, waiting=(11.0,)) is Turn.NOT_YET
    assert _turn(9.5, waiting=(11.0,)) is Turn.NOT_YET


def test_one_with_time_to_spare_takes_what_nobody_in_a_hurry_waits_for() -> None:
    assert _turn(waiting=(math.inf, 9.0)) is Turn.SPARE
    assert _turn(waiting=(10.5,)) is Turn.NOT_YET


def test_the_guaranteed_share_gives_a_swapped_request_its_turn_whoever_waits() -> None:
    """0.2 s of work at 5 % of the machine: 4 s at the head of the line."""
    assert _turn(waiting=(200.0,), now=11.9) is Turn.NOT_YET
    assert _turn(waiting=(200.0,), now=12.0) is Turn.SPARE


def test_a_swapped_request_that_stood_long_enough_leaves_nothing_to_others() -> None:
    assert _turn(waiting=(200.0,), now=67.9) is Turn.SPARE
    assert _turn(waiting=(200.0,), now=68.0) is Turn.OVERDUE


def test_nobody_comes_back_past_one_that_is_not_overtaken_any_more_but_in_time_or_by_order_of_arrival() -> (
    None
):
    assert _turn(held_up_by_seq=4) is Turn.NOT_YET
    assert _turn(held_up_by_seq=6) is Turn.NOT_YET
    assert _turn(now=68.0, held_up_by_seq=4) is Turn.NOT_YET
    assert _turn(now=68.0, held_up_by_seq=6) is Turn.OVERDUE
    assert _turn(10.5, held_up_by_seq=4) is Turn.HASTY
