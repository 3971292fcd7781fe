"""Which of the most urgent requests fill what is left of compute and KV together (AccelGen A3).

Within the most urgent bucket of slack the order of service is free, so requests are taken by fit: the cosine
between what a request demands, (prefill tokens, KV), and what is left of both, each as a share of what there is.
A long prompt with a short answer goes well with a short prompt that has a long answer; in plain order one
resource would run out while the other lies idle. Where KV is not short, the order by deadline stands: it is what
the winnable set was proven for.
"""

from __future__ import annotations

import numpy as np

from sglang_slo.core.slo import BUCKET_RATIO

WINDOW = 32  # requests looked at; more than that never fit into one iteration's KV shortage
COMFORT = 4.0  # iterations of slack below which a request keeps its place in the order


def pack(
    rows: np.ndarray,
    slack_s: np.ndarray,
    tokens: np.ndarray,
    kv_tokens: np.ndarray,
    tokens_left: int,
    kv_left: int,
    iteration_s: float,
) -> np.ndarray:
    """`rows` with those of the most urgent bucket in order of fit; int[n].

    For each row, most urgent first: `slack_s` until its deadline after its own work, `tokens` still to prefill,
    `kv_tokens` it needs in all (prompt and bounded output). `tokens_left`, `kv_left`: what the iteration and the
    pool have; `iteration_s`: the iteration's time.
    """
    n = min(len(rows), WINDOW)
    if n < 2 or kv_left <= 0 or tokens_left <= 0 or int(kv_tokens[:n].sum()) <= kv_left:
        return rows
    comfortable = slack_s[:n] > COMFORT * iteration_s
    if not comfortable.any():
        return rows
    first = int(np.argmax(comfortable))
    looser = np.flatnonzero(slack_s[first:n] > slack_s[first] * BUCKET_RATIO)
    last = first + int(looser[0]) if len(looser) else n
    members, order = list(range(first, last)), list(range(first))
    left = np.array([float(tokens_left), float(kv_left)])
    demand = np.stack([np.minimum(tokens[:n], tokens_left), kv_tokens[:n]], axis=1).astype(float)
    scale = left.copy()
    while members:
        fits = [i for i in members if (demand[i] <= left).all()] or members
        best = max(fits, key=lambda i: (round(_cosine(demand[i] / scale, left / scale), 9), -i))
        order.append(best)
        members.remove(best)
        left = np.maximum(left - demand[best], 0.0)
    rest = np.arange(len(order), len(rows))
    return rows[np.concatenate([np.array(order, np.int64), rest])]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0
