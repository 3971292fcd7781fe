"""What one iteration gives a request that decodes, and the KV it takes: a token, or under speculative decoding a burst.

Then a step verifies `verified_tokens` of each request at once, and at least one of them comes out. How many is known when
its results are, an iteration later, so SGLang keeps room for two steps behind what is known to be computed:

    |== known to be computed ==|... in flight ...|... next step ...|
                               |<--------- reserve_tokens -------->|

At the next step a request has slots for what is known and the reserve; each later one takes as many more as come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_slo.core import pages


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What SGLang computes and allocates for one request in one decode."""

    verified_tokens: int = 1  # that go through the layers; at most so many come out
    reserve_tokens: int = 1  # slots behind what is known to be computed

    @property
    def bursts(self) -> bool:
        """Whether a step may give several tokens."""
        return self.verified_tokens > 1

    @property
    def spare_tokens(self) -> int:
        """Slots of a request that decodes beyond its context."""
        return self.reserve_tokens - 1

    def growth_tokens(
        self,
        slots: np.ndarray,
        computed: np.ndarray,
        remaining: np.ndarray,
        iterations: int,
        each: float = 1.0,
        page: int = 1,
    ) -> np.ndarray:
        """KV that requests which decode may take within so many iterations; int[n], in whole pages, none that they free.

        `slots` int[n], tokens that each has slots for; `computed` int[n], tokens whose KV is known to be there; `remaining`
        int[n], bounded output still to come; `each`: tokens that a step gives on average. The first iteration takes what
        SGLang's own check asks for.
        """
        if not self.bursts:
            return pages.growth(slots, np.clip(remaining, 1, iterations), page)
        later = np.minimum(np.ceil((iterations - 1) * each), remaining).astype(np.int64)
        needed = np.maximum(computed + self.reserve_tokens + later, slots)
        return pages.growth(slots, needed - slots, page)


PLAIN = DecodeStep()


class BurstLength:
    """Tokens that a step has given a request lately, on average over steps and requests; 1 before any."""

    def __init__(self) -> None:
        self._tokens = self._steps = 0.0

    def seen(self, tokens: int, steps: int) -> float:
        """`steps` requests were given `tokens` in one iteration; returns the new average, at least 1."""
        self._tokens = FORGETTING * self._tokens + tokens
        self._steps = FORGETTING * self._steps + steps
        return max(self._tokens / self._steps, 1.0) if self._steps else 1.0


FORGETTING = 0.99  # an iteration: the average follows in a hundred or so
