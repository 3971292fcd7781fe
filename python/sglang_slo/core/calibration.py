"""How wrong predicted lengths have been lately, and the padding that makes their bounds hold.

`Calibration` keeps the log errors of the latest finished requests of each bucket (octave of the predicted median)
and turns raw quantiles into ones that held: split conformal per bucket and level (default), or CacheOPT's Hoeffding
padding. A quantile tracker on top nudges each level by what was just missed or wasted, so that coverage comes back
after a shift even where the window still remembers the time before. No clock, no randomness: same calls, same bounds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.lengths import MEDIAN, QUANTILES, Floats

BUCKETS = 16  # octaves of the predicted median, 1 .. 32768 tokens and more
WINDOW = 384  # errors kept per bucket
MIN_COUNT = 40  # a bucket with fewer errors borrows everybody's
REFRESH = 8  # offsets are worked out anew after so many finished requests
RATE = 0.06  # step of the tracker per miss, in units of the spread of the errors
TRIM = 0.05  # share of the errors cut off at either end before Hoeffding's range is taken


def bucket_of(log_quantiles: Floats) -> NDArray[np.intp]:
    """Bucket [n] of each row of log quantiles [n, Q]: the octave of its median."""
    octave = np.floor(log_quantiles[:, MEDIAN] / math.log(2.0))
    found: np.ndarray = np.clip(np.nan_to_num(octave), 0, BUCKETS - 1).astype(np.intp)
    return found


def hoeffding_pad(errors_tokens: Floats, confidence: float | Floats) -> Floats:
    """CacheOPT's one-sided padding in tokens, t = (b - a) sqrt(ln(1 / (1 - P)) / 2), clipped to [0, b - a].

    [a, b] is the trimmed range of the errors (length - prediction) seen in a bucket; shaped as `confidence`.
    The weakness: Hoeffding bounds the deviation of a *mean* of n draws; for the single draw at hand (n = 1) it
    says little more than "within the range" (t >= b - a from P = 0.865 on), so it wastes tokens at high P, and
    what was trimmed is not covered at all.
    """
    if len(errors_tokens) == 0:
        return np.zeros(np.shape(confidence))
    low, high = np.quantile(errors_tokens, [TRIM, 1 - TRIM])
    return np.asarray((high - low) * np.minimum(1.0, np.sqrt(-np.log1p(-np.asarray(confidence)) / 2)))


def conformal_offsets(errors: Floats) -> Floats:
    """Split-conformal offset of each level, [Q]: the ceil((n + 1) p)-th smallest of the n errors of that level.

    `errors` [n, Q]: log length minus predicted log quantile. Where n is too small for a level the largest error is
    taken. Source: Vovk et al., Romano et al. (conformalized quantile regression), one-sided, one level at a time.
    """
    n = len(errors)
    if n == 0:
        return np.zeros(len(QUANTILES))
    rank = np.minimum(np.ceil((n + 1) * QUANTILES).astype(int), n) - 1
    ordered: Floats = np.sort(errors, axis=0)[rank, np.arange(len(QUANTILES))]
    return ordered


class Calibration:
    """Rolling errors per bucket and the padding that follows from them. Memory is fixed: BUCKETS x WINDOW rows."""

    def __init__(self, window: int = WINDOW, rate: float = RATE) -> None:
        self.window, self.rate = window, rate
        self._errors = np.zeros((BUCKETS, window, len(QUANTILES)), np.float32)
        self._log_length = np.zeros((BUCKETS, window), np.float32)
        self.count = np.zeros(BUCKETS, np.int64)  # ever seen, the ring holds the last `window`
        self._offsets = np.zeros((BUCKETS, len(QUANTILES)))
        self._pads_tokens = np.zeros((BUCKETS, len(QUANTILES)))
        self._tracker = np.zeros(len(QUANTILES))
        self._waiting = np.zeros(BUCKETS, np.int64)  # added since the bucket's padding was worked out
        self._covered = np.zeros((window, len(QUANTILES)), np.float32)
        self.updates = 0

    def add(self, raw: Floats, log_length: float, issued: Floats | None = None) -> None:
        """Learn from one finished request: raw and issued log quantiles [Q], natural log of its length in tokens.

        Without `issued` (seeding from held-out data) the tracker and the coverage record stay as they are.
        """
        bucket = int(bucket_of(raw[None])[0])
        slot = int(self.count[bucket] % self.window)
        self._errors[bucket, slot] = log_length - raw
        self._log_length[bucket, slot] = log_length
        self.count[bucket] += 1
        if issued is not None:
            missed = log_length > issued + 1e-9
            self._covered[self.updates % self.window] = ~missed
            self.updates += 1
            self._tracker += self.rate * self._spread(bucket) * (missed - (1 - QUANTILES))
            self._tracker = np.clip(self._tracker, -2.0, 2.0)
            self._waiting[bucket] += 1
            if self._waiting[bucket] == REFRESH:
                self._refresh(bucket)

    def refresh(self) -> None:
        """Work all padding out anew from the errors kept."""
        for bucket in range(BUCKETS):
            self._refresh(bucket)

    def _refresh(self, bucket: int) -> None:
        self._waiting[bucket] = 0
        n = min(int(self.count[bucket]), self.window)
        if n >= MIN_COUNT:
            errors, logs = self._errors[bucket, :n], self._log_length[bucket, :n]
        else:
            errors, logs = self._kept()
        self._offsets[bucket] = conformal_offsets(errors)
        miss_tokens = np.exp(logs) - np.exp(logs - errors[:, MEDIAN])
        self._pads_tokens[bucket] = hoeffding_pad(miss_tokens, QUANTILES)

    def apply(self, raw: Floats, bound: str = "conformal") -> Floats:
        """Calibrated log quantiles [n, Q] of raw ones, monotone along a row. `bound`: conformal or hoeffding.

        Hoeffding pads the median upwards; the levels below the median, which no bound uses, stay conformal.
        """
        bucket = bucket_of(raw)
        out = raw + self._offsets[bucket] + self._tracker
        if bound == "hoeffding":
            point_tokens = np.exp(raw[:, MEDIAN : MEDIAN + 1])
            padded = np.log(np.maximum(point_tokens + self._pads_tokens[bucket], 1.0))
            out[:, MEDIAN:] = padded[:, MEDIAN:]
        elif bound != "conformal":
            raise ValueError(f"bound: need conformal or hoeffding, got {bound!r}")
        return np.maximum.accumulate(np.maximum(out, 0.0), axis=1)

    def coverage(self, last: int = 128) -> Floats | None:
        """Share of the `last` finished requests within each issued level, [Q]; None before there are that many."""
        if self.updates < last or last > self.window:
            return None
        slots = np.arange(self.updates - last, self.updates) % self.window
        return np.asarray(self._covered[slots].mean(axis=0))

    def seed(self, raw: Floats, log_lengths: Floats) -> None:
        """Fill from held-out rows: raw log quantiles [n, Q] and log lengths [n]."""
        buckets = bucket_of(raw)
        for bucket in np.unique(buckets):
            rows = np.flatnonzero(buckets == bucket)[-self.window :]
            self._errors[bucket, : len(rows)] = log_lengths[rows, None] - raw[rows]
            self._log_length[bucket, : len(rows)] = log_lengths[rows]
            self.count[bucket] = len(rows)
        self.refresh()

    def _spread(self, bucket: int) -> float:
        """Size of the errors of a bucket, log units: the tracker's steps are measured by it."""
        offsets = self._offsets[bucket]
        return float(np.clip(np.abs(offsets).max(), 0.25, 2.0))

    def _kept(self) -> tuple[Floats, Floats]:
        kept = np.arange(self.window)[None, :] < np.minimum(self.count, self.window)[:, None]
        return self._errors[kept], self._log_length[kept]
