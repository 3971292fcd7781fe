"""What is remembered of the waiting queue is what reading all of it again would tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.runtime.requests import waiting_rows
from sglang_slo.runtime.requests.waiting_rows import MOST_FOLLOWED, WaitingRows

# what may become of a queue between two looks: so many come, some are planned, some vanish unplanned, one returns
steps = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sets(st.integers(0, 30), max_size=4),
        st.sets(st.integers(0, 30), max_size=1),
        st.booleans(),
        st.booleans(),
    ),
    max_size=12,
)


def _request(table: RequestTable, ttft_s: float) -> Any:
    return SimpleNamespace(slo_row=table.add(Slo(ttft_s=ttft_s), 0.0, 10, 10))


def _read(queue: list[Any], table: RequestTable) -> list[int]:
    return sorted((req.slo_row for req in queue), key=lambda row: (table.deadline_s[row], table.seq[row]))


@given(steps, st.lists(st.sampled_from([1.0, 2.0, 5.0, np.inf]), min_size=80, max_size=80))
@settings(max_examples=200, deadline=None)
def test_it_is_followed_through_whatever_becomes_of_it(steps: Any, ttfts: list[float]) -> None:
    table, queue, gone = RequestTable(), [], []
    waiting = WaitingRows(table)
    limits = iter(ttfts)
    for come, planned, vanish, returns, changes in steps:
        leave = [queue[i] for i in planned if i < len(queue)]
        waiting.planned([req.slo_row for req in leave])
        lost = [queue[i] for i in vanish if i < len(queue)]
        queue = [req for req in queue if req not in leave and req not in lost]
        gone += leave
        queue += [_request(table, next(limits)) for _ in range(come)]
        if returns and gone:
            queue.append(gone.pop(0))
        if changes and queue:
            table.deadline_s[queue[-1].slo_row] = 1.5  # promised something else meanwhile
        assert waiting.of(queue).tolist() == _read(queue, table)


def test_a_queue_that_is_followed_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = WaitingRows(table := RequestTable())
    queue = [_request(table, float(k % 7)) for k in range(100)]
    waiting.of(queue)
    read: list[Any] = []
    monkeypatch.setattr(waiting_rows, "_row_of", lambda req: read.append(req) or req.slo_row)
    waiting.planned([queue[3].slo_row, queue[50].slo_row])
    queue = [*queue[:3], *queue[4:50], *queue[51:], new := _request(table, 3.0)]
    assert waiting.of(queue).tolist() == _read(queue, table)
    assert read == [new]


@pytest.mark.parametrize("come", [MOST_FOLLOWED, MOST_FOLLOWED + 1])
def test_a_crowd_of_arrivals_is_sorted_in(come: int) -> None:
    waiting = WaitingRows(table := RequestTable())
    queue = [_request(table, float(k % 5)) for k in range(10)]
    waiting.of(queue)
    queue = queue + [_request(table, float(k % 3)) for k in range(come)]
    assert waiting.of(queue).tolist() == _read(queue, table)


def test_what_is_planned_is_not_kept_for_ever() -> None:
    """Neither where nobody asks for rows by deadline, nor where one whose prefill goes on leaves the queue as it is."""
    waiting = WaitingRows(table := RequestTable())
    for _ in range(3):
        waiting.planned([1, 2])
    assert not waiting._planned
    queue = [_request(table, 1.0) for _ in range(3)]
    for _ in range(3):
        waiting.of(queue)
        waiting.planned([7])
    assert waiting._planned == [7]


def test_one_without_a_row_is_told_and_read_again_once_it_has_one() -> None:
    waiting = WaitingRows(table := RequestTable())
    queue = [_request(table, 1.0), SimpleNamespace(slo_row=-1)]
    assert waiting.of(queue).min() == -1
    queue[1].slo_row = _request(table, 0.5).slo_row
    assert waiting.of(queue).tolist() == _read(queue, table)
