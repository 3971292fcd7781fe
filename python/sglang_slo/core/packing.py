"""Which of the most urgent requests fill what is left of compute and KV together (AccelGen A3).

Within the most urgent bucket of slack the order of service is free, so requests are taken by fit: the cosine
between what a request demands, (prefill tokens, KV), and what is left of both, each as a share of what there is.
A long prompt with a short answer goes well with a short prompt that has a long answer; in plain order one
resource would run out while the other lies idle. Where KV is not short, the order by deadline stands: it is what
the winnable set was proven for.
"""

from __future__ import annotations

import math

import numpy as np

from sglang_slo.core.slo import BUCKET_RATIO

WINDOW = 16  # requests looked at; more than that never fit into one iteration's KV shortage
MIN_SLACK_ITERATIONS = 4.0  # of slack below which a request keeps its place in the order


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
    pool have; `iteration_s`: the iteration's time. Under 0.1 ms: plain floats, and nothing once no more fits.
    """
    n = min(len(rows), WINDOW)
    if n < 2 or kv_left <= 0 or tokens_left <= 0 or int(kv_tokens[:n].sum()) <= kv_left:
        return rows
    comfortable = slack_s[:n] > MIN_SLACK_ITERATIONS * iteration_s
    if not comfortable.any():
        return rows
    first = int(np.argmax(comfortable))
    looser = np.flatnonzero(slack_s[first:n] > slack_s[first] * BUCKET_RATIO)
    last = first + int(looser[0]) if len(looser) else n
    picked = _picked(
        np.minimum(tokens[first:last], tokens_left).tolist(),
        kv_tokens[first:last].tolist(),
        float(tokens_left),
        float(kv_left),
    )
    rest = [i for i in range(last - first) if i not in set(picked)]
    order = [*range(first), *(first + i for i in picked + rest), *range(last, len(rows))]
    return rows[np.array(order, np.int64)]


def _picked(tokens: list[int], kv: list[int], tokens_left: float, kv_left: float) -> list[int]:
    """Places by fit to what is left, best first, while any fits; ties go to the earlier one.

    The cosine of demand (x, y) and what is left (u, v), each as a share of all there is: (x u + y v) / (|x, y| |u, v|);
    |u, v| is the same for all and left out.
    """
    shares = [(t / tokens_left, k / kv_left) for t, k in zip(tokens, kv, strict=True)]
    shares = [(x / length, y / length) for x, y in shares if (length := math.hypot(x, y) or 1.0)]
    members, picked, left_t, left_k = list(range(len(tokens))), [], tokens_left, kv_left
    while members:
        u, v = left_t / tokens_left, left_k / kv_left
        best, best_fit = -1, -1.0
        for i in members:
            if tokens[i] <= left_t and kv[i] <= left_k:
                fit = round(shares[i][0] * u + shares[i][1] * v, 9)
                if fit > best_fit:
                    best, best_fit = i, fit
        if best < 0:
            break
        picked.append(best)
        members.remove(best)
        left_t, left_k = left_t - tokens[best], left_k - kv[best]
    return picked
