"""The twin's part of the campaign: every fault systematically, then many requests with faults by chance.

1. `listed`: a few runs without faults, with wires that note what the scheduler calls: the list of entries.
2. `sweep`: each fault in a crowded world and in one with a request at a time; one after the other in the same run
   until something breaks, then on with the rest in a new world.
3. `soak`: worlds of many seeds until so many requests have arrived, each with faults drawn from the same list.

The same seed gives the same worlds, faults and findings.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from campaign import world
from campaign.faults import WORLD_FAULTS, Fault, wire_faults
from campaign.script import Tally
from campaign.twin import Break, run
from campaign.wires import Wire, Wires

LISTING = 4  # worlds of each kind in which calls are noted
LISTING_REQUESTS = 120
SWEEP_REQUESTS = 4000  # a world's; its run ends when its faults are over or something breaks
SOAK_REQUESTS = 4000  # a world's
SOAK_FAULTS = 40  # a world's: the rest of it runs undisturbed but for clients and operators
Say = Callable[[str], None]


@dataclass
class Findings:
    """What was done and what broke."""

    seed: int
    tally: Tally = field(default_factory=Tally)
    wires: list[Wire] = field(default_factory=list)
    tried: int = 0  # faults switched on
    breaks: list[Break] = field(default_factory=list)
    cpu_s: float = 0.0

    def kinds(self) -> dict[str, int]:
        """How often which invariant broke."""
        kinds = [b.kind for b in self.breaks]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "seed": self.seed,
            "tally": {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self.tally).items()},
            "entries": [w.name for w in self.wires if w.entry],
            "inner": [w.name for w in self.wires if not w.entry],
            "faults_tried": self.tried,
            "breaks": [asdict(b) for b in self.breaks],
            "broken": self.kinds(),
            "cpu_s": round(self.cpu_s, 1),
        }


def listed(wires: Wires, seed: int, worlds: int = LISTING) -> list[Wire]:
    """What the scheduler calls of ours, noted in runs without faults; what breaks there is found again later."""
    wires.tracing = True
    try:
        for k in range(worlds):
            for crowded in (True, False):
                run(
                    world.draw(seed * 1000 + k, LISTING_REQUESTS, crowded, features=False),
                    wires,
                    [],
                    unrest=2.0,
                )
    finally:
        wires.tracing = False
    return wires.seen()


def sweep(findings: Findings, wires: Wires, faults: list[Fault], say: Say) -> None:
    """Try every fault in both kinds of world."""
    for crowded in (True, False):
        left = list(faults)
        k = 0
        while left:
            before = len(left)
            also = world.CORNERS[k % len(world.CORNERS)]
            drawn = world.draw(
                findings.seed * 1000 + 500 + k, SWEEP_REQUESTS, crowded, features=False, also=also
            )
            _one(findings, drawn, wires, left, faults_alone=True)
            findings.tried += before - len(left)
            k += 1
            where = "crowded" if crowded else "lone"
            say(f"sweep, {where}: {len(faults) - len(left)} of {len(faults)} faults, {_so_far(findings)}")


def soak(findings: Findings, wires: Wires, faults: list[Fault], requests: int, say: Say) -> None:
    """Worlds of many seeds until `requests` have arrived in all."""
    began, k = findings.tally.arrived, 0
    while findings.tally.arrived - began < requests:
        rng = random.Random(f"soak {findings.seed} {k}")
        size = min(SOAK_REQUESTS, requests - (findings.tally.arrived - began))
        drawn = world.draw(findings.seed * 1_000_000 + k, size, crowded=rng.random() < 0.9)
        some = [rng.choice(faults) for _ in range(SOAK_FAULTS)] if faults else []
        before = len(some)
        _one(findings, drawn, wires, some)
        findings.tried += before - len(some)
        k += 1
        say(f"soak: {findings.tally.arrived - began} of {requests} requests, {k} worlds, {_so_far(findings)}")


@dataclass(frozen=True)
class Order:
    """What to do. `fault`: only faults whose name contains it; `entries_only`: no exceptions in inner calls.

    `wires`: functions that nothing is listed for, because they are known: exceptions in these, and no other fault.
    """

    requests: int
    seed: int
    sweep: bool = True
    entries_only: bool = False
    fault: str = ""
    wires: tuple[str, ...] = ()
    worlds: int = LISTING


def campaign(order: Order, say: Say) -> Findings:
    """All three parts."""
    began = time.process_time()
    wires, findings = Wires(), Findings(order.seed)
    import sglang_slo.runtime.scheduler.scheduler  # noqa: F401 - so that its modules are there to be walked

    with wires.strung():
        named = [Wire(name, False) for name in order.wires]
        findings.wires = named or listed(wires, order.seed, order.worlds)
        entries = [w for w in findings.wires if w.entry]
        say(f"{len(findings.wires)} functions of ours are called, {len(entries)} of them entries")
        faults = [
            *(() if named else WORLD_FAULTS),
            *wire_faults(entries if order.entries_only else findings.wires),
        ]
        faults = [f for f in faults if order.fault in f.name]
        if order.sweep:
            sweep(findings, wires, faults, say)
        soak(findings, wires, faults, order.requests, say)
    findings.cpu_s = time.process_time() - began
    return findings


def _one(
    findings: Findings, drawn: world.World, wires: Wires, faults: list[Fault], faults_alone: bool = False
) -> None:
    tally, broken = run(drawn, wires, faults, faults_alone=faults_alone)
    findings.tally.add(tally)
    if broken is not None:
        findings.breaks.append(broken)


def _so_far(findings: Findings) -> str:
    broke = ", ".join(f"{kind} {n}" for kind, n in findings.kinds().items())
    return f"{findings.tally.arrived} requests, {findings.tally.iterations} iterations, broke: {broke or 'nothing'}"
