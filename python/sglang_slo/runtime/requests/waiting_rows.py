"""Rows of SGLang's waiting queue in deadline order, followed from one planning to the next.

Reading the row off thousands of requests in every planning costs more than the plan itself, as each of them lies
somewhere else in memory. So the last queue is remembered, and what became of it is guessed (those whose prefill was planned
have left, others were appended) and checked: comparing two lists of the same objects costs next to nothing.
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from sglang.srt.managers.schedule_batch import Req

from sglang_slo.core.ordering import deadline_order, inserted
from sglang_slo.core.table import RequestTable

_row_of = attrgetter("slo_row")
MOST_FOLLOWED = 64  # arrivals put in place one by one; more are sorted in


class WaitingRows:
    """What is known of the queue since it was looked at last."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._queue: list[Req] = []
        self._rows = np.zeros(0, np.int64)  # in the queue's order
        self._ordered = self._rows  # by deadline, then arrival
        self._planned: list[int] = []  # rows, since the queue was looked at

    def planned(self, rows: list[int]) -> None:
        """Note whose prefill is planned: whoever of them waited leaves the queue."""
        if self._queue:
            self._planned += rows

    def of(self, queue: list[Req]) -> np.ndarray:
        """Rows of `queue` by deadline, then arrival, int[n], not to be written to; in its order if one has no row (-1)."""
        if self._queue != queue and not self._followed(queue):
            rows = np.fromiter(map(_row_of, queue), np.int64, len(queue))
            if len(rows) and rows.min() < 0:
                self._remember([], rows[:0], rows[:0])
                return rows
            self._remember(queue.copy(), rows, rows)
        self._planned.clear()  # whoever of them is still there did not leave
        order = deadline_order(self._table.deadline_s[self._ordered], self._table.seq[self._ordered])
        if order is not None:
            self._ordered = self._ordered[order]
        return self._ordered

    def _followed(self, queue: list[Req]) -> bool:
        """Whether the queue is what was expected: the last one without who was launched, and others behind it."""
        left = np.zeros(self._table.capacity, bool)
        left[self._planned] = True
        stay = ~left[self._rows]
        expected = self._queue.copy()
        for place in np.flatnonzero(~stay)[::-1].tolist():
            del expected[place]
        added = queue[len(expected) :]
        if len(added) > MOST_FOLLOWED or expected + added != queue:
            return False
        new = np.fromiter(map(_row_of, added), np.int64, len(added))
        if len(new) and new.min() < 0:
            return False
        ordered = self._ordered[~left[self._ordered]]
        for row in new.tolist():
            ordered = inserted(ordered, row, self._table.deadline_s, self._table.seq)
        self._remember(queue.copy(), np.concatenate((self._rows[stay], new)), ordered)
        return True

    def _remember(self, queue: list[Req], rows: np.ndarray, ordered: np.ndarray) -> None:
        self._queue, self._rows, self._ordered = queue, rows, ordered
