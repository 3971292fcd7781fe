"""All that planning looks at: one iteration's situation as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.reservation import Ledger
from sglang_slo.core.table import RequestTable


@dataclass(frozen=True)
class View:
    """Rows index `table`; seconds are on the tick's clock, sizes are tokens."""

    table: RequestTable
    decoding: np.ndarray  # int[n] rows of the running batch, in its order
    waiting: np.ndarray  # int[m] rows that still have prefill to do, in queue order
    may_sit_out: bool  # whether the running batch can be split
    chunked: int  # the row whose prefill was cut last iteration; -1: none
    base_s: float  # when the iteration in flight is predicted to end; now, if none is
    model: LatencyModel
    ledger: Ledger
    critical_tokens: int  # KV beyond the ledger's limit that the critical may have
    free_tokens: int  # free + evictable KV
    arrival_reserve_tokens: int  # KV that the lost leave for arrivals in a hurry
    capacity_tokens: int
    request_slots: int  # requests that may join the running batch
    most_chunk_tokens: int  # SGLang's own chunk size: what its memory is laid out for
    tightest_ttft_s: float  # among recent arrivals; inf: none has a limit
