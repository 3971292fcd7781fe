"""How many requests came with limits and without, by endpoint: limits that are lost on the way become visible.

Counted where they pass the door, in this HTTP process, for `/slo/status`; with metrics on also for `/metrics`, where
several tokenizer workers' counts add up. `offline`: not over HTTP.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

from sglang_slo import clock
from sglang_slo.observe.metric_names import HTTP_COUNTERS, PREFIX
from sglang_slo.observe.throttle import Throttle

if TYPE_CHECKING:
    from prometheus_client import Counter

MAX_ENDPOINTS = 64  # more would mean that somebody makes up paths
OTHERS = "others"

_counts: dict[str, list[int]] = {}
_trouble = Throttle(logging.getLogger(__name__))


def note(endpoint: str, limited: bool) -> None:
    """One request passed."""
    if endpoint not in _counts and len(_counts) >= MAX_ENDPOINTS:
        endpoint = OTHERS
    _counts.setdefault(endpoint, [0, 0])[limited] += 1
    if (
        "PROMETHEUS_MULTIPROC_DIR" in os.environ
    ):  # set by SGLang once metrics are on, before the client is imported
        try:
            _counter().labels(endpoint=endpoint, limits="with" if limited else "without").inc()
        except Exception as error:  # a full disk, say: a figure is lost, not the request
            _trouble.happened("counting requests failed", clock.now(), error)


def snapshot() -> dict[str, dict[str, int]]:
    """Endpoint to its counts since the start of this process."""
    return {name: {"with_limits": w, "without_limits": wo} for name, (wo, w) in sorted(_counts.items())}


@cache
def _counter() -> Counter:
    import prometheus_client as client

    [(name, (text, labels))] = HTTP_COUNTERS.items()
    return client.Counter(PREFIX + name, text, labels)
