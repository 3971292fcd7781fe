"""SGLang's own order of the queue, with nobody given up."""

from __future__ import annotations

import numpy as np

from sglang_slo.core.ordering import Ranking
from sglang_slo.core.orders.queue import Queue


def rank(queue: Queue) -> Ranking:
    """As they stand in the queue."""
    return Ranking(queue.rows, np.zeros(0, np.int64))
