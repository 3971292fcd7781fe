"""KV that requests with time to spare leave to those that are still to arrive with a deadline.

Who was preempted, or has missed its first-token limit, gains nothing by coming a little sooner. If it takes the last
of the KV, the next arrival in a hurry has to push somebody out, whose work is then done again. So the lost enter only
where room is left for what is likely to come: as much as came lately, at most a share of the pool. Without arrivals
that have a deadline nothing is held back.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0  # how far back arrivals count


class ArrivalReserve:
    """Tokens to leave free in a pool, at most `most_tokens`. Times are seconds on the tick's clock."""

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._arrivals: deque[tuple[float, int]] = deque()
        self._sum = 0

    def arrived(self, now_s: float, tokens: int) -> None:
        """Count a request with a deadline that asks for so much KV."""
        self._arrivals.append((now_s, tokens))
        self._sum += tokens

    def tokens(self, now_s: float) -> int:
        """What the arrivals of the last WINDOW_S asked for, capped."""
        while self._arrivals and self._arrivals[0][0] < now_s - WINDOW_S:
            self._sum -= self._arrivals.popleft()[1]
        return min(self._sum, self._most)
