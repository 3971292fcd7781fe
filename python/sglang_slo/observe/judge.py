"""Judges a request when it leaves the server: attained, or which limit was missed and by how much.

`RequestRecord` is what the scheduler knew of the request at that moment; `judge` applies the definition of
`core.attainment` to it. Nothing promised is nothing missed. A request that the client gave up counts against
the server only if a limit had been passed by then (otherwise hopeless waits would vanish from the figures),
one refused as invalid never does, one that the server shed or broke always does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_slo.core.attainment import GapTail, ratio
from sglang_slo.core.attainment import missed as missed_limit
from sglang_slo.core.slo import BEST_EFFORT, Slo

Finish = Literal["stop", "length", "abort", "rejected", "shed", "error"]
"""stop, length: complete; abort: by the client; rejected: invalid; shed, error: the server's own doing."""

Missed = Literal["ttft", "tbt", "both", "aborted", "shed", "error"]

COMPLETE = ("stop", "length")


@dataclass(slots=True)
class RequestRecord:
    """One finished request. Times are seconds of the package's clock."""

    rid: str
    slo: Slo = BEST_EFFORT
    arrival_s: float = 0.0
    first_token_s: float | None = None  # None: no token came out
    finished_s: float = 0.0
    gaps: GapTail = field(default_factory=lambda: GapTail(0))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0  # prefilled again after a preemption
    finish: Finish = "stop"
    parked: int = 0  # times set aside half-prefilled
    preempted: int = 0  # times taken out while decoding
    swapped: int = 0  # of these, times with its KV moved to host memory
    lost: bool = False  # was ever given up as unable to meet its TTFT limit
    unattainable: bool = False  # a limit that the hardware cannot keep, told at arrival
    predicted_tokens: float | None = None  # expected output length at arrival
    bound_tokens: float | None = None  # the bound the ledger charged at arrival
    features: dict[str, Any] = field(default_factory=dict)  # of the length model, known at arrival
    text: str | None = None  # the prompt; only if it may be logged


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the promise. Seconds; `ttft_s` None: no token came out.

    `counted`: whether attainment counts the request at all; `promised`: whether it had a limit.
    `ttft_used`, `tbt_used`: share of the limit that was used (above 1: missed by that factor; 0: no limit).
    """

    attained: bool
    missed: Missed | None
    counted: bool
    promised: bool
    ttft_s: float | None
    tbt_p99_s: float
    tpot_s: float
    ttft_used: float
    tbt_used: float


def judge(record: RequestRecord) -> Verdict:
    """The verdict on a request that has left the server."""
    slo, gaps = record.slo, record.gaps
    ttft_s = None if record.first_token_s is None else record.first_token_s - record.arrival_s
    waited_s = record.finished_s - record.arrival_s if ttft_s is None else ttft_s
    limit = missed_limit(slo, waited_s, gaps.p99_s)
    complete = record.finish in COMPLETE
    return Verdict(
        attained=complete and limit is None,
        missed=_missed(record.finish, limit),
        counted=complete
        or record.finish in ("shed", "error")
        or (record.finish == "abort" and limit is not None),
        promised=not slo.best_effort,
        ttft_s=ttft_s,
        tbt_p99_s=gaps.p99_s,
        tpot_s=gaps.mean_s,
        ttft_used=ratio(waited_s, slo.ttft_s),
        tbt_used=ratio(gaps.p99_s, slo.tbt_s),
    )


def _missed(finish: Finish, limit: Literal["ttft", "tbt", "both"] | None) -> Missed | None:
    if finish == "shed" or finish == "error":
        return finish
    if finish == "rejected" or (finish == "abort" and limit is None):
        return "aborted"
    return limit


def answer(record: RequestRecord, verdict: Verdict) -> dict[str, Any]:
    """What the client is told (`meta_info.slo`): milliseconds, null where there is no figure or no limit."""
    slo = record.slo
    return {
        "class": slo.slo_class,
        "attained": verdict.attained,
        "missed": verdict.missed,
        "ttft_ms": to_ms(verdict.ttft_s),
        "ttft_limit_ms": to_ms(slo.ttft_s),
        "tbt_p99_ms": to_ms(verdict.tbt_p99_s if record.gaps.count else None),
        "tbt_limit_ms": to_ms(slo.tbt_s),
        "tpot_ms": to_ms(verdict.tpot_s if record.gaps.count else None),
        "unattainable": record.unattainable,
    }


def to_ms(seconds: float | None) -> float | None:
    """Seconds to milliseconds with three decimals; None for None and for infinity (JSON has none)."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 3)
