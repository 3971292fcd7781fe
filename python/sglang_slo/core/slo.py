"""What a request was promised: its limits, what it means by a gap limit, its class and importance.

Limits come in milliseconds from clients and are kept in seconds here; "no limit" is infinity. Any may be combined;
a request attained when all it declared were kept (`core.attainment`).

    ttft_s  arrival to the first token out
    tbt_s   the gap between two deliveries, by `gap_rule`:
            EVERY  no gap is longer (AccelGen's iteration-level guarantee); a burst of tokens is one delivery
            PACE   token i is out by first token + i x limit: a reader at that pace never waits
            P99    at most 1 % of the gaps are longer, and none is longer than `max_pause_s`
    tpot_s  the mean time per output token after the first (TPOT of vLLM, guidellm, aiperf, inference-perf)
    e2e_s   arrival to the last token

Buckets are geometric (AccelGen A2): requests whose gap limits differ by less than a factor of `BUCKET_RATIO`
are served alike. Bucket 0 is the tightest; `BEST_EFFORT_BUCKET` holds requests without a limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

BUCKET_RATIO = 2.0
TIGHTEST_BUCKET_S = 0.010  # limits up to this long share bucket 0
BEST_EFFORT_BUCKET = 31  # more than any finite limit up to half a year reaches

MIN_LIMIT_MS = 1e-3  # a microsecond: nothing shorter can be kept, or told apart from 0 on the way
MAX_LIMIT_MS = 1e9  # 11.6 days: beyond it a limit is surely a mistake in the unit
PAUSE_FACTOR = (
    10.0  # of the gap limit: the longest pause that the P99 rule permits where nothing else is said
)
LIMITS_MS = ("ttft_ms", "tbt_ms", "tpot_ms", "e2e_ms")  # names of the limits as clients write them
CUSTOM_CLASS = "custom"  # of requests that came with numbers of their own and no class
DEFAULT_CLASS = "default"  # of requests that came with neither, on a server without a default class


class GapRule(IntEnum):
    """What a request means by its gap limit; small integers, as the table keeps one a row."""

    EVERY = 0
    PACE = 1
    P99 = 2


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request in seconds, inf: none; see the module. `importance`: what is given up last, larger."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf
    slo_class: str = DEFAULT_CLASS
    tpot_s: float = math.inf
    e2e_s: float = math.inf
    gap_rule: GapRule = GapRule.EVERY
    max_pause_s: float = math.inf  # P99 only; `SloClass.slo` fills in the default
    importance: int = 0

    @property
    def best_effort(self) -> bool:
        """True if nothing was promised."""
        return all(map(math.isinf, (self.ttft_s, self.tbt_s, self.tpot_s, self.e2e_s)))


@dataclass(frozen=True, slots=True)
class SloClass:
    """Named limits, as declared in the server's `slo.yaml`. Milliseconds; None: no limit.

    `pace`: `tbt_ms` is a reader's pace; `percentile` 99: at most 1 % of gaps may pass `tbt_ms`, up to
    `max_pause_ms` (None: `PAUSE_FACTOR` x `tbt_ms`). Neither: every gap.
    """

    ttft_ms: float | None = None
    tbt_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    pace: bool = False
    percentile: int | None = None
    max_pause_ms: float | None = None
    importance: int = 0

    def slo(self, name: str) -> Slo:
        """These limits in seconds, under the class name `name`."""
        rule = GapRule.PACE if self.pace else GapRule.P99 if self.percentile else GapRule.EVERY
        pause_s = math.inf
        if rule is GapRule.P99 and self.tbt_ms is not None:
            pause_s = limit_s(self.max_pause_ms or PAUSE_FACTOR * self.tbt_ms)
        return Slo(
            limit_s(self.ttft_ms),
            limit_s(self.tbt_ms),
            name,
            limit_s(self.tpot_ms),
            limit_s(self.e2e_ms),
            rule,
            pause_s,
            self.importance,
        )


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
