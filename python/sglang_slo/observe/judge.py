"""Judges a request when it leaves the server: attained, or which limits were missed and by how much.

`RequestRecord` is what the scheduler knew of the request at that moment; `judge` applies `core.attainment` to
it. Nothing promised is nothing missed. A request that the client gave up counts against the server only if a
limit had been passed by then (otherwise hopeless waits would vanish from the figures), one refused as invalid
never does, one that the server shed or broke always does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_slo.core.attainment import (
    RULES,
    Deliveries,
    Figures,
    Reason,
    Rule,
    kept_by_rule,
    ratio,
    reasons_of,
)
from sglang_slo.core.slo import BEST_EFFORT, GapRule, Slo

Finish = Literal["stop", "length", "abort", "rejected", "shed", "error"]
"""stop, length: complete; abort: by the client; rejected: invalid; shed, error: the server's own doing."""

FINISHES: tuple[Finish, ...] = ("stop", "length", "abort", "rejected", "shed", "error")
COMPLETE = ("stop", "length")
RULE_NAMES: dict[GapRule, Rule] = {GapRule.EVERY: "every", GapRule.PACE: "paced", GapRule.P99: "p99"}

SHED_REASONS = {  # what SGLang and we tell a client whom the server turns away, to a word for it
    "--slo-queue-limit-s": "queue_limit",
    "queue is full": "queue_full",
    "waiting timeout": "waiting_timeout",
    "running timeout": "running_timeout",
    "higher priority": "displaced",
}
OTHER_SHED = "other"


@dataclass(slots=True)
class RequestRecord:
    """One finished request. Times are seconds of the package's clock."""

    rid: str
    slo: Slo = BEST_EFFORT
    arrival_s: float = 0.0
    finished_s: float = 0.0
    out: Deliveries = field(default_factory=Deliveries)  # its tokens as they went out
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0  # prefilled again after a preemption
    finish: Finish = "stop"
    message: str = ""  # what the client was told of a request that did not end well
    parked: int = 0  # times set aside half-prefilled
    preempted: int = 0  # times taken out while decoding
    swapped: int = 0  # of these, times with its KV moved to host memory
    unattainable: bool = False  # a limit that the hardware cannot keep, told at arrival
    predicted_tokens: float | None = None  # expected output length at arrival
    bound_tokens: float | None = None  # the bound the ledger charged at arrival
    features: dict[str, Any] = field(default_factory=dict)  # of the length model, known at arrival
    text: str | None = None  # the prompt; only if it may be logged


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the promise. `ttft_s` None: no token came out.

    `counted`: whether attainment counts the request at all; `promised`: whether it had a limit.
    `ttft_used`, `gap_used`: share of the limit that was used (above 1: missed by that factor; 0: no such limit).
    """

    attained: bool
    reasons: tuple[Reason, ...]
    by_rule: dict[Rule, bool]
    counted: bool
    promised: bool
    ttft_s: float | None
    figures: Figures
    ttft_used: float
    gap_used: float

    @property
    def judged(self) -> bool:
        """Whether attainment counts it."""
        return self.promised and self.counted


def judge(record: RequestRecord) -> Verdict:
    """The verdict on a request that has left the server."""
    slo, out, finish = record.slo, record.out, record.finish
    figures = out.figures(record.arrival_s)
    late, complete = reasons_of(slo, figures), finish in COMPLETE
    if finish == "shed" or finish == "error":
        reasons: tuple[Reason, ...] = (finish,)
    else:
        reasons = () if finish == "rejected" else late
    kept = kept_by_rule(slo, figures)
    return Verdict(
        attained=complete and not late,
        reasons=reasons,
        by_rule={rule: complete and bool(kept[rule]) for rule in RULES},
        counted=complete or bool(reasons),
        promised=not slo.best_effort,
        ttft_s=figures.ttft_s if out.tokens else None,
        figures=figures,
        ttft_used=ratio(figures.ttft_s, slo.ttft_s),
        gap_used=_gap_used(slo, figures),
    )


def _gap_used(slo: Slo, figures: Figures) -> float:
    """By the rule that the request declared; a pace has no such share, its lag is a time."""
    if slo.gap_rule is GapRule.PACE:
        return 0.0
    return ratio(figures.p99_gap_s if slo.gap_rule is GapRule.P99 else figures.max_gap_s, slo.tbt_s)


def shed_reason(message: str) -> str:
    """Why the server turned a request away, of a bounded set of words."""
    return next((word for part, word in SHED_REASONS.items() if part in message), OTHER_SHED)


def answer(record: RequestRecord, verdict: Verdict) -> dict[str, Any]:
    """What the client is told (`meta_info.slo`): milliseconds, null where there is no figure or no limit."""
    slo, figures, gaps = record.slo, verdict.figures, record.out.gaps
    return {
        "class": slo.slo_class,
        "attained": verdict.attained,
        "missed": list(verdict.reasons),
        "rule": RULE_NAMES[slo.gap_rule],
        "attained_by_rule": verdict.by_rule,
        "ttft_ms": to_ms(verdict.ttft_s),
        "longest_pause_ms": to_ms(figures.max_gap_s if gaps else None),
        "tbt_p99_ms": to_ms(figures.p99_gap_s if gaps else None),
        "tpot_ms": to_ms(figures.tpot_s if gaps else None),
        "pace_lag_ms": to_ms(figures.pace_lag_s if gaps else None),
        "e2e_ms": to_ms(figures.e2e_s),
        **{f"{name}_limit_ms": to_ms(limit_s) for name, limit_s in limits_of(slo).items()},
        "unattainable": record.unattainable,
    }


def limits_of(slo: Slo) -> dict[str, float]:
    """Every limit of a request by its short name, seconds; inf: none."""
    return {
        "ttft": slo.ttft_s,
        "tbt": slo.tbt_s,
        "max_pause": slo.max_pause_s,
        "tpot": slo.tpot_s,
        "e2e": slo.e2e_s,
    }


def to_ms(seconds: float | None) -> float | None:
    """Seconds to milliseconds with three decimals; None for None and for infinity (JSON has none)."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 3)
