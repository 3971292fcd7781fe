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
from collections import Counter
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
SOAK_REQUESTS = {"lone": 500, "crowded": 3000, "busy": 12_000}  # a world's, by its kind
SOAK_SHARES = {"lone": 0.1, "crowded": 0.35, "busy": 0.55}  # of the worlds
SOAK_FAULTS = 40  # a world's: the rest of it runs undisturbed but for clients and operators
Say = Callable[[str], None]
Keep = Callable[["Findings"], None]  # called after each world


@dataclass
class Findings:
    """What was done and what broke."""

    seed: int
    tally: Tally = field(default_factory=Tally)
    kinds: Counter[str] = field(default_factory=Counter)  # requests of the soak, by kind of world
    wires: list[Wire] = field(default_factory=list)
    tried: int = 0  # faults switched on
    breaks: list[Break] = field(default_factory=list)
    cpu_s: float = 0.0

    def broken(self) -> dict[str, int]:
        """How often which invariant broke."""
        kinds = [b.kind for b in self.breaks]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "seed": self.seed,
            "tally": {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self.tally).items()},
            "kinds": dict(self.kinds),
            "entries": [w.name for w in self.wires if w.entry],
            "inner": [w.name for w in self.wires if not w.entry],
            "faults_tried": self.tried,
            "breaks": [asdict(b) for b in self.breaks],
            "broken": self.broken(),
            "cpu_s": round(self.cpu_s, 1),
        }


def listed(wires: Wires, seed: int, worlds: int = LISTING) -> list[Wire]:
    """What the scheduler calls of ours, noted in runs without faults; what breaks there is found again later."""
    wires.tracing = True
    try:
        for k in range(worlds):
            for kind in (world.CROWDED, world.LONE):
                drawn = world.draw(seed * 1000 + k, LISTING_REQUESTS, kind, features=False)
                run(drawn, wires, [], unrest=2.0)
    finally:
        wires.tracing = False
    return wires.seen()


def sweep(findings: Findings, wires: Wires, faults: list[Fault], say: Say, keep: Keep) -> None:
    """Try every fault in both kinds of world."""
    for kind in (world.CROWDED, world.LONE):
        left = list(faults)
        k = 0
        while left:
            before = len(left)
            also = world.CORNERS[k % len(world.CORNERS)]
            drawn = world.draw(
                findings.seed * 1000 + 500 + k, SWEEP_REQUESTS, kind, features=False, also=also
            )
            _one(findings, drawn, wires, left, faults_alone=True)
            findings.tried += before - len(left)
            k += 1
            keep(findings)
            say(f"sweep, {kind.name}: {len(faults) - len(left)} of {len(faults)} faults, {_so_far(findings)}")


def soak(findings: Findings, wires: Wires, faults: list[Fault], requests: int, say: Say, keep: Keep) -> None:
    """Worlds of many seeds until `requests` have arrived in all."""
    began, k = findings.tally.arrived, 0
    while findings.tally.arrived - began < requests:
        rng = random.Random(f"soak {findings.seed} {k}")
        (kind,) = rng.choices(world.KINDS, [SOAK_SHARES[kind.name] for kind in world.KINDS])
        size = min(SOAK_REQUESTS[kind.name], requests - (findings.tally.arrived - began))
        drawn = world.draw(findings.seed * 1_000_000 + k, size, kind)
        some = [rng.choice(faults) for _ in range(SOAK_FAULTS)] if faults else []
        before = (len(some), findings.tally.arrived)
        _one(findings, drawn, wires, some)
        findings.tried += before[0] - len(some)
        findings.kinds[kind.name] += findings.tally.arrived - before[1]
        k += 1
        keep(findings)
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


def campaign(order: Order, say: Say, keep: Keep = lambda _: None) -> Findings:
    """All three parts. `keep` is given what has been found so far after each world: a long run may be cut off."""
    began = time.process_time()
    wires, findings = Wires(), Findings(order.seed)

    def timed(findings: Findings) -> None:
        findings.cpu_s = time.process_time() - began
        keep(findings)

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
            sweep(findings, wires, faults, say, timed)
        soak(findings, wires, faults, order.requests, say, timed)
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
    broke = ", ".join(f"{kind} {n}" for kind, n in findings.broken().items())
    return f"{findings.tally.arrived} requests, {findings.tally.iterations} iterations, broke: {broke or 'nothing'}"
