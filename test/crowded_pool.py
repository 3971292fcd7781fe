"""A workload of the twin for which KV runs short: its outputs do not fit the pool together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sglang_slo.twin.workloads.workload import Workload, load_workload


def crowded(kv_tokens: int = 3072) -> Workload:
    """Forty requests at once, for a pool of a few dozen pages."""
    workload = load_workload("reason-generated", max_requests=40, load=30.0)
    return replace(
        workload,
        profile=replace(workload.profile, kv_capacity_tokens=kv_tokens),
        declared_max_new_tokens=None,
        input_tokens=np.minimum(workload.input_tokens, 400),
        output_tokens=workload.output_tokens // 10 + 20,
    )
