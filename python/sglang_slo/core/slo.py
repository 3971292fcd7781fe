"""What a request was promised: its limits, its class, and the tightness bucket they fall in.

Limits come in milliseconds from clients and are kept in seconds here; "no limit" is infinity.
Buckets are geometric (AccelGen A2): requests whose limits differ by less than a factor of `BUCKET_RATIO`
are served alike. Bucket 0 is the tightest; `BEST_EFFORT_BUCKET` holds requests without a limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET_RATIO = 2.0
TIGHTEST_BUCKET_S = 0.010  # limits up to this long share bucket 0
BEST_EFFORT_BUCKET = 31  # more than any finite limit up to half a year reaches

MAX_LIMIT_MS = 1e9  # 11.6 days: beyond it a limit is surely a mistake in the unit


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request. `ttft_s`: arrival to first token; `tbt_s`: gap between tokens (p99); inf: none."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf
    slo_class: str = "default"

    @property
    def best_effort(self) -> bool:
        """True if nothing was promised."""
        return math.isinf(self.ttft_s) and math.isinf(self.tbt_s)


@dataclass(frozen=True, slots=True)
class SloClass:
    """A named pair of limits, as declared in the server's `slo.yaml`. Milliseconds; None: no limit."""

    ttft_ms: float | None = None
    tbt_ms: float | None = None

    def slo(self, name: str) -> Slo:
        """The limits of this class in seconds."""
        return Slo(limit_s(self.ttft_ms), limit_s(self.tbt_ms), name)


BEST_EFFORT = Slo()


def limit_s(limit_ms: float | None) -> float:
    """Milliseconds to seconds; None means no limit, infinity."""
    return math.inf if limit_ms is None else limit_ms / 1e3


def bucket(limit: float) -> int:
    """Tightness bucket of a limit in seconds: 0 is the tightest, each next one is twice as loose."""
    if math.isinf(limit):
        return BEST_EFFORT_BUCKET
    if limit <= TIGHTEST_BUCKET_S:
        return 0
    return min(math.ceil(math.log(limit / TIGHTEST_BUCKET_S, BUCKET_RATIO)), BEST_EFFORT_BUCKET - 1)
