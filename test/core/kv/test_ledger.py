"""The forecast is exact, and the paper's one-guest rule falls out of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.kv.ledger import Forecast, ForecastLedger, FullLedger, Need, StockLedger

running = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300)), max_size=8)


def _walk(pairs: list[tuple[int, int]]) -> int:
    """Peak by walking through time one token at a time."""
    peak = 0
    for t in range(1, max((r for _, r in pairs), default=0) + 1):
        peak = max(peak, sum(h + t for h, r in pairs if r >= t))
    return peak


def _ledger(pairs: list[tuple[int, int]], capacity: int, reserve: int = 0, shared: int = 0) -> ForecastLedger:
    held = np.array([h for h, _ in pairs], np.int64)
    remaining = np.array([r for _, r in pairs], np.int64)
    return ForecastLedger(held, remaining, shared, capacity, reserve)


def _forecast(pairs: list[tuple[int, int]], horizon: int = 1 << 30) -> Forecast:
    held, remaining = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    return Forecast(held, remaining, 0, horizon)


@given(running, st.integers(1, 100))
def test_a_nearer_horizon_never_forecasts_more(pairs: list[tuple[int, int]], horizon: int) -> None:
    near = [(h, min(r, horizon)) for h, r in pairs]
    assert _forecast(pairs, horizon).peak == _walk(near) <= _forecast(pairs).peak


@given(running)
def test_peak_equals_a_walk_through_time(pairs: list[tuple[int, int]]) -> None:
    assert _forecast(pairs).peak == _walk(pairs)
    assert _ledger(pairs, 1).peak == _walk(pairs)


@given(running, st.integers(1, 500), st.integers(1, 300))
def test_peak_with_a_newcomer_equals_a_walk_through_time(
    pairs: list[tuple[int, int]], prefill: int, remaining: int
) -> None:
    assert _forecast(pairs).peak_with(prefill, remaining) == _walk([*pairs, (prefill, remaining)])


@given(
    running, st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=5), st.integers(50, 3000)
)
def test_charging_one_by_one_equals_recomputing_from_scratch(
    pairs: list[tuple[int, int]], guests: list[tuple[int, int]], capacity: int
) -> None:
    ledger, admitted = _ledger(pairs, capacity), list(pairs)
    for prefill, remaining in guests:
        if ledger.admits(Need(prefill, remaining)):
            admitted.append((prefill, remaining))
        assert ledger.peak == _walk(admitted)


@given(
    allocated=st.integers(10, 2000),
    used=st.integers(1, 2000),
    guest_in=st.integers(1, 500),
    guest_out=st.integers(1, 500),
    buffer=st.integers(0, 100),
)
def test_one_guest_enters_one_host_exactly_by_the_papers_inequality(
    allocated: int, used: int, guest_in: int, guest_out: int, buffer: int
) -> None:
    """CacheOPT C2: guest i may live inside host j if a_j - (u_j + s_i^out) - (s_i^in + s_i^out) >= buffer.

    The host has been given a_j and uses u_j of it; while the guest writes its s_i^out tokens the host writes as
    many. The pool is the host's allocation, the reserve the buffer, and the guest ends before the host does.
    """
    if used + guest_out >= allocated:
        return  # the host ends first: not the paper's case
    ledger = ForecastLedger(np.array([used]), np.array([allocated - buffer - used]), 0, allocated, buffer)
    if allocated - buffer - used < guest_out:
        return
    rule = allocated - (used + guest_out) - (guest_in + guest_out) >= buffer
    assert ledger.admits(Need(guest_in, guest_out)) == rule


def test_shared_tokens_are_counted_once() -> None:
    assert _ledger([(10, 5), (10, 5)], 100, shared=40).peak == 40 + 2 * 15


def test_a_request_alone_enters_whatever_its_bound_says() -> None:
    assert _ledger([], 100, reserve=10).admits(Need(50, 10_000))
    assert not _ledger([], 100).admits(Need(101, 1))


def test_reserve_is_kept_free() -> None:
    assert _ledger([(40, 10)], 100, reserve=0).admits(Need(40, 10))
    assert not _ledger([(40, 10)], 100, reserve=1).admits(Need(40, 10))


@pytest.mark.parametrize("kind", [ForecastLedger, FullLedger])
def test_what_is_for_others_is_left_but_not_charged(kind: type[ForecastLedger] | type[FullLedger]) -> None:
    ledger = kind(np.array([40]), np.array([10]), 0, 120, 0)
    assert not ledger.admits(Need(20, 5, keep_free=51))
    assert ledger.admits(Need(20, 5, keep_free=30))
    assert ledger.admits(Need(20, 5))  # 50 + 25 + 25 within 120


def test_stock_rule_charges_a_newcomer_in_full_and_the_running_by_ratio() -> None:
    ledger = StockLedger(1000, np.array([500, 9000]), 0.1)
    left = 1000 - 0.1 * (500 + 4096)
    assert not ledger.admits(Need(100, int(left)))
    assert ledger.admits(Need(100, int(left) - 102))


@given(running, st.integers(1, 400), st.integers(1, 400), st.integers(1, 4000))
def test_what_is_admitted_in_full_is_admitted_by_the_forecast(
    pairs: list[tuple[int, int]], prefill: int, remaining: int, capacity: int
) -> None:
    held, left = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    full = FullLedger(held, left, 0, capacity, 0).admits(Need(prefill, remaining))
    forecast = ForecastLedger(held, left, 0, capacity, 0).admits(Need(prefill, remaining))
    assert forecast or not full


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 50), st.integers(0, 400)), max_size=12))
def test_all_who_have_to_stay_fit_to_their_end(comers: list[tuple[int, int, int]]) -> None:
    ledger = _ledger([], 1000)
    staying = [
        (prefill, final)
        for prefill, left, final in comers
        if ledger.admits(Need(prefill, left, final)) and final
    ]
    alone = len(staying) == 1  # who is alone enters whenever its prompt fits
    assert alone or _walk(staying) <= 1000


@given(
    running, st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300), st.integers(0, 600)), max_size=6)
)
def test_who_is_refused_is_charged_nothing(
    pairs: list[tuple[int, int]], comers: list[tuple[int, int, int]]
) -> None:
    everyone, only_admitted = _ledger(pairs, 1500), _ledger(pairs, 1500)
    for prefill, left, final in comers:
        need = Need(prefill, left, final)
        if everyone.admits(need):
            assert only_admitted.admits(need)
        assert everyone.peak == only_admitted.peak


def test_one_that_may_wait_needs_room_further_ahead() -> None:
    def ledger() -> ForecastLedger:
        return ForecastLedger(np.array([50]), np.array([500]), 0, 200, 0, near=10, far=100)

    assert ledger().admits(Need(60, 500))  # 110 + 2 x 10
    assert not ledger().admits(Need(60, 500, far=True))  # 110 + 2 x 100


def test_those_who_entered_before_count_in_the_far_forecast() -> None:
    ledger = ForecastLedger(np.array([50]), np.array([50]), 0, 300, 0, near=10, far=100)
    assert ledger.admits(Need(50, 50))
    assert not ledger.admits(Need(100, 50, far=True))  # 200 + 3 x 50
    assert ledger.admits(Need(40, 50, far=True))
