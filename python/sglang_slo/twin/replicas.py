"""One workload spread over several replicas: which of them each request goes to.

    round_robin    in turns; exact, as it looks at nothing
    least_loaded   to the replica with the least work before it. Work is time by the start-up profile (prefill alone, and
                   decoding a request's declared length at the pace of a half-full batch), drained as time goes by: what
                   a router in front knows without being told how long answers get

Replicas share nothing, so each runs by itself on the same virtual time.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.latency import decode_shape
from sglang_slo.twin.workloads.workload import Workload

ROUTERS = ("round_robin", "least_loaded")
TYPICAL_BATCH = 64


def share_of(workload: Workload, replica: int, replicas: int, router: str) -> Workload:
    """The requests that go to `replica` (from 0) of `replicas`. Raises ValueError on the router."""
    rows = np.flatnonzero(assigned(workload, replicas, router) == replica)
    picked = {
        name: None if getattr(workload, name) is None else [getattr(workload, name)[i] for i in rows.tolist()]
        for name in ("blocks", "callers", "texts", "declared_tokens", "features")
    }
    return replace(
        workload,
        class_id=workload.class_id[rows],
        arrival_s=workload.arrival_s[rows],
        input_tokens=workload.input_tokens[rows],
        output_tokens=workload.output_tokens[rows],
        **picked,  # type: ignore[arg-type]
    )


def assigned(workload: Workload, replicas: int, router: str) -> NDArray[np.int64]:
    """The replica of each request. Raises ValueError on the router."""
    if router == "round_robin":
        return np.arange(len(workload)) % replicas
    if router != "least_loaded":
        raise ValueError(f"router: need one of {', '.join(ROUTERS)}, got {router!r}")
    # Work drains at the same pace everywhere: the replica that would be idle first has the least before it.
    idle_at = [(0.0, k) for k in range(replicas)]
    chosen = np.zeros(len(workload), np.int64)
    for i, arrival in enumerate(workload.arrival_s.tolist()):
        free, k = heapq.heappop(idle_at)
        chosen[i] = k
        heapq.heappush(idle_at, (max(free, arrival) + _work_s(workload, i), k))
    return chosen


def _work_s(workload: Workload, i: int) -> float:
    tokens, profile = int(workload.input_tokens[i]), workload.profile
    batch = decode_shape(TYPICAL_BATCH, TYPICAL_BATCH * tokens)
    return profile.prefill_s(0, tokens) + workload.declared(i) * profile.iteration_s(batch) / TYPICAL_BATCH
