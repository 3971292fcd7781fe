"""The reserve follows what the forecast was wrong by, between its floor and its ceiling."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.kv.reserve import HORIZON, LATEST, Reserve

CAPACITY = 10_000


def looked(reserve: Reserve, iteration: int, held: list[int], remaining: list[int]) -> int:
    reserve.look(iteration, np.arange(len(held)), np.array(held), np.array(remaining))
    return reserve.tokens


def test_a_forecast_that_comes_true_leaves_the_floor() -> None:
    reserve = Reserve(CAPACITY, 0.01, 0.2)
    looked(reserve, 0, [100, 100], [1000, 1000])
    assert looked(reserve, HORIZON, [100 + HORIZON] * 2, [900, 900]) == 100


def test_requests_that_outlive_their_bounds_raise_it_by_what_they_hold() -> None:
    reserve = Reserve(CAPACITY, 0.01, 0.2)
    looked(reserve, 0, [300, 400], [1, 1])  # both should be gone by then
    assert looked(reserve, HORIZON, [332, 432], [1, 1]) == 764


def test_who_came_later_is_no_error() -> None:
    reserve = Reserve(CAPACITY, 0.01, 0.2)
    reserve.look(0, np.array([1]), np.array([100]), np.array([1]))
    reserve.look(HORIZON, np.array([2]), np.array([5000]), np.array([1]))
    assert reserve.tokens == 100


def test_a_forecast_that_was_never_settled_in_time_says_nothing() -> None:
    reserve = Reserve(CAPACITY, 0.01, 0.2)
    looked(reserve, 0, [3000], [1])
    assert looked(reserve, LATEST + 1, [3000], [1]) == 100


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 100)), min_size=1, max_size=60))
def test_it_stays_between_floor_and_ceiling(rows: list[tuple[int, int]]) -> None:
    reserve = Reserve(CAPACITY, 0.01, 0.2)
    for i, (held, remaining) in enumerate(rows):
        assert 100 <= looked(reserve, i * HORIZON, [held], [remaining]) <= 2000
