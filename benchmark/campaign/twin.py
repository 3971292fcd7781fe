"""Runs of the real scheduler in virtual time, each in a small world with faults; every invariant in every iteration."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from unittest import mock

from campaign.faults import Fault
from campaign.script import HANG_S, Script, ScriptedFeeder, Tally
from campaign.wires import Wires
from campaign.world import VOCAB, World
from invariants import BrokenError, Watched
from sglang_slo.runtime.sglang import process
from sglang_slo.twin.sim import driver, tokens, virtual, worker  # first: it fixes the platform


class Hung(BaseException):
    """An iteration does not end. Not an Exception: nothing of ours may catch it."""


@dataclass(frozen=True)
class Break:
    """Something broke: what, under which fault, in which world."""

    what: str
    fault: str
    world: str
    trace: str

    @property
    def kind(self) -> str:
        """The first word: the invariant's name, DIED or HUNG."""
        return self.what.split(":")[0]


class Guarded(Watched):
    """`Watched`, for small pools and under faults: a device may idle for an iteration, but not for long."""

    thorough_every = 4

    def get_next_batch_to_run(self: Any, running_batch: Any, last_batch: Any) -> Any:
        """Without WORK in each single iteration; the script watches it over time."""
        return super(Watched, self).get_next_batch_to_run(running_batch, last_batch)  # type: ignore[misc]


def run(
    world: World, wires: Wires, faults: list[Fault], unrest: float = 1.0, faults_alone: bool = False
) -> tuple[Tally, Break | None]:
    """One run. `faults` loses those that were tried; the one that broke the run is named in the Break.

    `faults_alone`: the run ends when the faults are over, however many requests are left.
    """
    script = Script(world, wires, faults, unrest, faults_alone)
    broken: Break | None = None
    with _patched(script):
        try:
            driver.run(world.workload, "slo", list(world.argv), watcher=Guarded, allow_fallbacks=True)
            lost = script.feeder.unfinished() if script.feeder else []
            if lost:
                raise BrokenError(f"TOKENS: {len(lost)} requests ended without all of them, as {lost[:3]}")
        except (Exception, Hung) as error:
            broken = Break(_what(error), script.last_fault, world.name, _trace(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            script.finish()
    _close(script)
    return script.tally, broken


def _what(error: BaseException) -> str:
    if isinstance(error, BrokenError):
        return str(error)
    if isinstance(error, Hung):
        return f"HUNG: {error}"
    return f"DIED: {type(error).__name__}: {error}"


def _trace(error: BaseException) -> str:
    """The last frames, without the harness's wires."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.endswith("wires.py")]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(frames[-6:]))


def _close(script: Script) -> None:
    if script.feeder is None:
        return
    s, tally = script.feeder._scheduler, script.tally
    recorder = script.feeder._recorder
    tally.ended, tally.finished = recorder.ended, int(recorder.requests.finished.sum())
    tally.aborted = tally.ended - tally.finished
    if getattr(s, "slo_on", False):
        tally.fallbacks = script.fallbacks()
        tally.preemptions.update(s.slo_preempt.counts)


@contextlib.contextmanager
def _patched(script: Script) -> Iterator[None]:
    """While it is open, the twin is fed by the script, knows few words, and no iteration lasts for ever."""

    def too_long(*_: Any) -> None:
        raise Hung(f"one iteration took {HANG_S:g} s")

    def feeder(scheduler: Any, _: Any, recorder: Any) -> ScriptedFeeder:
        scheduler.twin_hears = recorder
        return ScriptedFeeder(scheduler, script, recorder)

    class Outlet(virtual._Outlet):
        def send_output(self, output: Any, recv_obj: Any = None) -> None:
            """Also notes who was refused for the length of the queue."""
            reason = getattr(output, "finished_reason", None)
            if isinstance(reason, dict) and reason.get("status_code") == HTTPStatus.SERVICE_UNAVAILABLE:
                script.shed.add(output.rid)
            super().send_output(output, recv_obj)

    def load(*_: Any, **__: Any) -> tuple[bool, str]:
        return True, "the same weights"

    before = signal.signal(signal.SIGALRM, too_long)
    with (
        mock.patch.object(virtual, "Feeder", feeder),
        mock.patch.object(virtual, "_Outlet", Outlet),
        mock.patch.object(worker, "VOCAB", VOCAB),
        mock.patch.object(tokens, "VOCAB", VOCAB),
        mock.patch.object(process.weights_loader(worker.TwinWorker), "update_weights_from_disk", load),
        mock.patch.object(driver, "CONTEXT_STEP", 512),
    ):
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, before)
