"""What happens to one virtual scheduler: a closed loop of clients, commands of operators, and faults one by one.

Takes the place of the twin's feeder: keeps so many requests alive, lets clients leave, pauses, flushes, changes weights,
lets the scheduler drain now and then, and switches one fault on after the other, with a rest between. After each rest the
plan must be ours again. A scheduler with requests and an idle device that does nothing for `IDLE_S` is stuck.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from campaign.faults import Fault, Off, Target
from campaign.wires import Wires
from campaign.world import World, features, prompt
from invariants import BrokenError, alive, check_nothing_left
from sglang_slo.twin.sim.feeder import Feeder
from sglang_slo.twin.sim.recorder import request_id, request_number

IDLE_S = 1.0  # of virtual time that somebody may wait before an idle device
STEP_S = 2e-3
LASTS = 60  # iterations that a fault stays switched on
UNHIT = 40  # further ones that a fault that strikes once waits for its chance
REST = 24  # iterations after it before the plan must be ours again
PROVE = 6  # iterations in which it must be
HANG_S = 120.0  # of real time for one iteration: an endless loop
NAMES_THE_END = SimpleNamespace(eos_token_id=2, additional_stop_token_ids=None)
NEVER_FINISH = 40_000  # iterations without the end of any request


@dataclass
class Tally:
    """What was done, for the report."""

    arrived: int = 0
    ended: int = 0
    finished: int = 0
    aborted: int = 0
    iterations: int = 0
    fallbacks: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # that struck, by kind
    commands: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    preemptions: Counter[str] = field(default_factory=Counter)
    worlds: int = 0

    def add(self, other: Tally) -> None:
        """Take another's counts in."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            mine.update(value) if isinstance(mine, Counter) else setattr(self, name, mine + value)


class Script:
    """The course of one run. `faults` are taken in order; what is left when the run ends was not tried."""

    def __init__(
        self, world: World, wires: Wires, faults: list[Fault], unrest: float = 1.0, faults_alone: bool = False
    ) -> None:
        self.world, self.wires, self.faults = world, wires, faults
        self.unrest = unrest  # multiplies how often clients leave and operators interfere
        self.over = False  # nobody arrives any more
        self._faults_alone = faults_alone
        self.rng = random.Random(f"script {world.seed}")
        self.tally = Tally(worlds=1)
        self.last_fault = ""  # the last one that was switched on
        self.unstruck: list[str] = []
        self._off: Off | None = None
        self._left = 0  # iterations of the present stage
        self._stage = "rest"
        self._fallbacks_then = 0
        self._once = False
        self.may_not_finish: set[str] = set()  # their clients left
        self.shed: set[str] = set()  # refused for the length of the queue
        self.feeder: ScriptedFeeder | None = None

    # -- faults

    def iteration(self) -> None:
        """The start of an iteration: switch faults on and off."""
        self.tally.iterations += 1
        self._left -= 1
        struck = self._off is not None and self.wires.fired > 0
        if self._stage == "on" and (self._left <= 0 or (self._once and struck)):
            if self._once and not struck and self._left > -UNHIT:
                return
            self._end_fault()
        elif self._stage == "rest" and self._left <= 0:
            self._stage, self._left, self._fallbacks_then = "prove", PROVE, self.fallbacks()
        elif self._stage == "prove" and self._left <= 0:
            if self.fallbacks() > self._fallbacks_then:
                raise BrokenError("RECOVERY: planning still falls back to stock long after the fault")
            self._begin_fault()

    def _begin_fault(self) -> None:
        if not self.faults:
            self._left, self.over = 1 << 60, self._faults_alone
            return
        fault = self.faults.pop(0)
        self.last_fault, self._once = fault.name, fault.once
        self._stage, self._left = "on", LASTS
        self._off = fault.on(self.target())

    def _end_fault(self) -> None:
        if self._off is not None:
            struck = self.wires.fired > 0 or not self.last_fault.startswith("raise")
            self._off()
            self._off = None
            kind = (
                " ".join(self.last_fault.split()[:4])
                if self.last_fault.startswith("raise")
                else self.last_fault
            )
            if struck:
                self.tally.faults[kind] += 1
            else:
                self.unstruck.append(self.last_fault)
            self.wires.fired = 0
        self._stage, self._left = "rest", REST

    def finish(self) -> None:
        """Switch off whatever is on."""
        with contextlib.suppress(Exception):
            self._end_fault()

    def target(self) -> Target:
        """What faults act on."""
        assert self.feeder is not None
        return Target(self.feeder._scheduler, self.feeder._recorder.engine, self.wires, self.rng)

    def fallbacks(self) -> int:
        """Plans that stock scheduling had to make."""
        assert self.feeder is not None
        snapshot = self.feeder._scheduler.slo_observer.snapshot(0.0)
        return int(snapshot.get("fallbacks", {}).get("count", 0))

    # -- clients and operators

    def commands(self, fresh: list[Any]) -> Iterator[Any]:
        """What comes beside new requests; `fresh`: those that come now."""
        assert self.feeder is not None
        s, rng, p = self.feeder._scheduler, self.rng, 0.02 * self.unrest
        if s._engine_paused:
            if rng.random() < 0.5:
                yield self._said(io_struct.ContinueGenerationReqInput())
            return
        if rng.random() < p:
            there = sorted(alive(s) | {r.rid for r in fresh})
            if there:
                yield self._abort(AbortReq(rid=rng.choice(there)), there)
        if rng.random() < p / 40:
            yield self._abort(AbortReq(rid="", abort_all=True), sorted(alive(s) | {r.rid for r in fresh}))
        if rng.random() < p / 8:
            yield self._said(io_struct.PauseGenerationReqInput(mode=rng.choice(["retract", "in_place"])))
        if rng.random() < p / 8:
            yield self._said(io_struct.FlushCacheReqInput())
        if rng.random() < p / 8:
            yield self._said(io_struct.GetInternalStateReq())
        if rng.random() < p / 16:
            yield self._said(
                io_struct.UpdateWeightFromDiskReqInput(
                    model_path="same", load_format="auto", flush_cache=False
                )
            )

    def _said(self, command: Any) -> Any:
        mode = getattr(command, "mode", "")
        self.tally.commands[f"{type(command).__name__} {mode}".strip()] += 1
        return command

    def _abort(self, command: AbortReq, there: list[str]) -> AbortReq:
        self.may_not_finish.update(rid for rid in there if rid.startswith(command.rid))
        self.tally.commands["abort all" if command.abort_all else "abort"] += 1
        return command


class ScriptedFeeder(Feeder):
    """The twin's feeder as a closed loop with a script."""

    def __init__(self, scheduler: Any, script: Script, recorder: Any) -> None:
        super().__init__(scheduler, script.world.workload, recorder)
        self.script, script.feeder = script, self
        self._idle_since_s: float | None = None
        self._draining = False
        self._last_end = (0, 0)  # (requests over, iteration)

    def pull(self) -> list[Any]:
        """Requests and commands of this iteration."""
        s, script = self._scheduler, self.script
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        script.iteration()
        living = self._next - self._recorder.ended
        self._not_stuck(living)
        if (self._next == len(self._arrivals) or script.over) and not living:
            return self._end()
        if not living and self._draining:
            self._draining = False
            if s.is_fully_idle():
                s.on_idle()  # ends the rows of those whose end was not heard of for a fault
                check_nothing_left(s)
                script.tally.commands["drained"] += 1
        elif script.rng.random() < 0.003 * script.unrest:
            self._draining = True
        wanted = 0 if self._draining or script.over else script.world.alive - living
        fresh = [self._arrive() for _ in range(min(wanted, len(self._arrivals) - self._next))]
        return [*fresh, *script.commands(fresh)]

    def _end(self) -> list[Any]:
        if self._scheduler._engine_paused:
            return [io_struct.ContinueGenerationReqInput()]
        if self._scheduler.is_fully_idle():
            self.script.finish()
            self._scheduler.on_idle()  # SGLang's own check for leaks
            check_nothing_left(self._scheduler)
            self._scheduler.gracefully_exit = True
        return []

    def _not_stuck(self, living: int) -> None:
        """Moves virtual time while the device is idle. Raises BrokenError where nothing will ever happen."""
        s, engine, tally = self._scheduler, self._recorder.engine, self.script.tally
        if self._in_flight() or not living or s._engine_paused:
            self._idle_since_s = None
            if s._engine_paused or not self._in_flight():
                engine.wait_until(engine.now_s + STEP_S)
        else:
            since = self._idle_since_s = engine.now_s if self._idle_since_s is None else self._idle_since_s
            engine.wait_until(engine.now_s + STEP_S)
            if engine.now_s - since > IDLE_S:
                known = alive(s)
                where = f"{len(s.waiting_queue)} in the queue, {len(known)} known, {living} alive"
                raise BrokenError(f"WORK: an idle device for {IDLE_S:g} s: {where}")
        over = self._recorder.ended
        if over != self._last_end[0] or not living:
            self._last_end = (over, tally.iterations)
        if tally.iterations - self._last_end[1] > NEVER_FINISH:
            raise BrokenError(f"WORK: no request has ended for {NEVER_FINISH} iterations")

    def _arrive(self) -> TokenizedGenerateReqInput:
        self._scheduler.tokenizer = NAMES_THE_END  # asked for by min_new_tokens
        i, self._next = self._next, self._next + 1
        self._arrivals[i] = now = self._recorder.engine.now_s
        self._recorder.requests.arrival_s[i] = now
        self.script.tally.arrived += 1
        return self._request(i)

    def _request(self, i: int) -> TokenizedGenerateReqInput:
        request, world = super()._request(i), self.script.world
        extra = features(world, i)
        if extra:
            least = extra.pop("min_new_tokens", 0)
            params = SamplingParams(
                max_new_tokens=world.workload.declared(i),
                custom_params=request.sampling_params.custom_params,
                **{"temperature": 0.0, **extra},
            )
            params.normalize(None)
            params.min_new_tokens = min(
                least, params.max_new_tokens or least
            )  # SGLang checks it against a tokenizer, which there is none of here
            params.verify(4096)
            request.sampling_params = params
            self.script.tally.features.update(extra.keys())
        request.input_ids = prompt(world, i)
        return request

    def unfinished(self) -> list[str]:
        """Requests that are over without all their tokens though nobody gave them up."""
        done = self._recorder.requests.finished
        over = {request_id(i) for i in range(self._next) if not done[i]}
        return sorted(over - self.script.may_not_finish - self.script.shed, key=request_number)
