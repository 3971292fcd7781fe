"""May a request enter? KV admission by a forecast of the peak (CacheOPT C2, C3), or SGLang's own ratio.

Forecast: each running request grows one token an iteration until its bound, then frees what it holds alone. With
requests sorted by remaining tokens r, longest first, and held tokens h, the total just before the i-th one ends is

    peak_i = shared + sum_{j <= i} h_j + i * r_i          (those ending earlier are gone, the i left have grown r_i)

and the forecast peak is the largest of them. A newcomer may enter if the peak with it stays within capacity less
the reserve. Reuse of what others were given and do not use yet (C2) is exactly this: a guest that ends before its
host needs the space adds nothing to the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np


class Ledger(Protocol):
    """Admission of one request after another within an iteration."""

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """True if a request that brings `prefill_tokens` now and up to `remaining_tokens` later may enter; charges it.

        `final_tokens`: what it may write at the very most, if it cannot be preempted any more; else 0.
        `beside_tokens`: what has to be left for others beside it; not charged. Negative: it may pass the
        limit by so much.
        """
        ...


class LateLedger:
    """A ledger that is made when it is first asked: most iterations admit nobody."""

    def __init__(self, make: Callable[[], Ledger]) -> None:
        self._make = make
        self._ledger: Ledger | None = None

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """See Ledger."""
        if self._ledger is None:
            self._ledger = self._make()
        return self._ledger.admits(prefill_tokens, remaining_tokens, final_tokens, beside_tokens)


def peak_tokens(held: np.ndarray, remaining: np.ndarray) -> int:
    """Forecast peak of total KV, tokens. held, remaining: int[n] (see the module's derivation); O(n log n)."""
    if len(held) == 0:
        return 0
    order = np.argsort(-remaining, kind="stable")
    h, r = held[order], remaining[order]
    return int((np.cumsum(h) + r * np.arange(1, len(h) + 1)).max())


class ForecastLedger:
    """Admits while the forecast peak stays within what the pool can hold less the reserve.

    `held` int[n]: KV that each running request holds alone; `remaining` int[n]: its bounded remaining output;
    `shared_tokens`: KV that is held but freed by none of them alone; `capacity_tokens`: the pool.
    """

    def __init__(
        self,
        held: np.ndarray,
        remaining: np.ndarray,
        shared_tokens: int,
        capacity_tokens: int,
        reserve_tokens: int,
    ) -> None:
        order = np.argsort(-remaining, kind="stable")
        self._held = held[order].astype(np.int64)
        self._remaining = remaining[order].astype(np.int64)
        self._shared = shared_tokens
        self._limit = capacity_tokens - reserve_tokens
        self._capacity = capacity_tokens
        self._update()

    def _update(self) -> None:
        n = len(self._held)
        self._sums = np.cumsum(self._held)
        self._peaks = self._sums + self._remaining * np.arange(1, n + 1)

    @property
    def peak(self) -> int:
        """Forecast peak with everyone admitted so far, tokens."""
        return self._shared + (int(self._peaks.max()) if len(self._peaks) else 0)

    def peak_with(self, prefill_tokens: int, remaining_tokens: int) -> int:
        """Forecast peak if one more entered: those that outlive it each carry its tokens, it carries theirs."""
        i = int(np.searchsorted(-self._remaining, -remaining_tokens, side="right"))
        longer = int(self._peaks[:i].max()) if i else 0  # it is gone before these end
        before = int(self._sums[i - 1]) if i else 0
        own = before + prefill_tokens + (i + 1) * remaining_tokens
        shorter = 0
        if i < len(self._peaks):
            shorter = int((self._peaks[i:] + self._remaining[i:]).max()) + prefill_tokens
        return self._shared + max(longer, own, shorter)

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """See Ledger. A request that would be alone enters whenever its prompt fits, whatever its bound says."""
        alone = len(self._held) == 0 and prefill_tokens + 1 <= self._capacity - self._shared
        if not alone and self.peak_with(prefill_tokens, remaining_tokens) > self._limit - beside_tokens:
            return False
        i = int(np.searchsorted(-self._remaining, -remaining_tokens, side="right"))
        self._held = np.insert(self._held, i, prefill_tokens)
        self._remaining = np.insert(self._remaining, i, remaining_tokens)
        self._update()
        return True


class GuardedLedger:
    """`everyone`'s forecast, and beside it that of the `final` ones alone, who cannot be preempted any more.

    These are counted to the very most that they may write: as long as the others can be made to leave, the pool holds
    all of the final ones to their end (but for one whose declared maximum alone is more than the pool).
    """

    def __init__(self, everyone: Ledger, final: Ledger, peak: int) -> None:
        self._everyone, self._final = everyone, final
        self.peak = peak

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """See Ledger."""
        if final_tokens and not self._final.admits(prefill_tokens, final_tokens):
            return False
        return self._everyone.admits(prefill_tokens, remaining_tokens, 0, beside_tokens)


class FullLedger:
    """Keeps for each request all that it holds and may still write, until it ends: no reuse (CacheOPT without C2)."""

    def __init__(
        self,
        held: np.ndarray,
        remaining: np.ndarray,
        shared_tokens: int,
        capacity_tokens: int,
        reserve_tokens: int,
    ) -> None:
        self.peak = shared_tokens + int((held + remaining).sum())
        self._empty = len(held) == 0
        self._most_alone = capacity_tokens - shared_tokens
        self._limit = capacity_tokens - reserve_tokens

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """See Ledger. A request that would be alone enters whenever its prompt fits, whatever its bound says."""
        need = prefill_tokens + remaining_tokens
        alone = self._empty and prefill_tokens + 1 <= self._most_alone
        if not alone and self.peak + need > self._limit - beside_tokens:
            return False
        self.peak += need
        self._empty = False
        return True


# SGLang 0.5.17, schedule_policy.py: admission clips what a request may still write to this many tokens
CLIP_MAX_NEW_TOKENS = 4096


class StockLedger:
    """SGLang's rule: `ratio` of what the running ones may still write, and a newcomer's maximum in full."""

    def __init__(self, free_tokens: int, running_left: np.ndarray, ratio: float) -> None:
        self._left = free_tokens - ratio * float(np.minimum(running_left, CLIP_MAX_NEW_TOKENS).sum())

    def admits(
        self, prefill_tokens: int, remaining_tokens: int, final_tokens: int = 0, beside_tokens: int = 0
    ) -> bool:
        """See Ledger; here `remaining_tokens` is the declared maximum less what was generated."""
        need = prefill_tokens + min(remaining_tokens, CLIP_MAX_NEW_TOKENS) + 1
        if need >= self._left - beside_tokens:
            return False
        self._left -= need
        return True
