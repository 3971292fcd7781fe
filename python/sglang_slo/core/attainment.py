"""Whether a request got what it was promised: the one definition that server, twin and benchmarks share.

TTFT runs from arrival to the first token out. The TBT figure of a request is its 99th percentile gap by
nearest rank: the smallest gap such that at least 99 % of the request's gaps are no longer than it; with
fewer than 100 gaps that is the longest. A request attained when both figures are within its limits; no
limit is infinity, always kept. `GapTail` and `GapTable` give the exact figure of a stream of gaps without
storing the stream: n gaps put the figure at rank floor(n / 100) + 1 from the top, so the longest 1 % are
all that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.slo import Slo

Missed = Literal["ttft", "tbt", "both"]
Gaps = NDArray[np.float64]

NO_GAPS_S = 0.0  # the TBT figure of a request with one token or none: nothing was waited for


def rank_from_top(gaps: int) -> int:
    """Rank of the p99 among `gaps` values counted from the longest (1: the longest itself).

    Nearest rank is place ceil(99 n / 100) in ascending order: n - ceil(99 n / 100) + 1 from the top.
    """
    return gaps // 100 + 1


def p99_s(gaps_s: Gaps | Sequence[float]) -> float:
    """99th percentile of all gaps of a request, seconds; `NO_GAPS_S` if there are none."""
    values = np.asarray(gaps_s, dtype=np.float64)
    if values.size == 0:
        return NO_GAPS_S
    place = values.size - rank_from_top(values.size)
    return float(np.partition(values, place)[place])


def missed(slo: Slo, ttft_s: float, tbt_p99_s: float) -> Missed | None:
    """Which limit was missed, None if the request attained. Seconds; a figure equal to its limit is kept."""
    late, slow = ttft_s > slo.ttft_s, tbt_p99_s > slo.tbt_s
    if late and slow:
        return "both"
    return "ttft" if late else "tbt" if slow else None


class GapTail:
    """The gaps of one request so far: how many, their sum, and the longest ones.

    `most_gaps` bounds the number of gaps to come (max_new_tokens - 1). Up to it the figure is exact;
    beyond it, should a caller be wrong, the figure is never too short. Memory: 1 % of `most_gaps` floats.
    """

    __slots__ = ("_keep", "_longest", "count", "sum_s")

    def __init__(self, most_gaps: int) -> None:
        self._keep = rank_from_top(max(most_gaps, 0))
        self._longest: Gaps = np.empty(0)
        self.count = 0
        self.sum_s = 0.0

    def extend(self, gaps_s: Gaps | Sequence[float]) -> None:
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


class GapTable:
    """`GapTail`s of many requests at once, cheap per iteration: one array write for all, one flush a block.

    A row per running request (`slot`, chosen by the caller); the table grows when a slot beyond it is opened.
    """

    def __init__(self, slots: int = 64, block: int = 64) -> None:
        self._block = block
        self._waiting: Gaps = np.empty((max(slots, 1), block))
        self._filled: NDArray[np.int64] = np.zeros(max(slots, 1), dtype=np.int64)
        self._tails: dict[int, GapTail] = {}

    def open(self, slot: int, most_gaps: int) -> None:
        """Begin a request of at most `most_gaps` gaps in `slot`; whatever the slot held is dropped."""
        if slot >= len(self._filled):
            more = max(2 * len(self._filled), slot + 1) - len(self._filled)
            self._waiting = np.concatenate((self._waiting, np.empty((more, self._block))))
            self._filled = np.concatenate((self._filled, np.zeros(more, dtype=np.int64)))
        self._filled[slot] = 0
        self._tails[slot] = GapTail(most_gaps)

    def add(self, slots: NDArray[np.int64], gaps_s: Gaps | float) -> None:
        """One more gap for each open slot in `slots` [n], each at most once; `gaps_s` [n], or one for all."""
        filled = self._filled[slots]
        self._waiting[slots, filled] = gaps_s
        self._filled[slots] = filled + 1
        for slot in slots[filled + 1 == self._block]:
            self._flush(int(slot))

    def close(self, slot: int) -> GapTail:
        """End the request in `slot`; its gaps. Raises KeyError if the slot is not open."""
        tail = self._tails[slot]
        self._flush(slot)
        del self._tails[slot]
        return tail

    def _flush(self, slot: int) -> None:
        self._tails[slot].extend(self._waiting[slot, : self._filled[slot]])
        self._filled[slot] = 0


def ratio(figure_s: float, limit_s: float) -> float:
    """How much of a limit was used (1: all of it); 0 when nothing was promised."""
    return 0.0 if math.isinf(limit_s) else figure_s / limit_s
