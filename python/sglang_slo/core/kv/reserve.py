"""KV that admission leaves alone, as much as the forecast of KV has been wrong by lately (CacheOPT C3).

Every so often the running requests are looked at: the forecast says how much KV those of them that should still
run `HORIZON` iterations later will hold by then. When the time has come, those that do still run are added up. What
they hold beyond the forecast is its error (requests that outlived their bounds); less than forecast is no error, as
nothing had to be found for it. The reserve is a high quantile of the last errors, between a floor and a ceiling.
"""

from __future__ import annotations

from collections import deque

import numpy as np

HORIZON = 32  # iterations between a forecast and its settlement: victims make room for as long
LATEST = 2 * HORIZON  # a forecast that could not be settled by then says nothing any more
KEPT = 64  # errors that the reserve goes by
LEVEL = 0.95  # quantile of them


class Reserve:
    """The reserve of a pool of `capacity_tokens`; `floor` and `ceiling` are shares of it."""

    def __init__(self, capacity_tokens: int, floor: float, ceiling: float) -> None:
        self._low, self._high = int(floor * capacity_tokens), int(ceiling * capacity_tokens)
        self._errors: deque[int] = deque(maxlen=KEPT)
        self._open: tuple[int, np.ndarray, int] | None = None  # iteration, who ran, forecast of KV
        self.tokens = self._low  # the reserve

    def look(
        self,
        iteration: int,
        seq: np.ndarray,
        held: np.ndarray,
        remaining: np.ndarray,
        tokens_per_step: float = 1.0,
    ) -> None:
        """Settle the open forecast if its time has come, and make a new one; to be called every few iterations.

        All of the requests that run now: `seq` int[n], their arrival numbers; `held` int[n], KV of each alone;
        `remaining` int[n], bounded output still to come.
        """
        if self._open is not None:
            begun, ran, forecast = self._open
            if iteration - begun < HORIZON:
                return
            if iteration - begun <= LATEST:
                actual = int(held[np.isin(seq, ran)].sum())
                self._errors.append(max(actual - forecast, 0))
                error = int(np.quantile(np.array(self._errors), LEVEL, method="higher"))
                self.tokens = min(max(error, self._low), self._high)
        growth = int(HORIZON * tokens_per_step)
        still = remaining > growth
        self._open = iteration, seq.copy(), int((held[still] + growth).sum())
