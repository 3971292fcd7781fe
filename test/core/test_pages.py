"""Whole pages: what is taken, when, and where a piece of a prompt ends; at page size 1 nothing changes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core import pages

sizes = st.sampled_from([1, 2, 16, 64, 128])
tokens = st.integers(0, 2000)


@given(tokens, sizes)
def test_what_is_held_is_the_fewest_pages_that_hold_it(n: int, page: int) -> None:
    held = pages.whole(n, page)
    assert held % page == 0 and n <= held < n + page


@given(tokens, st.integers(0, 300), sizes)
def test_growing_token_by_token_takes_what_growing_at_once_takes(n: int, more: int, page: int) -> None:
    steps = [pages.growth(n + i, 1, page) for i in range(more)]
    assert sum(steps) == pages.growth(n, more, page) <= pages.whole(more, page)
    assert set(steps) <= {0, page}  # a page, or nothing for as long as one lasts
    assert all((step > 0) == ((n + i) % page == 0) for i, step in enumerate(steps))


@given(st.lists(tokens, min_size=1, max_size=8), st.integers(0, 300), sizes)
def test_many_at_once_are_as_one_by_one(many: list[int], more: int, page: int) -> None:
    each = pages.growth(np.array(many), more, page)
    assert each.tolist() == [pages.growth(n, more, page) for n in many]


@given(tokens, st.integers(1, 2000), sizes)
def test_a_piece_ends_with_a_page_unless_that_costs_more_than_half_of_it(
    history: int, n: int, page: int
) -> None:
    piece = pages.cut(history, n, page)
    assert n <= 2 * piece <= 2 * n
    assert piece > n - page
    if n >= 2 * page:
        assert (history + piece) % page == 0


@given(tokens, st.integers(1, 2000), st.integers(0, 300))
def test_at_page_size_one_all_is_counted_as_it_is_written(history: int, n: int, more: int) -> None:
    assert pages.whole(n, 1) == n
    assert pages.growth(history, more, 1) == more
    assert pages.cut(history, n, 1) == n
