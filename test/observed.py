"""Tiny builders of finished requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_slo.core.deliveries import DeliveryTable
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import COMPLETE, RequestRecord


def make_record(
    ttft_s: float | None = 0.1, gaps_s: tuple[float, ...] = (), slo: Slo | None = None, **fields: Any
) -> RequestRecord:
    """A request that arrived at 100 s; one token more than gaps came out, none if `ttft_s` is None."""
    slo = slo or Slo()
    table, first_s = DeliveryTable(1), 100.0 + (ttft_s or 0.0)
    table.open(0, slo, len(gaps_s) + 1)
    times = [] if ttft_s is None else [first_s, *(first_s + np.cumsum(gaps_s)).tolist()]
    for time_s in times:
        table.add(np.array([0]), time_s)
    defaults: dict[str, Any] = {
        "rid": "r",
        "arrival_s": 100.0,
        "finished_s": times[-1] if times else 100.0,
        "output_tokens": len(times),
        "prompt_tokens": 7,
    }
    fields = {**defaults, **fields}
    whole = times and fields.get("finish", "stop") in COMPLETE
    out = table.close(0, None if whole else max(fields["finished_s"], *times, 100.0))
    return RequestRecord(slo=slo, out=out, **fields)
