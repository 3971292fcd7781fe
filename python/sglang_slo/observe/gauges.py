"""The state of the scheduler at one moment, as it reports it: queues, budget, KV, latency model, headroom.

The scheduler fills a `Gauges`; the observer passes it on to `/slo/status` and to Prometheus unchanged.
Every field is a plain number or a mapping of plain numbers, so that it travels between processes and as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Headroom:
    """What a replica could take on for one class beside its present load, inside the limits of that class.

    0 where the class attains badly: more work would find no better promise kept.
    """

    tokens_per_s: float = 0.0  # further prefill tokens a second
    kv_tokens: int = 0  # further KV


@dataclass(slots=True)
class Gauges:
    """One moment of one replica."""

    running: int = 0  # requests decoding
    queued: Mapping[str, int] = field(default_factory=dict)  # waiting requests by class
    backlog_tokens: int = 0  # prefill that waits, that of a half-prefilled request included
    oldest_waiting_s: float = 0.0  # how long one of them has been without a token, at most
    parked: int = 0  # half-prefilled requests set aside
    preempted: int = 0  # requests taken out while decoding, waiting to come back
    given_up: int = 0  # waiting requests given up, for now, as unable to meet their limit
    budget_s: float | None = None  # time the planned iteration may take; None: no limit in force
    chunk_tokens: int = 0  # prefill tokens of the planned iteration
    plan_s: float = 0.0  # time it took to plan
    kv: Mapping[str, float] = field(default_factory=dict)  # the ledger, tokens: see `metrics.KV`
    preemptions: Mapping[str, int] = field(default_factory=dict)  # so far, by mode: where the KV went
    swap_ins: int = 0  # requests that came back from the host so far
    swap: Mapping[str, float] = field(
        default_factory=dict
    )  # host pool, and the context from which it pays, tokens
    latency: Mapping[str, float] = field(default_factory=dict)  # latency model: parameters, drift
    lengths: Mapping[str, float | str] = field(default_factory=dict)  # predictor of output lengths
    headroom: Mapping[str, Headroom] = field(default_factory=dict)  # by class

    def plain(self) -> dict[str, Any]:
        """As JSON values; keys are text, and what is not finite is None."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


def _plain(value: Any) -> Any:
    if isinstance(value, Headroom):
        return {"tokens_per_s": _plain(value.tokens_per_s), "kv_tokens": _plain(value.kv_tokens)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)  # numpy scalars too
    return number if math.isfinite(number) else None
