"""How loaded the server is: arrivals over what it has been seen to finish, for the confidence of length bounds.

CacheOPT lowers the confidence of its bounds as arrivals come faster: with a full queue, KV held back for a tail
that seldom comes costs more than an early victim now and then.
"""

from __future__ import annotations

from collections import deque

SLOT_S = 5.0
SLOTS = 24  # two minutes


class LoadMeter:
    """Load = arrivals per second / capacity; capacity = the most requests finished in a slot of the last two minutes."""

    def __init__(self) -> None:
        self._slots: deque[list[float]] = deque([[0, 0]], maxlen=SLOTS)
        self._start_s: float | None = None
        self._known: tuple[float, float] | None = None  # (arrivals a slot, capacity) of the full slots

    def count(self, now_s: float, arrived: int, finished: int) -> None:
        """Note what arrived and finished since the last call."""
        if self._start_s is None:
            self._start_s = now_s
        behind = int(min((now_s - self._start_s) / SLOT_S, SLOTS))
        for _ in range(behind):
            self._slots.append([0, 0])
            self._known = None
        self._start_s = now_s if behind >= SLOTS else self._start_s + behind * SLOT_S
        self._slots[-1][0] += arrived
        self._slots[-1][1] += finished

    def load(self, waiting: int) -> float:
        """Arrivals over capacity; with an empty queue at most 1; NaN before anything finished."""
        arrivals, capacity = self._known or self._rates()
        if capacity == 0:
            return float("nan")
        load = arrivals / capacity
        return load if waiting else min(load, 1.0)

    def _rates(self) -> tuple[float, float]:
        full = list(self._slots)[:-1]
        counted = full or list(self._slots)
        rates = sum(arrived for arrived, _ in counted) / len(counted), max(done for _, done in counted)
        if full:  # these do not change until a slot is complete
            self._known = rates
        return rates
