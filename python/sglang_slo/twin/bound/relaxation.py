"""Solves the relaxation behind the bound: a linear program whose rows are added as they are found broken.

There is a row for every interval and mix (see `bound.py`); a solution is taken, the intervals that it breaks
most are added, and so on until none is broken. Any subset of rows gives an upper bound: fewer cost tightness.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from sglang_slo.twin.bound.least_work import MIXES, Jobs, Work, least_work

_ROUNDS = 60
_ROWS_PER_ROUND = 400
_SLACK = 1e-6  # of the solver, in units of requests


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
