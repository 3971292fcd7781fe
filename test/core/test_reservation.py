"""The forecast is exact, and the paper's one-guest rule falls out of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.reservation import ForecastLedger, FullLedger, GuardedLedger, StockLedger, peak_tokens

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


@given(running)
def test_peak_equals_a_walk_through_time(pairs: list[tuple[int, int]]) -> None:
    held, remaining = np.array([h for h, _ in pairs]), np.array([r for _, r in pairs])
    assert peak_tokens(held, remaining) == _walk(pairs)
    assert _ledger(pairs, 1).peak == _walk(pairs)


@given(running, st.integers(1, 500), st.integers(1, 300))
def test_peak_with_a_newcomer_equals_a_walk_through_time(
    pairs: list[tuple[int, int]], prefill: int, remaining: int
) -> None:
    assert _ledger(pairs, 1).peak_with(prefill, remaining) == _walk([*pairs, (prefill, remaining)])


@given(
    running, st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=5), st.integers(50, 3000)
)
def test_charging_one_by_one_equals_recomputing_from_scratch(
    pairs: list[tuple[int, int]], guests: list[tuple[int, int]], capacity: int
) -> None:
    ledger, admitted = _ledger(pairs, capacity), list(pairs)
    for prefill, remaining in guests:
        if ledger.admits(prefill, remaining):
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
    assert ledger.admits(guest_in, guest_out) == rule


def test_shared_tokens_are_counted_once() -> None:
    assert _ledger([(10, 5), (10, 5)], 100, shared=40).peak == 40 + 2 * 15


def test_a_request_alone_enters_whatever_its_bound_says() -> None:
    assert _ledger([], 100, reserve=10).admits(50, 10_000)
    assert not _ledger([], 100).admits(101, 1)


def test_reserve_is_kept_free() -> None:
    assert _ledger([(40, 10)], 100, reserve=0).admits(40, 10)
    assert not _ledger([(40, 10)], 100, reserve=1).admits(40, 10)


@pytest.mark.parametrize("kind", [ForecastLedger, FullLedger])
def test_what_is_for_others_is_left_but_not_charged(kind: type[ForecastLedger] | type[FullLedger]) -> None:
    ledger = kind(np.array([40]), np.array([10]), 0, 120, 0)
    assert not ledger.admits(20, 5, beside_tokens=51)
    assert ledger.admits(20, 5, beside_tokens=30)
    assert ledger.admits(20, 5)  # 50 + 25 + 25 within 120


def test_stock_rule_charges_a_newcomer_in_full_and_the_running_by_ratio() -> None:
    ledger = StockLedger(1000, np.array([500, 9000]), 0.1)
    left = 1000 - 0.1 * (500 + 4096)
    assert not ledger.admits(100, int(left))
    assert ledger.admits(100, int(left) - 102)


@given(running, st.integers(1, 400), st.integers(1, 400), st.integers(1, 4000))
def test_what_is_admitted_in_full_is_admitted_by_the_forecast(
    pairs: list[tuple[int, int]], prefill: int, remaining: int, capacity: int
) -> None:
    held, left = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    full = FullLedger(held, left, 0, capacity, 0).admits(prefill, remaining)
    forecast = ForecastLedger(held, left, 0, capacity, 0).admits(prefill, remaining)
    assert forecast or not full


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 50), st.integers(0, 400)), max_size=12))
def test_all_who_have_to_stay_fit_to_their_end(comers: list[tuple[int, int, int]]) -> None:
    ledger = GuardedLedger(_ledger([], 1000), _ledger([], 1000), 0)
    staying = [
        (prefill, final) for prefill, left, final in comers if ledger.admits(prefill, left, final) and final
    ]
    alone = len(staying) == 1  # who is alone enters whenever its prompt fits
    assert alone or _walk(staying) <= 1000
