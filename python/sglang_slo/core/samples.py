"""Measured iterations, kept for fitting: a bounded number, spread over all shapes that occur.

Traffic repeats itself: of the last thousand iterations most are decodes of nearly the same size, and a fit to
them alone would forget what a long prefill costs. So samples are kept by shape (a bin is an octave of tokens,
context and pairs), the latest few of each bin, and the bins not seen for longest go first. The latest
iterations in a row, whatever their shape, are kept beside them: they say how far off the model is on the
traffic as it is now.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.latency import BatchShape

Floats = NDArray[np.float64]
Row = tuple[float, float, float, float, float, float, float]  # a line of `Samples`
WIDTH = 7  # of a row

PER_BIN = 8
CAPACITY = 512  # samples in bins
RECENT = 4096  # latest iterations kept beside the bins
OLDEST = 20_000  # iterations after which a bin that got nothing new is dropped


@dataclass(frozen=True)
class Samples:
    """Measured iterations as arrays of n: what `BatchShape` holds, seconds taken, how much each counts."""

    extend: NDArray[np.bool_]
    new_tokens: Floats
    pairs: Floats
    context_tokens: Floats
    requests: Floats
    seconds: Floats
    weight: Floats

    @staticmethod
    def of(measured: Iterable[tuple[BatchShape, float]]) -> Samples:
        """From pairs of shape and seconds, each of weight 1."""
        return Samples.stack([_row(shape, seconds, 1.0) for shape, seconds in measured])

    @staticmethod
    def stack(rows: Sequence[Row] | Floats) -> Samples:
        """From rows in the order of the fields, float[n, 7] or a list of n."""
        table = np.array(rows, np.float64).reshape(len(rows), WIDTH)
        return Samples(table[:, 0] > 0, *(table[:, i] for i in range(1, WIDTH)))

    def __len__(self) -> int:
        return len(self.seconds)


class SampleWindow:
    """The samples that the next fit will see. Adding one costs a microsecond or two."""

    def __init__(self) -> None:
        self.added = 0
        self._bins: OrderedDict[tuple[int, ...], deque[Row]] = OrderedDict()  # least recently filled first
        self._touched: dict[tuple[int, ...], int] = {}
        self._recent = np.zeros((RECENT, WIDTH))  # a ring
        self._judged = 0
        self._held = 0

    def add(self, shape: BatchShape, seconds: float, weight: float = 1.0) -> None:
        """Take in one iteration. One of weight below 1 is fitted to, but not judged by (`recent`)."""
        self.added += 1
        row = _row(shape, seconds, weight)
        if weight >= 1:
            self._recent[self._judged % RECENT] = row
            self._judged += 1
        key = _bin(shape)
        kept = self._bins.get(key)
        if kept is None:
            kept = self._bins[key] = deque(maxlen=PER_BIN)
        else:
            self._bins.move_to_end(key)
        self._held += len(kept) < PER_BIN
        kept.append(row)
        self._touched[key] = self.added
        while self._held > CAPACITY or self._touched[next(iter(self._bins))] < self.added - OLDEST:
            oldest, rows = self._bins.popitem(last=False)
            del self._touched[oldest]
            self._held -= len(rows)

    def forget(self, keep: int) -> None:
        """All but the latest `keep` iterations say nothing any more of how far off the model is."""
        kept = min(keep, self._judged, RECENT)
        latest = np.arange(self._judged - kept, self._judged) % RECENT
        self._recent[:kept] = self._recent[latest]
        self._judged = kept

    def __len__(self) -> int:
        """Samples in bins, at most CAPACITY."""
        return self._held

    def diverse(self) -> Samples:
        """The samples of all bins."""
        return Samples.stack([row for rows in self._bins.values() for row in rows])

    def recent(self) -> Samples:
        """The latest iterations, at most RECENT, in no order."""
        return Samples.stack(self._recent[: self._judged])


def _row(shape: BatchShape, seconds: float, weight: float) -> Row:
    return (
        shape.extend,
        shape.new_tokens,
        shape.pairs,
        shape.context_tokens,
        shape.requests,
        seconds,
        weight,
    )


def _bin(shape: BatchShape) -> tuple[int, ...]:
    # bit_length: an octave each; pairs go with the square of tokens, so two octaves of theirs
    pairs = int(shape.pairs).bit_length() // 2
    return (shape.extend, shape.new_tokens.bit_length(), pairs, shape.context_tokens.bit_length())
