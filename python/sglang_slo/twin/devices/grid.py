"""Tables of times that never fall: a time asked for a larger batch is never shorter than for a smaller one.

Measured tables are interpolated, and what was tuned per size makes them jump: the sum of a pass's kernels falls at a
dozen sizes, by up to a tenth. A real server would not be faster for one token more than the tables know, and a
scheduler that inverts time must not be asked to; so each table is its own running maximum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

GROWTH = 4096  # sizes by which a line grows at a time


class Line:
    """f(n) for whole n from 0, every one of them asked once; grows as it is asked."""

    def __init__(self, f: Callable[[int], float]) -> None:
        self._f = f
        self._values = [0.0]

    def at(self, n: int) -> float:
        """The largest of f(1) .. f(n); 0 for n = 0."""
        values = self._values
        if n >= len(values):
            for i in range(len(values), (n // GROWTH + 1) * GROWTH):
                values.append(max(values[-1], self._f(i)))
        return values[n]


class Grid:
    """f(x, y) on a grid, straight lines in between; beyond the last point the last line goes on."""

    def __init__(self, f: Callable[[int, int], float], xs: Sequence[int], ys: Sequence[int]) -> None:
        table = np.array([[f(x, y) for y in ys] for x in xs])
        table = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
        self._xs, self._ys, self._rows = list(xs), list(ys), table.tolist()

    def at(self, x: float, y: float) -> float:
        """The time at (x, y), at or above the first point of each axis."""
        i, u = _place(self._xs, x)
        j, v = _place(self._ys, y)
        low, high = self._rows[i], self._rows[i + 1]
        a = low[j] + (low[j + 1] - low[j]) * v
        b = high[j] + (high[j + 1] - high[j]) * v
        return float(a + (b - a) * u)


def _place(points: list[int], x: float) -> tuple[int, float]:
    """(the point at or before x, the share of the way to the next); over 1 beyond the last."""
    i = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
    return i, max(x - points[i], 0) / (points[i + 1] - points[i])


def octaves(low: int, high: int, steps: int) -> list[int]:
    """Whole numbers from `low` to `high`, about `steps` to each doubling."""
    count = int(np.ceil(np.log2(high / low) * steps)) + 1
    return sorted({round(x) for x in np.geomspace(low, high, count)})
