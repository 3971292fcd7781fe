"""One pass as the device sees it, and what a device must be able to say.

A pass is told by what is in it, request by request: every prefill chunk with the history before it, every
decode with its context. A device may know more of it than the latency model that the scheduler fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sglang_slo.core.latency import BatchShape

DRAFT_SHARE = 0.05  # of a pass of the model: what a pass of a draft model of one layer takes, its head and launch included


@dataclass(frozen=True, slots=True)
class Pass:
    """`chunks`: (history, new tokens) of each prefill; `contexts`: KV tokens each decode reads, its own included.

    `verified`: tokens that each decode computes at once, as speculative decoding does; `drafts`: passes of a draft model
    that belong to it.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    contexts: Sequence[int] = ()
    verified: int = 1
    drafts: int = 0

    @property
    def extend(self) -> bool:
        """Whether it holds a prefill chunk."""
        return bool(self.chunks)

    @property
    def new_tokens(self) -> int:
        """Tokens that go through the layers."""
        return sum(new for _, new in self.chunks) + len(self.contexts) * self.verified

    @property
    def requests(self) -> int:
        """Chunks and decodes."""
        return len(self.chunks) + len(self.contexts)

    @property
    def context_tokens(self) -> int:
        """All tokens whose KV is read."""
        return sum(history + new for history, new in self.chunks) + sum(self.contexts)

    @property
    def shape(self) -> BatchShape:
        """What the latency model knows of it."""
        pairs = sum(new * (history + new / 2) for history, new in self.chunks)
        return BatchShape(self.extend, self.new_tokens, pairs, self.context_tokens, self.requests)


class Device(Protocol):
    """A GPU (or a tensor-parallel group of them) with a model on it."""

    @property
    def name(self) -> str:
        """Model, system and how it is split and quantized: names a result."""
        ...

    @property
    def measured(self) -> bool:
        """Whether its times were measured on a real device; else they are modelled, and pages must say so."""
        ...

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens its KV cache holds."""
        ...

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes of a token on all ranks together."""
        ...

    @property
    def swap_bytes_per_s(self) -> float:
        """To and from host memory, all ranks together."""
        ...

    @property
    def swap_overhead_s(self) -> float:
        """Of one transfer, whatever its size."""
        ...

    @property
    def cpu_times_s(self) -> tuple[float, float]:
        """Scheduler CPU seconds per iteration: (before the launch, after the result)."""
        ...

    def iteration_s(self, load: Pass) -> float:
        """Seconds that this pass takes, without its drafts."""
        ...


def with_drafts_s(device: Device, load: Pass) -> float:
    """Seconds that this pass takes with those of a draft model."""
    seconds = device.iteration_s(load)
    if not load.drafts:
        return seconds
    return seconds + load.drafts * DRAFT_SHARE * device.iteration_s(replace(load, verified=1))
