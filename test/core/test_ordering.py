"""The feasible set is the largest that can be in time; the infeasible keep their share."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.ordering import (
    FairShareQueue,
    deadline_order,
    edf_feasible_first,
    feasible_set,
    inserted,
)

# whole numbers: their sums are exact, so that in time is in time
jobs = st.lists(
    st.tuples(st.integers(1, 50).map(float), st.integers(1, 100).map(float)), min_size=0, max_size=7
)


def _in_time(works: list[float], deadlines: list[float]) -> bool:
    order = sorted(range(len(works)), key=lambda i: deadlines[i])
    end = np.cumsum([works[i] for i in order])
    return all(e <= deadlines[i] for e, i in zip(end, order, strict=True))


@given(jobs)
def test_no_larger_set_of_jobs_is_in_time(pairs: list[tuple[float, float]]) -> None:
    pairs.sort(key=lambda p: p[1])
    works, deadlines = [p[0] for p in pairs], [p[1] for p in pairs]
    keep = feasible_set(np.array(deadlines), np.array(works), 0.0)
    kept = np.flatnonzero(keep)
    assert _in_time([works[i] for i in kept], [deadlines[i] for i in kept])
    for larger in itertools.combinations(range(len(pairs)), len(kept) + 1):
        assert not _in_time([works[i] for i in larger], [deadlines[i] for i in larger])


def test_largest_job_is_given_up_for_two_small_ones() -> None:
    keep = feasible_set(np.array([3.0, 3.1, 3.2]), np.array([2.5, 1.0, 1.0]), 0.0)
    assert keep.tolist() == [False, True, True]


def test_a_job_that_is_late_even_alone_is_never_kept() -> None:
    assert feasible_set(np.array([1.0]), np.array([1.5]), 0.0).tolist() == [False]


@given(jobs, st.integers(0, 3))
def test_every_waiting_request_is_in_exactly_one_line(
    pairs: list[tuple[float, float]], best_effort: int
) -> None:
    deadlines = np.array([p[1] for p in pairs] + [np.inf] * best_effort)
    works = np.array([p[0] for p in pairs] + [1.0] * best_effort)
    rows = np.arange(len(works)) + 100
    ranking = edf_feasible_first(rows, deadlines, works, rows, 0.0)
    both = np.concatenate([ranking.feasible, ranking.infeasible])
    assert sorted(both.tolist()) == rows.tolist()
    assert (np.diff(deadlines[ranking.feasible - 100]) >= 0).all()
    assert (np.diff(ranking.infeasible) > 0).all(), "the infeasible are served first come, first served"


def test_requests_without_a_limit_wait_with_the_infeasible() -> None:
    rows = np.array([1, 2])
    ranking = edf_feasible_first(rows, np.array([np.inf, 5.0]), np.array([1.0, 1.0]), rows, 0.0)
    assert ranking.infeasible.tolist() == [1]


@given(st.lists(st.integers(64, 4096), min_size=50, max_size=200), st.integers(1, 3000))
def test_the_infeasible_get_their_share_of_all_tokens(iterations: list[int], need: int) -> None:
    line, served, total, queue = FairShareQueue(0.05), 0, 0, []
    for tokens in iterations:
        total += tokens
        queue += [need] * (-(-tokens // need))  # there is always more waiting
        mine, room = 0, tokens
        for _ in range(line.n_promoted(np.array(queue), tokens)):
            piece = min(queue[0], room)
            mine, room = mine + piece, room - piece
            queue[0] -= piece
            if queue[0] > 0:
                break
            queue.pop(0)
        line.earn(tokens, True)
        line.spend(mine)
        served += mine
    slack = need + max(iterations) + 1
    assert 0.05 * total - slack <= served <= 0.05 * total + slack


def test_nothing_is_earned_while_no_infeasible_one_waits() -> None:
    line = FairShareQueue(0.05)
    line.earn(100_000, waiting=False)
    assert line.n_promoted(np.array([1]), 1) == 0


@given(jobs, st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_no_more_important_job_is_dropped_than_without_the_less_important(
    pairs: list[tuple[float, float]], importance: list[int]
) -> None:
    pairs.sort(key=lambda p: p[1])
    works, deadlines = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    ranks = np.array(importance[: len(pairs)], np.int64)
    keep = feasible_set(deadlines, works, 0.0, ranks)
    kept = np.flatnonzero(keep)
    assert _in_time(works[kept].tolist(), deadlines[kept].tolist())
    top = np.flatnonzero(ranks == 2)
    alone = feasible_set(deadlines[top], works[top], 0.0)
    assert keep[top].sum() == alone.sum()


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, np.inf]), min_size=1, max_size=12), st.randoms())
def test_one_is_put_where_sorting_would_put_it(deadlines: list[float], random: Random) -> None:
    seq = np.array(random.sample(range(100), len(deadlines)))
    deadline_s, rows = np.array(deadlines), np.arange(len(deadlines))
    order = deadline_order(deadline_s[1:], seq[1:])
    others = rows[1:] if order is None else rows[1:][order]
    assert (
        deadline_order(*(column[inserted(others, 0, deadline_s, seq)] for column in (deadline_s, seq)))
        is None
    )
