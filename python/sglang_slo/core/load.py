"""How loaded the server is: arrivals over what it has been seen to finish, for the confidence of length bounds.

CacheOPT lowers the confidence of its bounds as arrivals come faster: with a full queue, KV held back for a tail
that seldom comes costs more than an early victim now and then.
"""

from __future__ import annotations

import math
from collections import deque

SLOT_S = 5.0
SLOTS = 24  # two minutes
LIMIT_MEMORY_S = 60.0  # how long an arrival's limit counts among the recent ones
MOST_LIMITS = 256


class LoadMeter:
    """Load = arrivals per second / capacity; capacity = the most requests finished in a slot in which others waited.

    Only then does what is finished say what can be finished: where nobody has waited for two minutes, load is 0.
    """

    def __init__(self) -> None:
        # of each slot: arrived, finished, looks, looks that found somebody waiting
        self._slots: deque[list[int]] = deque([[0, 0, 0, 0]], maxlen=SLOTS)
        self._start_s: float | None = None
        self._known: tuple[float, float] | None = None  # (arrivals a slot, capacity) of the full slots

    def count(self, now_s: float, arrived: int, finished: int, waiting: int = 0) -> None:
        """Note what arrived and finished since the last call, and how many wait now."""
        if self._start_s is None:
            self._start_s = now_s
        behind = int(min((now_s - self._start_s) / SLOT_S, SLOTS))
        for _ in range(behind):
            self._slots.append([0, 0, 0, 0])
            self._known = None
        self._start_s = now_s if behind >= SLOTS else self._start_s + behind * SLOT_S
        slot = self._slots[-1]
        slot[0] += arrived
        slot[1] += finished
        slot[2] += 1
        slot[3] += waiting > 0

    def load(self, waiting: int) -> float:
        """Arrivals over capacity; with an empty queue at most 1; NaN before anything finished."""
        arrivals, capacity = self._known or self._rates()
        if math.isnan(capacity):
            return math.nan
        load = arrivals / capacity if capacity else 0.0
        return load if waiting else min(load, 1.0)

    def _rates(self) -> tuple[float, float]:
        full = list(self._slots)[:-1]
        counted = full or list(self._slots)
        arrivals = sum(slot[0] for slot in counted) / len(counted)
        busy = [done for _, done, looks, waited in counted if 2 * waited >= max(looks, 1)]
        capacity = float(max(busy, default=0))
        if not any(slot[1] for slot in self._slots):
            capacity = math.nan
        if full:  # these do not change until a slot is complete
            self._known = arrivals, capacity
        return arrivals, capacity


class RecentLimits:
    """The tightest first-token limit among the arrivals of the last minute."""

    def __init__(self) -> None:
        self._limits: deque[tuple[float, float]] = deque(maxlen=MOST_LIMITS)  # (arrival, limit), s

    def arrived(self, now_s: float, ttft_s: float) -> None:
        """Note the limit of one that has just come; those before it that are no tighter will not be asked for again."""
        while self._limits and self._limits[-1][1] >= ttft_s:
            self._limits.pop()
        self._limits.append((now_s, ttft_s))

    def tightest_s(self, now_s: float) -> float:
        """The tightest recent limit, s; inf: there was none."""
        while self._limits and self._limits[0][0] < now_s - LIMIT_MEMORY_S:
            self._limits.popleft()
        return self._limits[0][1] if self._limits else math.inf
