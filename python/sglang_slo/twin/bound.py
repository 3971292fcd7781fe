"""An attainment that no scheduler can exceed on a workload and a profile.

Let x_r be 1 if request r attains. In any interval [s, e] the device has e - s seconds, and every pass that an
attained request needs between its release >= s and its deadline <= e lies within it, so with the least work
w_r of `least_work.py`

    maximise sum x_r / n   subject to   sum of w_r x_r over releases >= s and deadlines <= e  <=  e - s,   0
    <= x <= 1

holds for the x of every schedule, and its optimum over real x is no less than the best schedule's attainment.
There are as many such rows as intervals and mixes; only those that the current optimum breaks are added, the
worst first. With any subset of the rows the optimum is still an upper bound, so stopping early costs
tightness, not validity.

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

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from sglang_slo.twin.least_work import MIXES, Jobs, Work, least_work
from sglang_slo.twin.profiles import cpu_times_s
from sglang_slo.twin.workload import BLOCK_TOKENS, Workload, load_workload

RULES = ("p99", "every")
_ROUNDS = 60
_ROWS_PER_ROUND = 400
_SLACK = 1e-6  # of the solver, in units of requests


@dataclass(frozen=True)
class Bound:
    """The result. `rule`: "p99" as attainment is defined, "every": of schedulers that never exceed a gap
    limit.
    """

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
        judged = "its 99th percentile gap" if self.rule == "p99" else "every gap"
        return (
            f"{self.workload} at load {self.load:g}, {judged} judged: no scheduler attains more than "
            f"{self.attainment:.3f} of {self.requests} requests ({self.hopeless} could not even alone; "
            f"{self.rows} constraints, {self.wall_s:.1f} s)"
        )


def jobs_of(workload: Workload, rule: str = "p99") -> Jobs:
    """What the bound may know of a workload: everything, true lengths included. Raises ValueError on the
    rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule: need one of {', '.join(RULES)}, got {rule!r}")
    before_s, after_s = cpu_times_s(workload.profile)
    return Jobs(
        arrival_s=workload.arrival_s,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        limits=[workload.limits[c] for c in workload.class_id.tolist()],
        blocks=workload.blocks,
        block_tokens=BLOCK_TOKENS,
        device=workload.profile.coefficients,
        kv_capacity_tokens=workload.profile.kv_capacity_tokens,
        before_s=before_s,
        after_s=after_s,
        gaps_per_exception=100 if rule == "p99" else None,
    )


def bound(workload: Workload, rule: str = "p99", budget_s: float = math.inf) -> Bound:
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


@dataclass(frozen=True)
class Solved:
    """`attained`: a whole number of requests that no schedule exceeds."""

    attained: int
    relaxed: float
    hopeless: int
    rows: int
    rounds: int
    converged: bool


def most_attained(jobs: Jobs, budget_s: float = math.inf) -> Solved:
    """Solve the relaxation, adding broken rows until none is left, rounds run out or the time is spent."""
    work = least_work(jobs)
    program = _Program(work, len(jobs.arrival_s))
    deadline = time.perf_counter() + budget_s
    rounds, converged = 0, False
    x = program.solve()
    while rounds < _ROUNDS and time.perf_counter() < deadline:
        fresh = _broken_rows(work, x)
        if not fresh:
            converged = True
            break
        program.add(fresh)
        x = program.solve()
        rounds += 1
    relaxed = float(x[: program.requests].sum())
    whole = math.floor(relaxed + _SLACK * max(1.0, relaxed))
    return Solved(whole, relaxed, int(work.hopeless.sum()), program.rows, rounds, converged)


@dataclass(frozen=True)
class _Row:
    """One broken constraint: mix, interval, and by how much of the interval it is broken."""

    mix: int
    start_s: float
    end_s: float
    excess: float


class _Program:
    """The linear program so far."""

    def __init__(self, work: Work, requests: int) -> None:
        self.work, self.requests = work, requests
        self.rows = 0
        upper = np.ones(work.columns)
        upper[:requests][work.hopeless] = 0.0
        self._bounds = np.column_stack((np.zeros(work.columns), upper))
        self._cost = np.concatenate((-np.ones(requests), np.zeros(work.columns - requests)))
        self._matrix, self._right = self._links()

    def _links(self) -> tuple[csr_matrix, NDArray[np.float64]]:
        """x_b - x_a <= 0 for each link (a, b)."""
        links = np.array(self.work.links, np.int64).reshape(-1, 2)
        k = len(links)
        rows = np.repeat(np.arange(k), 2)
        columns = links[:, ::-1].reshape(-1)
        values = np.tile([1.0, -1.0], k)
        return csr_matrix((values, (rows, columns)), shape=(k, self.work.columns)), np.zeros(k)

    def add(self, fresh: list[_Row]) -> None:
        """Add constraints, each divided by its interval's length so that all are of one size."""
        work, parts = self.work, []
        for row in fresh:
            inside = np.flatnonzero((work.release_s >= row.start_s) & (work.due_s <= row.end_s))
            share = work.device_s[row.mix, inside] / (row.end_s - row.start_s)
            less = work.less[inside]
            columns = np.concatenate((work.column[inside], less[less >= 0]))
            values = np.concatenate((share, -share[less >= 0]))
            places = np.zeros(len(columns), np.int64)
            parts.append(csr_matrix((values, (places, columns)), shape=(1, work.columns)))
        self._matrix = vstack([self._matrix, *parts], format="csr")
        self._right = np.concatenate((self._right, np.ones(len(fresh))))
        self.rows += len(fresh)

    def solve(self) -> NDArray[np.float64]:
        """The optimum of the rows so far. Raises RuntimeError if the solver fails."""
        solved = linprog(self._cost, A_ub=self._matrix, b_ub=self._right, bounds=self._bounds, method="highs")
        if solved.x is None:
            raise RuntimeError(f"the bound's linear program was not solved: {solved.message}")
        return np.asarray(solved.x)


def _broken_rows(work: Work, x: NDArray[np.float64]) -> list[_Row]:
    """The worst broken interval of each start and mix; the worst of those overall."""
    by_due = np.argsort(work.due_s, kind="stable")
    release, due = work.release_s[by_due], work.due_s[by_due]
    less = work.less[by_due]
    begins = work.begins[by_due]
    amount = x[work.column[by_due]] - np.where(less >= 0, x[less], 0.0)
    found: list[_Row] = []
    for mix in range(len(MIXES)):
        demand = work.device_s[mix, by_due] * amount
        live = demand > 1e-12
        found += _worst_of_starts(mix, release[live], due[live], demand[live], begins[live])
    found.sort(key=lambda row: (-row.excess, row.start_s, row.end_s, row.mix))
    return found[:_ROWS_PER_ROUND]


def _worst_of_starts(
    mix: int,
    release: NDArray[np.float64],
    due: NDArray[np.float64],
    demand: NDArray[np.float64],
    begins: NDArray[np.bool_],
) -> list[_Row]:
    """For each start, the end whose interval is broken by most seconds; `begins` tells which releases to
    start at.

    Starts are taken from the latest to the earliest: `over` holds for each end what is released since the
    start and due by that end, minus the end, so one piece of work is one addition to a slice of it.
    """
    ends, place = np.unique(due, return_inverse=True)
    over = -ends
    found = []
    order = np.argsort(-release, kind="stable")
    starts = release[order].tolist()
    for k, j in enumerate(order.tolist()):
        over[place[j] :] += demand[j]
        start = starts[k]
        if not begins[j] or (k + 1 < len(starts) and starts[k + 1] == start):
            continue
        low = int(np.searchsorted(ends, start, side="right"))
        worst = low + int(over[low:].argmax())
        length_s = float(ends[worst]) - start
        excess = (float(over[worst]) + start) / length_s
        if excess > 1e-7:
            found.append(_Row(mix, start, float(ends[worst]), excess))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `bound` command."""
    parser.add_argument("--workload", required=True, help="a ready-made workload or a YAML file")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--data", type=Path, help="further folder for traces")
    parser.add_argument("--seed", type=int, help="instead of the workload's")
    parser.add_argument("--max-requests", type=int, help="instead of the workload's")
    parser.add_argument("--rule", choices=RULES, help="which gaps count (default: both)")
    parser.add_argument("--json", action="store_true", help="one line per rule")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the bound. Raises ValueError on flags it does not know."""
    if rest:
        raise ValueError(f"{rest[0]}: unknown option; the bound holds for every scheduler's settings")
    workload = load_workload(
        args.workload, load=args.load, data=args.data, seed=args.seed, max_requests=args.max_requests
    )
    for rule in [args.rule] if args.rule else RULES:
        found = bound(workload, rule)
        print(found.to_json() if args.json else found.sentence())
    return 0
