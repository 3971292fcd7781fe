"""Shows SGLang's accounting the requests that are in none of its own places: swapped out, leaving, in a part of a batch.

SGLang counts its running batch and its queue: for /v1/loads, for the choice between data-parallel replicas, for its
metrics. Whoever decodes, wherever its batch is, counts as running; whoever was preempted counts as waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

Noting = Callable[[str], AbstractContextManager[None]]


def running(batches: Iterable[ScheduleBatch | None], cut: Req | None) -> list[Req]:
    """Requests that hold KV and are served, each once: those that decode and those whose prefill runs."""
    found: dict[int, Req] = {}
    for batch in batches:
        for req in batch.reqs if batch is not None else ():
            if not (req.finished() or req.is_retracted):
                found[id(req)] = req
    if cut is not None:
        found[id(cut)] = cut
    return list(found.values())


def counted(inquirer: Any, running: Callable[[], list[Req]], waiting: Callable[[], list[Req]]) -> Any:
    """SGLang's inquirer of loads, asking here."""
    return replace(
        inquirer,
        get_running_batch=lambda: SimpleNamespace(reqs=running()),
        get_waiting_queue=waiting,
    )


class Counted:
    """A scheduler as SGLang's metrics see it: its queue is everybody who waits, all else is its own."""

    def __init__(self, scheduler: Any, waiting: Callable[[], list[Req]]) -> None:
        object.__setattr__(self, "_scheduler", scheduler)
        object.__setattr__(self, "_waiting", waiting)

    @property
    def waiting_queue(self) -> list[Req]:
        """Everybody who waits for prefill or for the way back."""
        return self._waiting()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)


def waiting(queue: list[Req], away: Callable[[], Iterable[Req]], noting: Noting) -> list[Req]:
    """Those who wait for prefill or for their way back; asked in the middle of SGLang's own work, so it never raises."""
    found: list[Req] = []
    with noting("who is away"):
        found = list(away())
    return [*queue, *found]


def nobody_away(idle: Callable[[], bool], noting: Noting) -> bool:
    """Whether all requests are in places of SGLang's own; true if that cannot be told."""
    nobody = True
    with noting("idleness"):
        nobody = idle()
    return nobody
