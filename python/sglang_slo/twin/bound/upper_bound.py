"""An attainment that no scheduler can exceed on a workload and a profile.

Let x_r be 1 if request r attains. In any interval [s, e] the device has e - s seconds, and every pass that an
attained request needs between its release >= s and its deadline <= e lies within it, so with the least work
w_r of `least_work.py`

    maximise   sum x_r / n
    subject to sum of w_r x_r over releases >= s and deadlines <= e  <=  e - s      for all s < e
               0 <= x_r <= 1

holds for the x of every schedule, and its optimum over real x is no less than the best schedule's attainment.
There are as many such rows as intervals and mixes; only those that the current optimum breaks are added, the
worst first. With any subset of the rows the optimum is still an upper bound, so stopping early costs
tightness, not validity.

KV is in it: an interval has M (e - s) of it, and w_r counts what r must hold while its passes run. A measured device
is taken at its floor (`devices.floor`).

What it leaves out, always on the safe side: that a pass is no longer than the tightest gap limit in it (hence
its fixed cost), cache evictions, and the wish to know the future. Noise of iteration times is left out too:
of a workload with `noise_sigma` it bounds the device without noise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_slo.twin.bound.least_work import Jobs
from sglang_slo.twin.bound.relaxation import most_attained
from sglang_slo.twin.devices.floor import floor
from sglang_slo.twin.workloads.workload import BLOCK_TOKENS, Workload, load_workload

RULES = {"every": "every gap", "paced": "a reader's pace", "p99": "the 99th percentile gap"}


@dataclass(frozen=True)
class Bound:
    """The result. `rule`: what is meant by `tbt_ms`, one of `RULES`."""

    workload: str
    profile: str
    load: float
    seed: int
    rule: str
    requests: int
    attainment: float
    hopeless: int  # requests that even a device to themselves could not serve within their limits
    rows: int
    rounds: int
    converged: bool
    wall_s: float

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def sentence(self) -> str:
        """The same for people."""
        return (
            f"{self.workload} at load {self.load:g}, {RULES[self.rule]} judged: no scheduler attains more than "
            f"{self.attainment:.3f} of {self.requests} requests ({self.hopeless} could not even alone; "
            f"{self.rows} constraints, {self.wall_s:.1f} s)"
        )


def jobs_of(workload: Workload, rule: str = "every") -> Jobs:
    """What the bound may know of a workload: everything, true lengths included. Raises ValueError on the
    rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule: need one of {', '.join(RULES)}, got {rule!r}")
    before_s, after_s = workload.on.cpu_times_s
    return Jobs(
        arrival_s=workload.arrival_s,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        limits=[workload.limits[c] for c in workload.class_id.tolist()],
        blocks=workload.blocks,
        block_tokens=BLOCK_TOKENS,
        device=floor(workload.on),
        kv_capacity_tokens=workload.on.kv_capacity_tokens,
        before_s=before_s,
        after_s=after_s,
        gaps_per_exception=100 if rule == "p99" else None,
        paced=rule == "paced",
    )


def bound(workload: Workload, rule: str = "every", budget_s: float = math.inf) -> Bound:
    """The bound of a workload. `budget_s` stops refining early, at the price of figures that depend on the
    machine.
    """
    began = time.perf_counter()
    solved = most_attained(jobs_of(workload, rule), budget_s)
    n = len(workload)
    return Bound(
        workload=workload.name,
        profile=workload.profile_name,
        load=workload.load,
        seed=workload.seed,
        rule=rule,
        requests=n,
        attainment=solved.attained / n,
        hopeless=solved.hopeless,
        rows=solved.rows,
        rounds=solved.rounds,
        converged=solved.converged,
        wall_s=time.perf_counter() - began,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `bound` command."""
    parser.add_argument("--workload", required=True, help="a ready-made workload or a YAML file")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--data", type=Path, help="further folder for traces")
    parser.add_argument("--device", help="measured kernels or a profile, instead of the workload's")
    parser.add_argument("--seed", type=int, help="instead of the workload's")
    parser.add_argument("--max-requests", type=int, help="instead of the workload's")
    parser.add_argument("--rule", choices=list(RULES), help="how gaps count (default: each way)")
    parser.add_argument("--json", action="store_true", help="one line per rule")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the bound. Raises ValueError on flags it does not know."""
    if rest:
        raise ValueError(f"{rest[0]}: unknown option; the bound holds for every scheduler's settings")
    workload = load_workload(
        args.workload,
        load=args.load,
        data=args.data,
        seed=args.seed,
        max_requests=args.max_requests,
        device=args.device,
    )
    for rule in [args.rule] if args.rule else RULES:
        found = bound(workload, rule)
        print(found.to_json() if args.json else found.sentence())
    return 0
