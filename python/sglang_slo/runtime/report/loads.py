"""Shows SGLang's accounting the requests that are in none of its own places: swapped out, leaving, in a part of a batch.

SGLang counts its running batch and its queue: for /v1/loads, for the choice between data-parallel replicas, for its
metrics. Whoever decodes, wherever its batch is, counts as running; whoever was preempted counts as waiting.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.runtime.scheduler.scheduler import SloScheduler


def running(scheduler: SloScheduler) -> list[Req]:
    """Requests that hold KV and are served, each once: those that decode and those whose prefill runs."""
    if not scheduler.slo_on:
        return scheduler.running_batch.reqs
    found: dict[int, Req] = {}
    for batch in (scheduler.running_batch, scheduler.slo_split, scheduler.last_batch):
        for req in batch.reqs if batch is not None else ():
            if not (req.finished() or req.is_retracted):
                found[id(req)] = req
    if scheduler.chunked_req is not None:
        found[id(scheduler.chunked_req)] = scheduler.chunked_req
    return list(found.values())


def waiting(scheduler: SloScheduler) -> list[Req]:
    """Requests that wait for prefill or for their way back."""
    if not scheduler.slo_on:
        return scheduler.waiting_queue
    return [*scheduler.waiting_queue, *scheduler.slo_preempt.alive()]


def counted(scheduler: SloScheduler) -> Any:
    """SGLang's inquirer of loads, asking here."""
    return replace(
        scheduler.load_inquirer,
        get_running_batch=lambda: SimpleNamespace(reqs=running(scheduler)),
        get_waiting_queue=lambda: waiting(scheduler),
    )


class Counted:
    """A scheduler as SGLang's metrics see it: its queue is everybody who waits, all else is its own."""

    def __init__(self, scheduler: SloScheduler) -> None:
        object.__setattr__(self, "_scheduler", scheduler)

    @property
    def waiting_queue(self) -> list[Req]:
        """See `waiting`."""
        return waiting(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)
