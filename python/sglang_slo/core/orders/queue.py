"""What an order policy sees of the waiting requests, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sglang_slo.core.ordering import Ranking


@dataclass(frozen=True, slots=True)
class Queue:
    """Waiting requests, as arrays of n in the order of the queue. Lengths are predicted, never true ones."""

    rows: np.ndarray  # int: the table's
    deadline_s: np.ndarray  # of the first token, or of the next one; inf: none
    work_s: np.ndarray  # what the prefill takes at the rate that the iteration's budget allows now
    seq: np.ndarray  # int: order of arrival
    importance: np.ndarray  # int: as declared, 0 where nothing was
    expected_tokens: np.ndarray  # output still to come, as predicted
    start_s: float  # when the next iteration can start


Order = Callable[[Queue], Ranking]
