"""A request that may not be cut is prefilled in one piece, and gets its turn."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.config import SloConfig
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
CAPACITY = 200_000


class _Server:
    """One request decodes under a tight limit; others wait."""

    def __init__(self, decoding: bool) -> None:
        self.table, self.planner, self.now = RequestTable(), Planner(SloConfig()), 10.0
        self.waiting: list[int] = []
        self.decoding = np.zeros(0, np.int64)
        if decoding:
            row = self.table.add(Slo(1.0, 0.05), 9.0, 500, 4000)
            self.decoding = np.array([row])

    def arrive(self, slo: Slo, prompt: int, cuttable: bool) -> int:
        row = self.table.add(slo, self.now, prompt, 10)
        self.table.cuttable[row] = cuttable
        self.waiting.append(row)
        return row

    def step(self, most_chunk: int = 8192) -> IterationPlan:
        table = self.table
        table.last_token_s[self.decoding] = self.now
        held = int(table.context_tokens(self.decoding).sum())
        waiting = np.array(self.waiting, np.int64)
        pool = Pool(table, self.decoding, CAPACITY, CAPACITY - held, waiting=waiting)
        plan = self.planner.plan(View(table, waiting, True, self.now, MODEL, pool, 100, most_chunk, 0.5))
        for row, tokens in plan.prefill:
            table.history_tokens[row] += tokens
            if table.history_tokens[row] >= table.prompt_tokens[row]:
                self.waiting.remove(row)
        self.now += max(plan.predicted_s, 1e-3)
        return plan


@pytest.mark.parametrize("slo", [Slo(5.0), Slo(0.9), Slo()])
def test_whole_or_nothing_and_it_gets_its_turn(slo: Slo) -> None:
    server, pieces = _Server(decoding=True), []
    row = server.arrive(slo, 4000, cuttable=False)
    for _ in range(3000):
        server.arrive(Slo(2.0), 200, cuttable=True)
        pieces += [tokens for r, tokens in server.step().prefill if r == row]
        if pieces:
            break
    assert pieces == [4000]


def test_without_decodes_it_runs_whole_at_once() -> None:
    server = _Server(decoding=False)
    row = server.arrive(Slo(), 6000, cuttable=False)
    assert server.step().prefill == [(row, 6000)]


def test_a_prompt_longer_than_sglangs_chunk_is_cut_as_sglang_would() -> None:
    server = _Server(decoding=False)
    row = server.arrive(Slo(), 6000, cuttable=False)
    assert server.step(most_chunk=2048).prefill == [(row, 2048)]


def test_others_use_the_time_that_it_cannot() -> None:
    server = _Server(decoding=True)
    big = server.arrive(Slo(60.0), 6000, cuttable=False)
    small = server.arrive(Slo(80.0), 300, cuttable=True)
    rows = [row for row, _ in server.step().prefill]
    assert big not in rows and small in rows
