"""All that planning looks at: one iteration's situation as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.table import RequestTable


@dataclass(frozen=True)
class View:
    """Rows index `table`; seconds are on the tick's clock, sizes are tokens."""

    table: RequestTable
    waiting: np.ndarray  # int[m] rows that still have prefill to do, in queue order
    may_sit_out: bool  # whether the running batch can be split
    ready_s: float  # when the iteration in flight is predicted to end; now, if none is
    model: LatencyModel
    pool: Pool  # who decodes and holds KV, who is on the host
    request_slots: int  # requests that may join the running batch
    most_chunk_tokens: int  # SGLang's own chunk size: what its memory is laid out for
    tightest_ttft_s: float  # among recent arrivals; inf: none has a limit
    lengths_trusted: bool = False  # whether predicted lengths beat the marginal on finished requests

    @property
    def decoding(self) -> np.ndarray:
        """Rows of the running batch, in its order; int[n]."""
        return self.pool.decoding

    @property
    def chunked(self) -> int:
        """The row whose prefill was cut last iteration; -1: none."""
        return self.pool.chunked
