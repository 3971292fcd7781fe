"""A second pool of KV, of layers that look back over a window: its bounds hold, and both pools have to admit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core import pages
from sglang_slo.core.kv.ledger import ForecastLedger, FullLedger, Need
from sglang_slo.core.kv.pool import Leavers, Pool
from sglang_slo.core.kv.relief import ReliefPlanner
from sglang_slo.core.kv.window import BothLedgers, WindowLedger, WindowPool
from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
EMPTY = np.zeros(0, np.int64)


def window_pool(
    capacity: int = 4096, free: int = 4096, window: int = 128, late: int = 128, page: int = 1
) -> WindowPool:
    return WindowPool(capacity, free, window, late, EMPTY, page)


def _written(prompt: int, output: int, window: int, late: int, page: int) -> list[tuple[int, int]]:
    """Slots of its own, and of its prompt's window in the tree, after each token, by SGLang's rule: once `late` tokens
    have left the window, all that have are given back, in whole pages.
    """
    protected = prompt // page * page
    kept = min(protected, pages.whole(window, page))
    given_back = protected - kept
    found = []
    for length in range(prompt + 1, prompt + output + 1):
        before = length - 1
        if before - window >= given_back + late:
            whole = (before - pages.whole(max(window, page), page)) // page * page
            given_back = max(given_back, protected, whole)
        found.append((pages.whole(length, page) - protected - max(given_back - protected, 0), kept))
    return found


@given(
    st.integers(1, 600),
    st.integers(1, 900),
    st.integers(1, 200),
    st.integers(1, 130),
    st.sampled_from([1, 16, 64]),
)
def test_no_request_holds_more_of_it_than_it_was_charged(
    prompt: int, output: int, window: int, late: int, page: int
) -> None:
    pool = window_pool(window=window, late=late, page=page)
    charged = pool.need_tokens(prompt, pages.growth(prompt, output, page))
    written = _written(prompt, output, window, late, page)
    assert max(own for own, _ in written) <= pool.most_output
    assert max(own + kept for own, kept in written) <= charged


@given(st.integers(1, 600), st.integers(1, 900), st.integers(0, 899), st.integers(1, 200))
def test_a_running_request_takes_no_more_than_its_growth_says(
    prompt: int, output: int, now: int, ahead: int
) -> None:
    written = [own for own, _ in _written(prompt, output, 128, 64, 16)]
    held, later = written[min(now, output - 1)], written[min(now + ahead, output - 1)]
    pool = replace(window_pool(late=64, page=16), own_tokens=np.array([held]))
    most = pages.growth(prompt + 1 + min(now, output - 1), ahead, 16)
    assert later <= held + pool.growth_tokens(np.array([most]))[0]


@given(
    st.integers(0, 1000),
    st.integers(0, 500),
    st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=9),
)
def test_what_is_admitted_fits_with_all_that_it_may_take(
    held: int, later: int, needs: list[tuple[int, bool]]
) -> None:
    soon, capacity = later // 3, 1200
    ledger = WindowLedger(capacity, held, later, soon, alone=False)
    for tokens, urgent in needs:
        need = Need(1, 1, window=tokens, overdraft=int(urgent))
        if ledger.fits(need):
            ledger.add(need)
            held += tokens
            assert held + (soon if urgent else later) <= capacity


def test_one_that_would_be_alone_enters_whatever_it_may_take() -> None:
    ledger = WindowLedger(100, 0, 0, 0, alone=True)
    assert ledger.fits(Need(1, 1, window=500))
    ledger.add(Need(1, 1, window=500))
    assert not ledger.fits(Need(1, 1, window=1))


def test_what_one_pool_refuses_is_charged_to_none() -> None:
    tokens = FullLedger(EMPTY, EMPTY, 0, 100, 0)
    both = BothLedgers(tokens, WindowLedger(100, 0, 0, 0, alone=False))
    assert not both.admits(Need(60, 10, window=101)) and tokens.peak == 0
    assert both.admits(Need(60, 10, window=50)) and both.peak == 70
    assert not both.admits(Need(60, 10, window=10))  # the tokens are short now
    assert both.admits(Need(20, 10, window=50))  # and what they refused was not charged to the window


class Situation:
    """One table, and pools of which the window's may be short. `decoding` requests hold `own` slots of it each."""

    def __init__(self, decoding: int, own: int, free: int, capacity: int, tokens: int = 100_000) -> None:
        self.table = RequestTable(32)
        rows = [self.table.add(Slo(5.0, 0.1), 0.0, 400, 1000) for _ in range(decoding)]
        for row in rows:
            self.table.last_token_s[row] = self.table.first_token_s[row] = 0.0
        held, yes = np.full(decoding, 400), np.ones(decoding, bool)
        self.pool = Pool(
            table=self.table,
            decoding=np.array(rows, np.int64),
            capacity_tokens=tokens,
            free_tokens=tokens - 400 * decoding,
            look_up_leavers=lambda: Leavers(
                yes, held, held, 0 * held, 0 * held, ~yes, ~yes, yes, np.full(decoding, own)
            ),
            window=WindowPool(capacity, free, 128, 128, np.full(decoding, own)),
        )

    def plan(self, prompt: int, ttft_s: float = 5.0) -> list[tuple[int, int]]:
        """What is prefilled of one more request."""
        row = self.table.add(Slo(ttft_s, 0.1), 0.0, prompt, 1000)
        waiting = np.array([row])
        pool = replace(self.pool, waiting=waiting)
        view = View(self.table, waiting, True, 0.0, MODEL, pool, 100, 8192, ttft_s)
        plan = Planner(SloConfig()).plan(view)
        self.victims = plan.victims
        return plan.prefill


def test_a_prompt_is_cut_to_what_the_windows_pool_has() -> None:
    ((_, tokens),) = Situation(0, 0, free=500, capacity=500).plan(2000)
    assert tokens == 500


def test_nobody_enters_while_the_windows_pool_is_short_though_tokens_are_ample() -> None:
    assert not Situation(4, 200, free=300, capacity=1100).plan(400)
    assert Situation(4, 200, free=3000, capacity=3800).plan(400)


def test_who_decodes_has_somebody_leave_when_the_windows_pool_runs_short() -> None:
    short = Situation(4, 10, free=3, capacity=43)
    relief = ReliefPlanner(SloConfig()).for_growth(short.pool, MODEL, 0.0, False)
    assert 0 < len(relief.victims) < 4
    ample = Situation(4, 10, free=400, capacity=440)
    assert not ReliefPlanner(SloConfig()).for_growth(ample.pool, MODEL, 0.0, False)


def test_who_is_past_the_window_takes_nothing_more_and_has_nobody_leave() -> None:
    at_most = window_pool().most_output
    full = Situation(4, at_most, free=0, capacity=4 * at_most)
    assert not ReliefPlanner(SloConfig()).for_growth(full.pool, MODEL, 0.0, False)


def test_those_who_left_have_left_both_pools() -> None:
    after = Situation(3, 50, free=7, capacity=157).pool.without(np.array([1]))
    assert after.window is not None
    assert after.window.free_tokens == 57 and after.window.own_tokens.tolist() == [50, 50]


def test_without_a_window_the_ledger_is_the_forecast_alone() -> None:
    pool = replace(Situation(2, 10, free=10, capacity=30).pool, window=None)
    assert isinstance(pool.ledger(), ForecastLedger)
