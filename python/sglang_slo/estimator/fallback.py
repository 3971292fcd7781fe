"""What is known without a model: quantiles of the lengths of a class, of everybody, and the history of callers.

Also where the history columns of the features come from. Memory is bounded: the least recently used callers and
classes are forgotten.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.lengths import QUANTILES, Floats

WINDOW, MAX_CLASSES, MAX_CALLERS = 256, 64, 4096
MIN_COUNT = 8  # lengths before quantiles are believed
DECAY = 0.2  # weight of the newest length in a caller's running mean
REFRESH = 8  # quantiles are worked out anew after so many lengths

EVERYBODY = "\0everybody"


class _Ring:
    """The last `WINDOW` log lengths and their quantiles."""

    def __init__(self) -> None:
        self.logs = np.zeros(WINDOW)
        self.count = 0
        self.quantiles: Floats | None = None

    def add(self, log_length: float) -> None:
        self.logs[self.count % WINDOW] = log_length
        self.count += 1
        if self.count >= MIN_COUNT and (self.quantiles is None or self.count % REFRESH == 0):
            self.quantiles = np.quantile(self.logs[: min(self.count, WINDOW)], QUANTILES)


class History:
    """Lengths lately: of everybody, per class, per caller."""

    def __init__(self) -> None:
        self._classes: OrderedDict[str, _Ring] = OrderedDict({EVERYBODY: _Ring()})
        self._callers: OrderedDict[str, tuple[float, float, int]] = OrderedDict()

    def add(self, slo_class: str, caller: str, output_tokens: int) -> None:
        """Learn from one finished request."""
        log_length = math.log(max(1, output_tokens))
        self._classes[EVERYBODY].add(log_length)
        self._classes.setdefault(slo_class, _Ring()).add(log_length)
        self._classes.move_to_end(slo_class)
        self._classes.move_to_end(EVERYBODY)
        if len(self._classes) > MAX_CLASSES:
            self._classes.popitem(last=False)
        if caller:
            mean, _, count = self._callers.pop(caller, (log_length, 0.0, 0))
            self._callers[caller] = (
                mean + max(DECAY, 1 / (count + 1)) * (log_length - mean),
                log_length,
                count + 1,
            )
            if len(self._callers) > MAX_CALLERS:
                self._callers.popitem(last=False)

    def columns(self, slo_class: str, caller: str) -> tuple[float, ...]:
        """The history columns of a request's features: mean, last, count of the caller; mean, spread, count of the class."""
        nan = math.nan
        own = self._callers.get(caller)
        ring = self._classes.get(slo_class)
        first = (own[0], own[1], math.log1p(own[2])) if own else (nan, nan, nan)
        if ring is None or ring.quantiles is None:
            return (*first, nan, nan, nan)
        return (
            *first,
            float(ring.quantiles[3]),
            float(ring.quantiles[7] - ring.quantiles[0]),
            math.log1p(ring.count),
        )

    def class_quantiles(self, slo_class: str) -> Floats | None:
        """Log quantiles [Q] of a class, None before `MIN_COUNT` lengths."""
        ring = self._classes.get(slo_class)
        return None if ring is None else ring.quantiles

    def global_quantiles(self) -> Floats | None:
        """Log quantiles [Q] of everybody, None before `MIN_COUNT` lengths."""
        return self._classes[EVERYBODY].quantiles

    @property
    def doublings(self) -> int:
        """How often the number of lengths known has doubled since quantiles were first believed; 0 before."""
        return (self._classes[EVERYBODY].count // MIN_COUNT).bit_length()

    def mean_log_tokens(self) -> float | None:
        """Log of the mean length lately, None before `MIN_COUNT` lengths."""
        ring = self._classes[EVERYBODY]
        if ring.quantiles is None:
            return None
        logs: NDArray[np.floating] = ring.logs[: min(ring.count, WINDOW)]
        return float(np.log(np.exp(logs).mean()))
