"""The definition of attainment: exact percentiles from a bounded tail, limits kept up to equality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.attainment import GapTable, GapTail, missed, p99_s, rank_from_top, ratio
from sglang_slo.core.slo import BEST_EFFORT, Slo

gap_lists = st.lists(st.floats(0, 1e3, allow_nan=False), max_size=700)


@given(gap_lists.filter(bool))
def test_p99_is_the_smallest_gap_that_covers_99_percent(gaps: list[float]) -> None:
    figure = p99_s(gaps)
    assert figure in gaps
    assert sum(g <= figure for g in gaps) >= 0.99 * len(gaps)
    shorter = [g for g in gaps if g < figure]
    assert not shorter or sum(g <= max(shorter) for g in gaps) < 0.99 * len(gaps)


@given(st.integers(1, 10**6))
def test_rank_counts_from_the_top_what_nearest_rank_counts_from_the_bottom(n: int) -> None:
    assert rank_from_top(n) == n - -(-99 * n // 100) + 1


def test_with_fewer_than_100_gaps_the_figure_is_the_longest() -> None:
    assert p99_s([0.1] * 98 + [9.0]) == 9.0
    assert p99_s([0.1] * 99 + [9.0]) == 0.1


@given(gap_lists, st.integers(1, 90), st.integers(0, 500))
def test_tail_gives_the_same_figure_as_all_gaps(gaps: list[float], piece: int, spare: int) -> None:
    tail = GapTail(len(gaps) + spare)
    for start in range(0, len(gaps), piece):
        tail.extend(gaps[start : start + piece])
        assert tail.p99_s == p99_s(gaps[: start + piece])
    assert tail.count == len(gaps)
    assert tail.max_s == max(gaps, default=0.0)
    assert tail.mean_s == pytest.approx(float(np.mean(gaps)) if gaps else 0.0)


@given(gap_lists, st.integers(0, 100))
def test_tail_that_was_promised_too_few_gaps_never_flatters(gaps: list[float], promised: int) -> None:
    tail = GapTail(promised)
    tail.extend(gaps)
    assert tail.p99_s >= p99_s(gaps)


def test_tail_of_a_hundred_thousand_gaps_keeps_about_one_percent() -> None:
    tail = GapTail(100_000)
    gaps = np.random.default_rng(0).exponential(size=100_000)
    for part in np.split(gaps, 1000):
        tail.extend(part)
    assert tail._longest.size <= 1001
    assert tail.p99_s == p99_s(gaps)


@given(st.lists(st.lists(st.integers(0, 20), unique=True, min_size=1), max_size=60), st.integers(1, 5))
def test_table_keeps_every_request_apart(iterations: list[list[int]], block: int) -> None:
    table = GapTable(slots=2, block=block)
    seen: dict[int, list[float]] = {slot: [] for slot in range(21)}
    for slot in seen:
        table.open(slot, 60)
    for step, slots in enumerate(iterations):
        gaps = np.array([step + slot / 100 for slot in slots])
        table.add(np.array(slots), gaps)
        for slot, gap in zip(slots, gaps, strict=True):
            seen[slot].append(float(gap))
    for slot, gaps_of_slot in seen.items():
        tail = table.close(slot)
        assert (tail.count, tail.p99_s) == (len(gaps_of_slot), p99_s(gaps_of_slot))


def test_reopened_slot_forgets_the_request_before() -> None:
    table = GapTable(slots=1)
    table.open(0, 5)
    table.add(np.array([0]), 9.0)
    table.open(0, 5)
    table.add(np.array([0]), 1.0)
    assert table.close(0).max_s == 1.0
    with pytest.raises(KeyError):
        table.close(0)


@pytest.mark.parametrize(
    ("ttft_s", "tbt_s", "expected"),
    [(0.5, 0.05, None), (0.51, 0.05, "ttft"), (0.5, 0.051, "tbt"), (1.0, 1.0, "both")],
)
def test_a_figure_equal_to_its_limit_is_kept(ttft_s: float, tbt_s: float, expected: str | None) -> None:
    assert missed(Slo(0.5, 0.05), ttft_s, tbt_s) == expected


def test_best_effort_misses_nothing() -> None:
    assert missed(BEST_EFFORT, 1e9, 1e9) is None
    assert ratio(5.0, math.inf) == 0.0
    assert ratio(5.0, 2.5) == 2.0
