"""Earliest deadline first among the largest set that can be kept; see `core.ordering` for why."""

from __future__ import annotations

from sglang_slo.core.ordering import Ranking, edf_feasible_first
from sglang_slo.core.orders.queue import Queue


def rank(queue: Queue) -> Ranking:
    """The feasible by deadline; what Moore's rule drops, and whoever has no deadline, first come first served."""
    return edf_feasible_first(
        queue.rows,
        queue.deadline_s,
        queue.work_s,
        queue.seq,
        queue.start_s,
        queue.importance if queue.importance.any() else None,
    )
