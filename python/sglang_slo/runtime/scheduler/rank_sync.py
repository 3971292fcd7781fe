"""What rank 0 measured, predicted and read off the clock, sent to all ranks with the requests of an iteration.

Every tensor-parallel rank runs its own scheduler and must decide the same. So no rank reads a clock for a decision:
rank 0 appends one `Tick` to the list of requests that SGLang broadcasts anyway, and all ranks, itself included,
work from that. Without a tick in the list (SGLang may skip receiving) the last one stays in force.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from sglang_slo.runtime.ports import Tick


@dataclass(frozen=True, kw_only=True)
class TickReceiver(SchedulerRequestReceiver):
    """SGLang's receiver that appends a tick on the rank whose list is broadcast."""

    make_tick: Callable[[list[Any]], Tick]

    @classmethod
    def wrapping(
        cls, receiver: SchedulerRequestReceiver, make_tick: Callable[[list[Any]], Tick]
    ) -> TickReceiver:
        """The same receiver with a source of ticks."""
        kept = {f.name: getattr(receiver, f.name) for f in fields(SchedulerRequestReceiver)}
        return cls(**kept, make_tick=make_tick)

    def _pull_raw_reqs(self) -> list[Any] | None:
        requests = super()._pull_raw_reqs()
        if requests is not None:
            requests.append(self.make_tick(requests))
        return requests
