"""The figures of many streams at once, as their tokens go out, without storing them: one array write for all.

`GapTail` keeps the longest 1 % of the gaps of one request; `DeliveryTable` has a row for each live request and
gives its `Deliveries` when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_slo.core.attainment import (
    NO_GAPS_S,
    Deliveries,
    Floats,
    Ints,
    gap_limit_s,
    rank_from_top,
)
from sglang_slo.core.slo import Slo


class GapTail:
    """The gaps of one request so far: how many, their sum, and the longest ones.

    `most_gaps` bounds the number of gaps to come (max_new_tokens - 1). Up to it the figure is exact;
    beyond it, should a caller be wrong, the figure is never too short. Memory: 1 % of `most_gaps` floats.
    """

    __slots__ = ("_keep", "_longest", "count", "sum_s")

    def __init__(self, most_gaps: int) -> None:
        self._keep = rank_from_top(max(most_gaps, 0))
        self._longest: Floats = np.empty(0)
        self.count = 0
        self.sum_s = 0.0

    def extend(self, gaps_s: Floats | Sequence[float]) -> None:
        """Take further gaps, seconds, shape [n]."""
        values = np.asarray(gaps_s, dtype=np.float64)
        self.count += values.size
        self.sum_s += float(values.sum())
        longest = np.concatenate((self._longest, values))
        if longest.size > self._keep:
            longest = np.partition(longest, longest.size - self._keep)[-self._keep :]
        self._longest = longest

    @property
    def max_s(self) -> float:
        """The longest gap, seconds; `NO_GAPS_S` if there are none."""
        return float(self._longest.max()) if self.count else NO_GAPS_S

    @property
    def mean_s(self) -> float:
        """Mean gap (TPOT), seconds; `NO_GAPS_S` if there are none."""
        return self.sum_s / self.count if self.count else NO_GAPS_S

    @property
    def p99_s(self) -> float:
        """99th percentile gap, seconds; `NO_GAPS_S` if there are none."""
        if self.count == 0:
            return NO_GAPS_S
        rank = min(rank_from_top(self.count), self._longest.size)
        return float(np.partition(self._longest, self._longest.size - rank)[self._longest.size - rank])


class DeliveryTable:
    """Streams by `slot`, small numbers chosen by the caller; the table grows when one beyond it is opened."""

    def __init__(self, slots: int = 64, block: int = 64) -> None:
        n = max(slots, 1)
        self._block = block
        self._waiting: Floats = np.empty((n, block))  # gaps not yet in their tail
        self._filled: Ints = np.zeros(n, np.int64)
        self._tokens: Ints = np.zeros(n, np.int64)
        self._first_s, self._last_s = np.zeros(n), np.zeros(n)
        self._limit_s, self._lag_s = np.zeros(n), np.zeros(n)
        self._tails: dict[int, GapTail] = {}

    def open(self, slot: int, slo: Slo, most_tokens: int) -> None:
        """Begin a stream of at most `most_tokens` tokens in `slot`; whatever the slot held is dropped."""
        if slot >= len(self._filled):
            self._grow(max(2 * len(self._filled), slot + 1) - len(self._filled))
        self._filled[slot] = self._tokens[slot] = 0
        self._lag_s[slot] = 0.0
        self._limit_s[slot] = gap_limit_s(slo)
        self._tails[slot] = GapTail(most_tokens - 1)

    def add(self, slots: Ints, now_s: float, new_tokens: Ints | int = 1) -> None:
        """A delivery of `new_tokens` (above 0) at `now_s` to each open slot in `slots` [n], each at most once."""
        tokens = self._tokens[slots]
        self._tokens[slots] = tokens + new_tokens
        begun = tokens > 0
        if not begun.all():
            first = slots[~begun]
            self._first_s[first] = self._last_s[first] = now_s
            slots, tokens = slots[begun], tokens[begun]
        gaps_s = now_s - self._last_s[slots]
        self._last_s[slots] = now_s
        late_s = now_s - self._first_s[slots] - tokens * self._limit_s[slots]
        self._lag_s[slots] = np.maximum(self._lag_s[slots], late_s)
        filled = self._filled[slots]
        self._waiting[slots, filled] = gaps_s
        filled += 1
        self._filled[slots] = filled
        for slot in slots[filled == self._block].tolist():
            self._flush(slot)

    def tokens(self, slots: Ints) -> Ints:
        """Tokens out so far of open slots [n]."""
        return self._tokens[slots]

    def close(self, slot: int, left_s: float | None = None) -> Deliveries:
        """End the stream in `slot`. `left_s`: when it was given up while it waited for a token; see `Deliveries`.

        Raises KeyError if the slot is not open.
        """
        tail, tokens = self._tails[slot], int(self._tokens[slot])
        self._flush(slot)
        del self._tails[slot]
        if tokens == 0:
            return Deliveries(end_s=0.0 if left_s is None else left_s)
        first_s, last_s, lag_s = (float(c[slot]) for c in (self._first_s, self._last_s, self._lag_s))
        gaps, counted = tail.count, tokens
        if left_s is not None:
            tail.extend([left_s - last_s])
            lag_s = max(lag_s, left_s - first_s - tokens * float(self._limit_s[slot]))
            counted += 1
        end_s = last_s if left_s is None else left_s
        return Deliveries(
            tokens,
            gaps,
            first_s,
            last_s,
            end_s,
            tail.max_s,
            tail.p99_s,
            (end_s - first_s) / (counted - 1) if counted > 1 else NO_GAPS_S,
            lag_s,
        )

    def _grow(self, more: int) -> None:
        self._waiting = np.concatenate((self._waiting, np.empty((more, self._block))))
        for name in ("_filled", "_tokens", "_first_s", "_last_s", "_limit_s", "_lag_s"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(more, column.dtype))))

    def _flush(self, slot: int) -> None:
        self._tails[slot].extend(self._waiting[slot, : self._filled[slot]])
        self._filled[slot] = 0
