"""Host memory for swapped KV in virtual time: a link to the host that is busy while a copy moves.

The twin's KV is empty, so nothing is copied; transfers take the profile's time, one after another, beside the
engine's passes. A pass that needs one (`fence`) begins when it is over.
"""

from __future__ import annotations

import torch

from sglang_slo.runtime.kv.host_pool import HostCopy, SwapMeter
from sglang_slo.twin.sim.engine import VirtualEngine


class VirtualHostPool:
    """A `runtime.swap.HostPool` of `host_kv_gb` GB."""

    hides = True

    def __init__(self, engine: VirtualEngine, host_kv_gb: float) -> None:
        self.bytes_per_token = engine.device.kv_bytes_per_token
        self.capacity_tokens = int(host_kv_gb * 1e9 / self.bytes_per_token)
        self.used_tokens = 0
        self.meter = SwapMeter()
        self._engine = engine
        self._link_free_s = 0.0

    def largest_room(self) -> int:
        """See HostPool."""
        return self.capacity_tokens - self.used_tokens

    def save(self, slots: torch.Tensor) -> HostCopy:
        """See HostPool."""
        self.used_tokens += len(slots)
        self._engine.swapped_tokens += len(slots)
        return HostCopy(len(slots), ok=True, moving=self._transfer(len(slots)))

    def load(self, copy: HostCopy, start: int, slots: torch.Tensor) -> None:
        """See HostPool."""
        copy.moving = self._transfer(len(slots))

    def _transfer(self, tokens: int) -> float:
        device = self._engine.device
        seconds = device.swap_overhead_s + tokens * self.bytes_per_token / device.swap_bytes_per_s
        self._link_free_s = max(self._link_free_s, self._engine.now_s) + seconds
        self.meter.saw(tokens * self.bytes_per_token, seconds)
        return self._link_free_s

    def fence(self, copy: HostCopy) -> None:
        """See HostPool."""
        self._engine.not_before(copy.moving)

    def drop(self, copy: HostCopy) -> None:
        """See HostPool."""
        self.used_tokens -= copy.tokens
        copy.ok = False
