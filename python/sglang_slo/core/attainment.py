"""Whether a request got what it was promised: the one judge that server, twin and benchmarks share.

A delivery is one or more tokens that come out together; a gap lies between two deliveries. With n tokens, the
first at f, a gap limit L and a token number i counted from 0:

    every   no gap is longer than L
    paced   token i is out by f + i L: the lag, the largest lateness of any token, is not above 0. In a burst the
            first token is the most late, so one look at a delivery suffices:  lag = max(t - f - tokens before x L)
    p99     at most 1 % of the gaps are longer than L, nearest rank: the smallest gap that covers 99 % of all is
            within L, that is, the (n // 100 + 1)-th longest of n gaps; with fewer than 100, the longest
    mean    (last - f) / (n - 1) is within L, the TPOT of the field's load generators

Every request is judged by all four (`kept_by_rule`) beside its limits on first token and end, and by what it
declared itself (`misses`): a request attained if it missed nothing. What is equal to its limit is kept. Figures
and limits may be numbers of one request or columns of many. `DeliveryTable` takes the figures without storing a
stream: of the gaps it keeps the longest 1 %, all that the exact percentile needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.slo import GapRule, Slo

Rule = Literal["every", "paced", "p99", "mean"]
Reason = Literal["ttft", "gap", "pause", "pace", "tpot", "e2e", "shed", "error"]
RULES: tuple[Rule, ...] = ("every", "paced", "p99", "mean")
LIMIT_REASONS: tuple[Reason, ...] = ("ttft", "gap", "pause", "pace", "tpot", "e2e")  # what `misses` finds
REASONS: tuple[Reason, ...] = (*LIMIT_REASONS, "shed", "error")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NO_GAPS_S = 0.0  # every gap figure of a request with one delivery or none: nothing was waited for
NOISE_S = 1e-9  # sums of times in floating point differ by less; a thousandth of the smallest limit there is


class Limits(Protocol):
    """Limits in seconds, inf: none. An `Slo`, or columns of many [n]."""

    @property
    def ttft_s(self) -> Any: ...
    @property
    def tbt_s(self) -> Any: ...
    @property
    def tpot_s(self) -> Any: ...
    @property
    def e2e_s(self) -> Any: ...
    @property
    def gap_rule(self) -> Any: ...
    @property
    def max_pause_s(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Figures:
    """What limits are held against, seconds; floats of one request or columns of many [n]."""

    ttft_s: Any  # arrival to the first token out, or to the end of a request without one
    e2e_s: Any  # arrival to the last token, or to when it was given up
    max_gap_s: Any
    p99_gap_s: Any
    tpot_s: Any  # mean time per token after the first
    pace_lag_s: Any  # the largest lateness of a token against `gap_limit_s`; 0: none was late, or no limit


@dataclass(frozen=True, slots=True)
class Deliveries:
    """The tokens of one request as they went out; seconds. `first_s`, `last_s` mean nothing without tokens.

    `end_s`: the last token, or when a request that still waited for one was given up; that wait is then part of
    the four gap figures, as if the token had come at that moment.
    """

    tokens: int = 0
    gaps: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    max_gap_s: float = NO_GAPS_S
    p99_gap_s: float = NO_GAPS_S
    tpot_s: float = NO_GAPS_S
    pace_lag_s: float = 0.0

    def figures(self, arrival_s: float) -> Figures:
        """What limits are held against, for a request that arrived at `arrival_s`."""
        first_s = self.first_s if self.tokens else self.end_s
        return Figures(
            first_s - arrival_s,
            self.end_s - arrival_s,
            self.max_gap_s,
            self.p99_gap_s,
            self.tpot_s,
            self.pace_lag_s,
        )


def gap_limit_s(slo: Limits) -> Any:
    """The limit that the four rules read: the gap limit, or the mean's where only that was declared; inf: none."""
    return np.where(np.isinf(slo.tbt_s), slo.tpot_s, slo.tbt_s)[()]


def misses(slo: Limits, figures: Figures) -> dict[Reason, Any]:
    """Which of its limits a request missed, each by its own rule: reason to bool, or to bool [n]."""
    rule, gap = slo.gap_rule, _over(figures.max_gap_s, slo.tbt_s)
    tail = _over(figures.p99_gap_s, slo.tbt_s)
    late = (figures.pace_lag_s > NOISE_S) & np.isfinite(slo.tbt_s)
    return {
        "ttft": _over(figures.ttft_s, slo.ttft_s),
        "gap": ((rule == GapRule.EVERY) & gap) | ((rule == GapRule.P99) & tail),
        "pause": (rule == GapRule.P99) & _over(figures.max_gap_s, slo.max_pause_s),
        "pace": (rule == GapRule.PACE) & late,
        "tpot": _over(figures.tpot_s, slo.tpot_s),
        "e2e": _over(figures.e2e_s, slo.e2e_s),
    }


def reasons_of(slo: Slo, figures: Figures) -> tuple[Reason, ...]:
    """The reasons for which one request missed what it declared; none: it attained."""
    return tuple(reason for reason, missed in misses(slo, figures).items() if missed)


def kept_by_rule(slo: Limits, figures: Figures) -> dict[Rule, Any]:
    """Whether a request would have attained had its gap limit been meant by each rule: rule to bool or bool [n].

    Its limits on first token and end count in all of them; `max_pause_s`, ours alone, in none.
    """
    limit_s = gap_limit_s(slo)
    others = _kept(figures.ttft_s, slo.ttft_s) & _kept(figures.e2e_s, slo.e2e_s)
    return {
        "every": others & _kept(figures.max_gap_s, limit_s),
        "paced": others & (np.isinf(limit_s) | (figures.pace_lag_s <= NOISE_S)),
        "p99": others & _kept(figures.p99_gap_s, limit_s),
        "mean": others & _kept(figures.tpot_s, limit_s),
    }


def _over(figure_s: Any, limit_s: Any) -> Any:
    return figure_s > limit_s + NOISE_S


def _kept(figure_s: Any, limit_s: Any) -> Any:
    return figure_s <= limit_s + NOISE_S


def rank_from_top(gaps: int) -> int:
    """Rank of the p99 among `gaps` values counted from the longest (1: the longest itself).

    Nearest rank is place ceil(99 n / 100) in ascending order: n - ceil(99 n / 100) + 1 from the top.
    """
    return gaps // 100 + 1


def p99_s(gaps_s: Floats | Sequence[float]) -> float:
    """99th percentile of all gaps of a request, seconds; `NO_GAPS_S` if there are none."""
    values = np.asarray(gaps_s, dtype=np.float64)
    if values.size == 0:
        return NO_GAPS_S
    place = values.size - rank_from_top(values.size)
    return float(np.partition(values, place)[place])


def deliveries_of(times_s: Floats | Sequence[float], tokens: Ints | Sequence[float], slo: Slo) -> Deliveries:
    """The figures of a whole stream: when each delivery came, and how many tokens it carried; both [k], ascending."""
    times, counts = np.asarray(times_s, np.float64), np.asarray(tokens, np.float64)
    total = round(float(counts.sum()))
    if total == 0:
        return Deliveries()
    gaps, (first_s, last_s) = np.diff(times), (float(times[0]), float(times[-1]))
    late_s = times[1:] - first_s - np.cumsum(counts)[:-1] * gap_limit_s(slo)
    return Deliveries(
        tokens=total,
        gaps=len(gaps),
        first_s=first_s,
        last_s=last_s,
        end_s=last_s,
        max_gap_s=float(gaps.max(initial=NO_GAPS_S)),
        p99_gap_s=p99_s(gaps),
        tpot_s=(last_s - first_s) / (total - 1) if total > 1 else NO_GAPS_S,
        pace_lag_s=float(late_s.max(initial=0.0)),
    )


def deliveries_of_tokens(token_s: Floats | Sequence[float], slo: Slo) -> Deliveries:
    """The figures of a whole stream from the time of each token [n], ascending; equal times are one delivery."""
    times, counts = np.unique(np.asarray(token_s, np.float64), return_counts=True)
    return deliveries_of(times, counts, slo)


def ratio(figure_s: float, limit_s: float) -> float:
    """How much of a limit was used (1: all of it); 0 when nothing was promised."""
    return 0.0 if math.isinf(limit_s) else figure_s / limit_s
