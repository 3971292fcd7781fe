"""`plan`: how many replicas keep a target share of promises, ours beside the best stock.

The fewest are looked for by doubling and halving. At every number of replicas stock's setting is searched for anew, on
the share of the first replica.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from sglang_slo.twin import flags
from sglang_slo.twin.compare import best_stock, merit
from sglang_slo.twin.replicas import ROUTERS
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.runs import Spec, run_all, show_progress

MOST_REPLICAS = 64


@dataclass(frozen=True)
class Plan:
    """`replicas` 0: not even MOST_REPLICAS reach the target. `tried`: replicas -> attainment."""

    scheduler: str
    target: float
    router: str
    replicas: int
    attainment: float
    goodput_rps: float
    tried: dict[int, float]


def fewest(
    reaches: Callable[[int], float], target: float, most: int = MOST_REPLICAS
) -> tuple[int, dict[int, float]]:
    """The least number from 1 to `most` at which `reaches` is at least `target` (0: none), and all that were tried."""
    tried: dict[int, float] = {}

    def good(n: int) -> bool:
        tried[n] = reaches(n)
        return tried[n] >= target

    low, high = 0, 1
    while not good(high):
        if high == most:
            return 0, tried
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high, tried


def plan(base: Spec, target: float, router: str, jobs: int | None, keep: bool = True) -> Plan:
    """For the scheduler of `base`; stock is searched for its best setting."""
    goodput: dict[int, float] = {}
    titles: dict[int, str] = {}

    def reaches(n: int) -> float:
        one = replace(base, share=(0, n, router))
        if base.scheduler == "stock":
            best = max(best_stock(one, jobs, "quick", keep), key=merit)
            one = replace(one, argv=tuple(best.settings["argv"]), name=f"best {best.scheduler}")
        titles[n] = one.title
        parts = run_all([replace(one, share=(k, n, router)) for k in range(n)], jobs, show_progress, keep)
        goodput[n] = sum(part.goodput_rps for part in parts)
        return _attained(parts)

    found, tried = fewest(reaches, target)
    return Plan(
        titles[found or max(tried)],
        target,
        router,
        found,
        tried[found or max(tried)],
        goodput[found or max(tried)],
        dict(sorted(tried.items())),
    )


def _attained(parts: list[RunResult]) -> float:
    total = sum(len(part.requests.arrival_s) for part in parts)
    return sum(float(part.requests.attained.sum()) for part in parts) / max(total, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan`."""
    flags.add_workload(parser)
    parser.add_argument("--target", type=float, default=0.99, help="share of requests (default: 0.99)")
    parser.add_argument("--router", choices=ROUTERS, default="round_robin", help="default: round_robin")
    parser.add_argument("--scheduler", choices=("slo", "stock", "both"), default="both")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Search and print. Raises ValueError naming the flag."""
    if not 0 < args.target <= 1:
        raise ValueError(f"--target: need a share in (0, 1], got {args.target}")
    ours, shared = flags.split(rest)
    plans = []
    for scheduler in ("slo", "stock") if args.scheduler == "both" else (args.scheduler,):
        argv = shared + (ours if scheduler == "slo" else [])
        name = "ours" if scheduler == "slo" else ""
        base = flags.spec(args, scheduler, argv, name)
        plans.append(plan(base, args.target, args.router, args.jobs, not args.no_cache))
    if args.json:
        print("\n".join(json.dumps(asdict(p)) for p in plans))
        return 0
    print(f"{args.workload} at load {args.load:g}, {args.target:.1%} of requests, {args.router}:")
    for p in plans:
        need = f"{p.replicas}" if p.replicas else f"more than {MOST_REPLICAS}"
        print(f"  {p.scheduler}: {need} replicas ({p.attainment:.1%} kept, {p.goodput_rps:.2f} good req/s)")
    return 0
