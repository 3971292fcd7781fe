"""May a request enter? KV admission by a forecast of the peak (CacheOPT C2, C3), or SGLang's own ratio.

Forecast: each running request grows one token an iteration until its bound, then frees what it holds alone. With
requests sorted by remaining tokens r, longest first, and held tokens h, the total just before the i-th one ends is

    peak_i = shared + sum_{j <= i} h_j + i * r_i          (those ending earlier are gone, the i left have grown r_i)

and the forecast peak is the largest of them. A newcomer may enter if the peak with it stays within capacity less
the reserve. Reuse of what others were given and do not use yet (C2) is exactly this: a guest that ends before its
host needs the space adds nothing to the peak. Where KV comes in pages, h is whole pages: what is free in the last page of
some makes up for the page that others begin, so the forecast errs to neither side. Where a promise rests on it, each is
counted with a further page.

How far the forecast looks ahead is a choice: r is cut at a number of iterations. Who can still keep its promise
enters by the near one, since what comes later is left to preemption; who cannot loses nothing by waiting a little
longer, and pays with a prefill if it comes too early: it enters by the far one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

UNBOUNDED = 1 << 30  # iterations of look-ahead: more than any request writes


@dataclass(frozen=True, slots=True)
class Need:
    """What a request brings. Tokens of KV."""

    tokens: int  # at once
    remaining: int  # at most, later, by its predicted bound
    declared: int = 0  # at the very most, later, if it cannot be preempted any more; else 0
    far: bool = False  # whether it has to fit the far forecast too
    keep_free: int = 0  # what it has to leave beside it for others; not charged
    overdraft: int = 0  # by how much it may pass the limit
    first: int = 1  # of what comes later, what its first decode takes
    window: int = 0  # what it may hold of the pool of layers that look back over a window, if there is one


class Ledger(Protocol):
    """Admission of one request after another within an iteration."""

    def admits(self, need: Need) -> bool:
        """True if a request that needs so much may enter; it is charged then, and only then."""
        ...


class LateLedger:
    """A ledger that is made when it is first asked: most iterations admit nobody."""

    def __init__(self, make: Callable[[], Ledger]) -> None:
        self._make = make
        self._ledger: Ledger | None = None

    def admits(self, need: Need) -> bool:
        """See Ledger."""
        if self._ledger is None:
            self._ledger = self._make()
        return self._ledger.admits(need)


class Forecast:
    """The forecast peak of a set of requests, and of what it would be with one more.

    `held` int[n]: KV that each holds alone; `remaining` int[n]: its bounded remaining output, cut at `horizon`
    iterations; `shared_tokens`: KV that is held but freed by none of them alone.
    """

    def __init__(
        self, held: np.ndarray, remaining: np.ndarray, shared_tokens: int, horizon: int = UNBOUNDED
    ) -> None:
        remaining = np.minimum(remaining, horizon)
        order = np.argsort(-remaining, kind="stable")
        self._held = held[order].astype(np.int64)
        self._remaining = remaining[order].astype(np.int64)
        self._shared, self._horizon = shared_tokens, horizon
        self._update()

    def _update(self) -> None:
        n = len(self._held)
        self._sums = np.cumsum(self._held)
        self._peaks = self._sums + self._remaining * np.arange(1, n + 1)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def peak(self) -> int:
        """Forecast peak, tokens; O(n log n) in all."""
        return self._shared + (int(self._peaks.max()) if len(self._peaks) else 0)

    def peak_with(self, tokens: int, remaining: int) -> int:
        """Forecast peak if one more entered: those that outlive it each carry its tokens, it carries theirs."""
        remaining = min(remaining, self._horizon)
        i = int(np.searchsorted(-self._remaining, -remaining, side="right"))
        longer = int(self._peaks[:i].max()) if i else 0  # it is gone before these end
        before = int(self._sums[i - 1]) if i else 0
        own = before + tokens + (i + 1) * remaining
        shorter = 0
        if i < len(self._peaks):
            shorter = int((self._peaks[i:] + self._remaining[i:]).max()) + tokens
        return self._shared + max(longer, own, shorter)

    def add(self, tokens: int, remaining: int) -> None:
        """One more has entered."""
        remaining = min(remaining, self._horizon)
        i = int(np.searchsorted(-self._remaining, -remaining, side="right"))
        self._held = np.insert(self._held, i, tokens)
        self._remaining = np.insert(self._remaining, i, remaining)
        self._update()


class ForecastLedger:
    """Admits while the forecast peak stays within what the pool can hold less the reserve.

    `held`, `remaining` int[n] and `shared_tokens` as in `Forecast`; `near`, `far`: iterations of look-ahead. Beside it
    the `final` requests, bool[n], who cannot be preempted any more, are counted to the very most that they may write
    (`declared` int[n]): as long as the others can be made to leave, the pool holds all of the final ones to their end
    (but for one whose declared maximum alone is more than the pool).
    """

    def __init__(
        self,
        held: np.ndarray,
        remaining: np.ndarray,
        shared_tokens: int,
        capacity_tokens: int,
        reserve_tokens: int,
        *,
        near: int = UNBOUNDED,
        far: int = UNBOUNDED,
        final: np.ndarray | None = None,
        declared: np.ndarray | None = None,
        page_tokens: int = 1,
    ) -> None:
        self._near = Forecast(held, remaining, shared_tokens, near)
        self._make_far: Callable[[], Forecast] = lambda: Forecast(held, remaining, shared_tokens, far)
        self._far: Forecast | None = None  # made when it is first asked for
        self._entered: list[Need] = []
        self._slack = page_tokens - 1  # whole(h + r) <= whole(h) + r + slack
        if final is None or declared is None or not final.any():
            final = declared = np.zeros(0, np.int64)
            self._final = Forecast(final, declared, shared_tokens)
        else:
            self._final = Forecast(held[final] + self._slack, declared[final], shared_tokens)
        self._capacity, self._shared = capacity_tokens, shared_tokens
        self._limit = capacity_tokens - reserve_tokens

    @property
    def peak(self) -> int:
        """Near forecast peak with everyone admitted so far, tokens."""
        return self._near.peak

    def admits(self, need: Need) -> bool:
        """See Ledger. A request that would be alone enters whenever its prompt fits, whatever its bound says."""
        alone = len(self._near) == 0 and need.tokens + need.first <= self._capacity - self._shared
        if not alone and not self._fits(need):
            return False
        self._entered.append(need)
        self._near.add(need.tokens, need.remaining)
        if self._far is not None:
            self._far.add(need.tokens, need.remaining)
        if need.declared:
            self._final.add(need.tokens + self._slack, need.declared)
        return True

    def _fits(self, need: Need) -> bool:
        limit = self._limit - need.keep_free + need.overdraft
        if self._near.peak_with(need.tokens, need.remaining) > limit:
            return False
        both = need.declared and len(self._final)
        if both and self._final.peak_with(need.tokens + self._slack, need.declared) > self._capacity:
            return False
        return not need.far or self._far_ledger().peak_with(need.tokens, need.remaining) <= limit

    def _far_ledger(self) -> Forecast:
        if self._far is None:
            self._far = self._make_far()
            for need in self._entered:
                self._far.add(need.tokens, need.remaining)
        return self._far


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

    def admits(self, need: Need) -> bool:
        """See Ledger. A request that would be alone enters whenever its prompt fits, whatever its bound says."""
        total = need.tokens + need.remaining
        alone = self._empty and need.tokens + need.first <= self._most_alone
        if not alone and self.peak + total > self._limit - need.keep_free + need.overdraft:
            return False
        self.peak += total
        self._empty = False
        return True


# SGLang, schedule_policy.py: admission clips what a request may still write to this many tokens
CLIP_MAX_NEW_TOKENS = 4096


class StockLedger:
    """SGLang's rule: `ratio` of what the running ones may still write, and a newcomer's maximum in full and a page."""

    def __init__(
        self, free_tokens: int, running_left: np.ndarray, ratio: float, page_tokens: int = 1
    ) -> None:
        self._page = page_tokens
        self._left = free_tokens - ratio * float(np.minimum(running_left, CLIP_MAX_NEW_TOKENS).sum())

    def admits(self, need: Need) -> bool:
        """See Ledger; here `remaining` is the declared maximum less what was generated."""
        total = need.tokens + min(need.remaining, CLIP_MAX_NEW_TOKENS) + self._page
        if total >= self._left - need.keep_free + need.overdraft:
            return False
        self._left -= total
        return True
