"""What a swap costs here: as measured on rank 0, put into the latency model that all ranks plan with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from sglang_slo.core.kv import preemption
from sglang_slo.core.latency import LatencyModel
from sglang_slo.runtime.kv.host_pool import HostLink

if TYPE_CHECKING:
    from sglang_slo.runtime.kv.swap_line import SwapLine


class SwapCost:
    """The cost of transfers to the host and back, over our own pool (`line`) or SGLang's (`link`); of nothing without."""

    def __init__(self, line: SwapLine | None, link: HostLink | None = None) -> None:
        self._line = line
        self._link = link if line is None else HostLink(line.pool.meter, line.pool.bytes_per_token)
        self._measured: tuple[float, float] | None = None

    def figures(self, model: LatencyModel) -> dict[str, float]:
        """Host KV used and there, and the context from which swapping is cheaper than computing again; tokens.

        Empty where nothing can be swapped; the crossing is inf where swapping never pays.
        """
        if self._line is None:
            return {}
        return {
            "host_used": self._line.pool.used_tokens,
            "host_capacity": self._line.pool.capacity_tokens,
            "crossing": preemption.crossing_tokens(model),
            "failed_copies": self._line.failed,
        }

    def measured(self) -> tuple[float, float] | None:
        """(overhead s, bytes per s) of transfers as this rank sees them, if there is news."""
        return self._link.meter.fit() if self._link is not None and self._link.meter.news else None

    def priced(self, model: LatencyModel, swap: tuple[float, float] | None) -> LatencyModel:
        """`model` with what swapping costs: as rank 0 measured it last, `swap` if that is new and can be."""
        if swap is not None and 0 <= swap[0] < math.inf and 0 < swap[1] < math.inf:
            self._measured = swap
        if self._link is None or self._measured is None:
            return model
        overhead_s, rate = self._measured
        per_token = self._link.bytes_per_token
        return replace(model, swap_overhead_s=overhead_s, swap_bytes_per_s=rate, kv_bytes_per_token=per_token)
