"""Quantiles of a changing multiset of durations, within 1 %, in bounded memory.

Values fall into geometric bins of ratio (1 + a) / (1 - a): a bin's middle is within a = 1 % of each value in
it. Counts can be added and taken away again, which is what a sliding window needs. Zero has a bin of its own,
and what lies outside `SHORTEST_S` .. `LONGEST_S` is counted at that end: never more than about 1,300 bins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ACCURACY = 0.01
SHORTEST_S, LONGEST_S = 1e-6, 1e5  # a microsecond to a day and a bit
_LOG_RATIO = math.log((1 + ACCURACY) / (1 - ACCURACY))
_FIRST, _LAST = (math.ceil(math.log(end) / _LOG_RATIO) for end in (SHORTEST_S, LONGEST_S))
_ZERO = _FIRST - 1

Bins = Counter[int]


def bin_of(value_s: float) -> int:
    """The bin of a duration of at least 0 seconds."""
    if value_s < SHORTEST_S:
        return _ZERO
    return min(max(math.ceil(math.log(value_s) / _LOG_RATIO), _FIRST), _LAST)


def middle_s(index: int) -> float:
    """The value that stands for a bin, seconds: within `ACCURACY` of every value in it."""
    return 0.0 if index == _ZERO else math.exp(index * _LOG_RATIO) * (1 - ACCURACY)


def quantiles_s(bins: Bins, shares: Sequence[float]) -> list[float | None]:
    """Nearest-rank quantiles, seconds, for ascending `shares` in (0, 1]; None for each if `bins` is empty."""
    total = sum(bins.values())
    if total == 0:
        return [None] * len(shares)
    found: list[float | None] = []
    seen, order = 0, iter(sorted(bins))
    index = _ZERO
    for share in shares:
        rank = max(math.ceil(share * total - 1e-9), 1)
        while seen < rank:
            index = next(order)
            seen += bins[index]
        found.append(middle_s(index))
    return found
