"""The second pool of a model some of whose layers look back over a window alone: what each request takes of it, and may.

A token gets a slot in both pools. In this one SGLang takes back what lies behind the window of all tokens to come: of a
prompt when a piece of it has been computed, of an output every so many tokens. So a request ebbs and flows:

    prompt                                  |  output
    |-- given back --|-- a window, the tree's --|-- its own: at most a window and what is given back late --|

What a running request may take beside what it holds is bounded by a constant, whatever it writes, and it keeps that much
until it ends: the ledger adds the bounds up. It counts the window of the prompt to the end, which SGLang gives back
somewhat earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_slo.core import pages
from sglang_slo.core.kv.ledger import Ledger, Need


@dataclass(frozen=True)
class WindowPool:
    """The pool of one iteration. Tokens; what is given back late: `late_tokens` behind the window at most."""

    capacity_tokens: int
    free_tokens: int  # free and evictable
    window_tokens: int
    late_tokens: int
    own_tokens: np.ndarray  # int[n] slots of each decoding request that are its own, not the tree's
    page_tokens: int = 1

    @property
    def most_prompt(self) -> int:
        """What a prompt keeps of it at most once it is computed: a window, and the page that it ends in."""
        return pages.whole(self.window_tokens, self.page_tokens) + self.page_tokens

    @property
    def most_output(self) -> int:
        """What an output keeps of it at most; it may begin inside a page, and end inside one."""
        kept = pages.whole(self.window_tokens + self.late_tokens, self.page_tokens)
        return kept + 2 * self.page_tokens

    def growth_tokens(self, growth: np.ndarray) -> np.ndarray:
        """What each decoding request takes here while it takes `growth`, int[n], of the other pool; int[n]."""
        found: np.ndarray = np.minimum(growth, np.maximum(self.most_output - self.own_tokens, 0))
        return found

    def need_tokens(self, context: int, growth: int) -> int:
        """What a request of so much context keeps of it, with an output that takes `growth` of the other pool."""
        prompt = min(pages.whole(context, self.page_tokens), self.most_prompt)
        return prompt + min(growth, self.most_output)

    def found_tokens(self, history: int) -> int:
        """What a prompt of which so much is cached keeps from being evicted, before it takes anything."""
        return min(pages.whole(history, self.page_tokens), self.most_prompt)

    def without(self, positions: np.ndarray, freed_tokens: int) -> WindowPool:
        """The pool once the decoding requests at `positions` have left, which frees so much."""
        own = np.delete(self.own_tokens, positions)
        return replace(self, free_tokens=self.free_tokens + freed_tokens, own_tokens=own)


class WindowLedger:
    """Admits while everybody can take all that they may.

    `held_tokens`: what is neither free nor evictable; `later_tokens`: what those who hold it may take within the
    look-ahead, `soon_tokens`: before further victims can be found, which is what one whose deadline is near has to
    leave.
    """

    def __init__(
        self, capacity_tokens: int, held_tokens: int, later_tokens: int, soon_tokens: int, alone: bool
    ) -> None:
        self._capacity, self._held = capacity_tokens, held_tokens
        self._later, self._soon, self._alone = later_tokens, soon_tokens, alone

    def fits(self, need: Need) -> bool:
        """Whether it may enter. One that would be alone may: its pieces are cut to what there is."""
        growth = self._soon if need.overdraft else self._later
        return self._alone or self._held + growth + need.window <= self._capacity

    def add(self, need: Need) -> None:
        """It has entered."""
        self._held += need.window
        self._alone = False


class BothLedgers:
    """Admission by the ledgers of both pools."""

    def __init__(self, tokens: Ledger, window: WindowLedger) -> None:
        self._tokens, self._window = tokens, window

    @property
    def peak(self) -> int:
        """See ForecastLedger."""
        return self._tokens.peak  # type: ignore[attr-defined,no-any-return]

    def admits(self, need: Need) -> bool:
        """See Ledger."""
        if not self._window.fits(need) or not self._tokens.admits(need):
            return False
        self._window.add(need)
        return True
