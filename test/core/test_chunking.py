"""Allowances, who sits out, and the form of an iteration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.chunking import DecodeLoad, allowances_s, choose_decodes, iteration_budget
from sglang_slo.core.latency import Coefficients, LatencyModel, decode_shape

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))


def test_allowance_counts_from_the_end_of_the_iteration_in_flight() -> None:
    got = allowances_s(np.array([10.0]), np.array([0.05]), ready_s=10.01, margin=0.1)
    np.testing.assert_allclose(got, [0.035])


def test_everyone_decodes_when_all_fit() -> None:
    choice = choose_decodes(np.array([0.02, 0.5]), np.array([1000, 1000]), MODEL, True)
    assert choice.positions is None
    assert choice.requests == 2


def test_a_tight_decode_lives_beside_a_hundred_long_ones() -> None:
    allowance = np.array([0.5] * 100 + [0.025])
    contexts = np.array([30_000] * 100 + [500])
    assert MODEL.iteration_s(decode_shape(101, int(contexts.sum()))) > 0.025
    choice = choose_decodes(allowance, contexts, MODEL, True)
    assert choice.positions is not None and choice.positions[0] == 100
    assert 1 < choice.requests < 101
    assert MODEL.iteration_s(choice.shape) <= 0.025


@given(st.integers(2, 60), st.floats(0.02, 0.1), st.integers(1000, 40_000))
def test_whoever_sits_out_comes_first_before_its_own_limit(n: int, limit: float, context: int) -> None:
    """Run the rule: the waits of loose requests stay within their limit plus one iteration, while that is possible."""
    tbt = np.array([limit] + [0.5] * n)
    contexts = np.array([500] + [context] * n)
    cost = MODEL.coefficients.c_kv * context * n / 0.5 + 5e-3 / limit
    if cost > 0.8:  # beyond what any order could keep
        return
    last, now, worst = np.zeros(n + 1), 0.0, np.zeros(n + 1)
    for _ in range(200):
        allowance = allowances_s(last, tbt, now, 0.05)
        choice = choose_decodes(allowance, contexts, MODEL, True)
        took = MODEL.iteration_s(choice.shape)
        now += took
        who = np.arange(n + 1) if choice.positions is None else choice.positions
        worst[who] = np.maximum(worst[who], now - last[who])
        last[who] = now
    assert (worst <= tbt + 0.01).all()


@given(st.integers(2, 8), st.floats(0.016, 0.03), st.integers(0, 2**32))
def test_where_a_turn_costs_as_much_as_everyone_nobody_takes_turns(n: int, limit: float, seed: int) -> None:
    """Limits near what a decode of one takes: one by one they would all be late, together all are in time."""
    fixed = LatencyModel(Coefficients(6e-3, 12e-3, 27e-6, 1.3e-9, 0.0, 0.0, 4e-4))
    tbt, now, worst = np.full(n, limit), 0.0, np.zeros(n)
    last = -np.random.default_rng(seed).uniform(0.0, limit, n)  # some are late already
    for k in range(100):
        choice = choose_decodes(allowances_s(last, tbt, now, 0.0), np.full(n, 100), fixed, True)
        now += fixed.iteration_s(choice.shape)
        who = np.arange(n) if choice.positions is None else choice.positions
        worst[who] = np.maximum(worst[who], now - last[who]) if k else 0.0
        last[who] = now
    assert (worst <= limit).all()


@given(st.lists(st.tuples(st.floats(-0.05, 0.5), st.integers(100, 40_000)), min_size=1, max_size=40))
def test_whoever_sits_out_is_served_in_time_in_turns(rows: list[tuple[float, int]]) -> None:
    allowance, contexts = np.array([a for a, _ in rows]), np.array([c for _, c in rows])
    choice = choose_decodes(allowance, contexts, MODEL, True)
    if choice.positions is None:
        return
    turn_s = MODEL.iteration_s(choice.shape)
    rest = np.sort(np.delete(allowance, choice.positions))
    for place, left_s in enumerate(rest):
        assert left_s >= (2 + place // choice.requests) * turn_s


def test_what_a_request_costs_whatever_its_length_counts_for_admission() -> None:
    """U = (t0 + w) / L + sum (c_req + c_kv context) / l_i: 5 ms in 50, and 1 ms in 50 for each request."""
    per_request = LatencyModel(replace(MODEL.coefficients, c_req=1e-3, c_kv=0.0))
    load = DecodeLoad(np.full(10, 0.05), np.full(10, 1000), per_request, most=0.325)
    assert load.utilisation() == pytest.approx(0.1 + 10 * 0.02)
    assert load.admits(0.05, 1000)
    load.add(0.05, 1000)
    assert not load.admits(0.05, 1000)


def test_nobody_decoding_is_bounded_by_the_cap() -> None:
    budget = iteration_budget(None, MODEL, 0.2, "auto", 10_000)
    assert not budget.mixed
    assert MODEL.iteration_s(budget.base.with_chunk(0, budget.tokens(MODEL))) <= 0.2


@given(st.integers(1, 64), st.integers(100, 20_000), st.floats(0.012, 0.2), st.integers(1, 20_000))
def test_neither_form_lets_the_decodes_pass_their_allowance(
    n: int, context: int, allowance: float, backlog: int
) -> None:
    choice = choose_decodes(np.full(n, allowance), np.full(n, context), MODEL, False)
    budget = iteration_budget(choice, MODEL, 1.0, "auto", backlog)
    chunk = min(budget.tokens(MODEL), backlog)
    if chunk == 0:
        return
    took = MODEL.iteration_s(budget.base.with_chunk(0, chunk))
    if not budget.mixed:
        took += MODEL.iteration_s(choice.shape)
    assert took <= allowance + 1e-9


def test_mixing_is_chosen_where_it_lets_more_through() -> None:
    choice = choose_decodes(np.full(8, 0.03), np.full(8, 1000), MODEL, True)
    assert iteration_budget(choice, MODEL, 1.0, "auto", 10_000).mixed
    slow_mix = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 0.0, 33e-9))
    many = choose_decodes(np.full(400, 0.06), np.full(400, 10), slow_mix, True)
    forms = {m: iteration_budget(many, slow_mix, 1.0, m, 10_000) for m in ("always", "never")}
    most = max(f.tokens(slow_mix) for f in forms.values())
    assert iteration_budget(many, slow_mix, 1.0, "auto", 10_000).tokens(slow_mix) == most
