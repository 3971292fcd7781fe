"""What became of the requests of one run: plain arrays, one row a request, judged as on the server (`core.attainment`).

    arrival      first token      token   token          end
       |-------- ttft -----|-- gap --|- gap -|-- ... ------|

Attainment is by what each request declared; `attained_by_rule` reads its gap limit by every rule of the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.attainment import Deliveries, Figures, Reason, Rule, kept_by_rule, misses
from sglang_slo.core.slo import Slo

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LimitColumns:
    """Limits of many requests, seconds [n] (`core.attainment.Limits`)."""

    ttft_s: Floats
    tbt_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    gap_rule: Ints
    max_pause_s: Floats


@dataclass
class Requests:
    """One row per request of the workload, in order of arrival; every field has shape [n]."""

    class_id: Ints  # index into RunResult.class_names
    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints  # the true length
    ttft_limit_s: Floats  # inf: no limit
    tbt_limit_s: Floats
    tpot_limit_s: Floats
    e2e_limit_s: Floats
    max_pause_s: Floats
    gap_rule: Ints  # core.slo.GapRule
    ttft_s: Floats  # arrival to first token; inf: never came
    tbt_s: Floats  # 99th percentile gap; 0 with one token, inf if unfinished
    tpot_s: Floats  # mean time per token after the first; 0 with one token, inf if unfinished
    max_gap_s: Floats  # the longest pause; inf if unfinished
    pace_lag_s: Floats  # how late the latest token was against the gap limit as a pace; inf if unfinished
    end_s: Floats  # time of the last token; inf: unfinished or refused
    cached_tokens: Ints  # prompt tokens found in the prefix cache at first admission
    preemptions: Ints
    refused: NDArray[np.bool_]  # the scheduler turned it away

    def take(self, i: int, out: Deliveries, whole: bool) -> None:
        """Row i has ended with `out`; not `whole`: tokens are missing, and nothing but the first one counts."""
        self.ttft_s[i] = out.first_s - self.arrival_s[i]
        if whole:
            self.end_s[i], self.max_gap_s[i], self.pace_lag_s[i] = out.last_s, out.max_gap_s, out.pace_lag_s
            self.tbt_s[i], self.tpot_s[i] = out.p99_gap_s, out.tpot_s

    @property
    def limits(self) -> LimitColumns:
        """What each request was promised."""
        return LimitColumns(
            self.ttft_limit_s,
            self.tbt_limit_s,
            self.tpot_limit_s,
            self.e2e_limit_s,
            self.gap_rule,
            self.max_pause_s,
        )

    @property
    def figures(self) -> Figures:
        """What each request got; inf where it never came."""
        return Figures(
            self.ttft_s,
            self.end_s - self.arrival_s,
            self.max_gap_s,
            self.tbt_s,
            self.tpot_s,
            self.pace_lag_s,
        )

    @property
    def misses(self) -> dict[Reason, NDArray[np.bool_]]:
        """Reason to rows that missed for it. `shed`: refused; `error`: tokens of it never came."""
        found = {reason: self.finished & late for reason, late in misses(self.limits, self.figures).items()}
        return {**found, "shed": self.refused, "error": ~self.finished & ~self.refused}

    @property
    def attained_by_rule(self) -> dict[Rule, NDArray[np.bool_]]:
        """Rule to rows that finished and kept their gap limit by it, and their other limits."""
        return {rule: self.finished & kept for rule, kept in kept_by_rule(self.limits, self.figures).items()}

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Whether all tokens came out."""
        return np.isfinite(self.end_s)

    @property
    def attained(self) -> NDArray[np.bool_]:
        """Finished, with everything kept that was declared."""
        return ~np.logical_or.reduce([*self.misses.values()])


def empty_requests(
    class_id: Ints, arrival_s: Floats, input_tokens: Ints, output_tokens: Ints, limits: list[Slo]
) -> Requests:
    """Rows of a run that has not begun: nothing came out yet. `limits`: one per class."""
    n = len(arrival_s)
    return Requests(
        class_id=class_id,
        arrival_s=arrival_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ttft_limit_s=np.array([s.ttft_s for s in limits], float)[class_id],
        tbt_limit_s=np.array([s.tbt_s for s in limits], float)[class_id],
        tpot_limit_s=np.array([s.tpot_s for s in limits], float)[class_id],
        e2e_limit_s=np.array([s.e2e_s for s in limits], float)[class_id],
        max_pause_s=np.array([s.max_pause_s for s in limits], float)[class_id],
        gap_rule=np.array([s.gap_rule for s in limits], np.int64)[class_id],
        ttft_s=np.full(n, math.inf),
        tbt_s=np.full(n, math.inf),
        tpot_s=np.full(n, math.inf),
        max_gap_s=np.full(n, math.inf),
        pace_lag_s=np.full(n, math.inf),
        end_s=np.full(n, math.inf),
        cached_tokens=np.zeros(n, np.int64),
        preemptions=np.zeros(n, np.int64),
        refused=np.zeros(n, bool),
    )
