"""Shortest remaining output first, by predicted length: frees KV soonest, and looks at deadlines only to give up.

The example of a policy: this file, and its line in `ORDERS`. It gives the shortest mean time to completion where
predictions are good and no deadline is tight; a long request with a near deadline waits behind short ones with far ones.
"""

from __future__ import annotations

import numpy as np

from sglang_slo.core.ordering import Ranking
from sglang_slo.core.orders.queue import Queue


def rank(queue: Queue) -> Ranking:
    """Those that could meet their deadline if served now, shortest first; all others first come first served."""
    keep = np.isfinite(queue.deadline_s) & (queue.start_s + queue.work_s <= queue.deadline_s)
    feasible = queue.rows[keep][np.lexsort((queue.seq[keep], queue.expected_tokens[keep]))]
    return Ranking(feasible, queue.rows[~keep][np.argsort(queue.seq[~keep], kind="stable")])
