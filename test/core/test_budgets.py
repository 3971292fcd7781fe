"""An iteration's time with those in it who cannot be kept: nobody else may be held up by a promise that is past saving."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_slo.config import SloConfig
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.kv.pool import Leavers, Pool
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
NOW = 100.0


def _beside(slo: Slo, lost: bool = False, first_s: float = NOW, tokens: int = 2) -> View:
    """One that decodes with such a promise, its last token just out, and a prompt of 4,000 tokens that waits."""
    table = RequestTable(4)
    row = table.add(slo, 0.0, 100, 8192)
    table.first_token_s[row], table.last_token_s[row] = first_s, NOW
    table.output_tokens[row] = table.out_tokens[row] = tokens
    table.lost[row] = lost
    waiting = np.array([table.add(Slo(2.0, 0.1), NOW, 4000, 100)])
    running = np.array([row])
    one = np.ones(1, bool)
    held = table.held_tokens(running)
    pool = Pool(
        table=table,
        decoding=running,
        capacity_tokens=200_000,
        free_tokens=199_000,
        waiting=waiting,
        look_up_leavers=lambda: Leavers(one, held, held, held * 0, held * 0, ~one, ~one, one),
    )
    return View(table, waiting, True, NOW, MODEL, pool, 100, 8192, 2.0)


def _plan(view: View) -> IterationPlan:
    """Where nobody has waited for prefill so far."""
    planner = Planner(SloConfig())
    planner.plan(replace(view, waiting=np.zeros(0, np.int64)))
    return planner.plan(view)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(
            _beside(Slo(tbt_s=0.1, gap_rule=GapRule.PACE), lost=True, first_s=NOW - 90, tokens=200), id="pace"
        ),
        pytest.param(_beside(Slo(tpot_s=0.1), first_s=NOW - 90, tokens=200), id="mean"),
        pytest.param(_beside(Slo(e2e_s=NOW - 1)), id="an end that is past"),
        pytest.param(_beside(Slo(e2e_s=NOW + 5)), id="an end that its expected length does not allow"),
    ],
)
def test_a_prompt_is_prefilled_beside_one_that_cannot_be_kept(view: View) -> None:
    plan = _plan(view)
    assert plan.prefill and plan.prefill[0][1] >= 256


def test_one_that_can_be_kept_is_waited_for() -> None:
    # 300 tokens in 3 s
    view = _beside(Slo(e2e_s=NOW + 3.0))
    view.table.expected_tokens[view.decoding] = 300
    assert _plan(view).budget_s <= 0.01
