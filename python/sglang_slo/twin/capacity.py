"""`capacity`: the highest load at which a scheduler still keeps its promises to a share of the requests.

Bisection on the load factor, from a bracket found by doubling or halving. The search ends when the bracket
is narrower than `tolerance` (a ratio). Attainment is not strictly monotone in load: what is returned is a
load at which the target was reached, with the next one tried above at which it was not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace

from sglang_slo.twin import flags
from sglang_slo.twin.runs import Spec, run_all, show_progress

LOWEST_LOAD, HIGHEST_LOAD = 1 / 64, 64.0


@dataclass(frozen=True)
class Capacity:
    """Where the search ended. `load` 0: not even at the lowest load; `above` inf: still at the highest."""

    scheduler: str
    target: float
    load: float
    above: float
    goodput_rps: float
    tried: tuple[tuple[float, float], ...]  # (load, attainment), in the order they were run

    def to_json(self) -> str:
        """One line of JSON."""
        rounded = [[round(load, 6), round(share, 6)] for load, share in self.tried]
        above = self.above if self.above < float("inf") else None
        return json.dumps(
            {
                "scheduler": self.scheduler,
                "target": self.target,
                "capacity": round(self.load, 6),
                "missed_at": above,
                "goodput_rps": round(self.goodput_rps, 6),
                "tried": rounded,
            }
        )


def capacity(spec: Spec, target: float = 0.9, tolerance: float = 0.03, keep: bool = True) -> Capacity:
    """Search for the capacity of one scheduler on one workload; `spec.load` is where it starts."""
    tried: list[tuple[float, float]] = []
    goodput = {0.0: 0.0}

    def reaches(load: float) -> bool:
        [result] = run_all([replace(spec, load=load)], 1, show_progress, keep)
        tried.append((load, result.attainment))
        goodput[load] = result.goodput_rps
        return result.attainment >= target

    low, high = 0.0, float("inf")
    load = spec.load
    while low == 0.0 or high == float("inf"):
        if reaches(load):
            low = load
            if load >= HIGHEST_LOAD:
                break
            load *= 2
        else:
            high = load
            if load <= LOWEST_LOAD:
                break
            load /= 2
    while low > 0.0 and high < float("inf") and high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return Capacity(spec.title, target, low, high, goodput[low], tuple(tried))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `capacity`."""
    flags.add_workload(parser)
    parser.add_argument("--scheduler", choices=("slo", "stock", "both"), default="both")
    parser.add_argument("--target", type=float, default=0.9, help="share of requests (default: 0.9)")
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="how exactly, as a ratio (default: 0.03)"
    )


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Search and print. Raises ValueError naming the flag."""
    if not 0 < args.target <= 1:
        raise ValueError(f"--target: need a share in (0, 1], got {args.target}")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance: need a ratio above 0, got {args.tolerance}")
    ours, shared = flags.split(rest)
    for scheduler in ("slo", "stock") if args.scheduler == "both" else (args.scheduler,):
        argv = shared + (ours if scheduler == "slo" else [])
        found = capacity(flags.spec(args, scheduler, argv), args.target, args.tolerance, not args.no_cache)
        if args.json:
            print(found.to_json())
        else:
            print(
                f"{found.scheduler}: {found.target:.0%} of requests kept up to load {found.load:.3g} "
                f"({found.goodput_rps:.2f} good req/s); missed at {found.above:.3g}"
            )
    return 0
