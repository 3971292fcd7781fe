"""Tiny builders of finished requests."""

from __future__ import annotations

from typing import Any

from sglang_slo.core.attainment import GapTail
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import RequestRecord


def make_record(
    ttft_s: float | None = 0.1, gaps_s: tuple[float, ...] = (), slo: Slo | None = None, **fields: Any
) -> RequestRecord:
    """A request that arrived at 100 s; one token more than gaps came out, none if `ttft_s` is None."""
    tail = GapTail(len(gaps_s))
    tail.extend(gaps_s)
    first_s = None if ttft_s is None else 100.0 + ttft_s
    defaults: dict[str, Any] = {
        "rid": "r",
        "arrival_s": 100.0,
        "finished_s": (first_s or 100.0) + tail.sum_s,
        "output_tokens": 0 if ttft_s is None else len(gaps_s) + 1,
        "prompt_tokens": 7,
    }
    return RequestRecord(slo=slo or Slo(), first_token_s=first_s, gaps=tail, **{**defaults, **fields})
