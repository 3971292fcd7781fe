"""A decode that gives a burst: the KV it is given, and when its request's next delivery is due."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.latency import decode_shape
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.steps import BurstLength, DecodeStep
from sglang_slo.core.table import RequestTable

STEP = DecodeStep(verified_tokens=4, reserve_tokens=8)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.sampled_from([1, 16, 64]))
def test_growth_covers_what_bursts_of_any_length_take(bursts: list[int], page: int) -> None:
    """SGLang's allocation, step by step (`page_aligned_decode_alloc_lens`), whatever comes out of each."""
    computed, slots = 100, -(-100 // page) * page
    foreseen = STEP.growth_tokens(
        np.array([slots]), np.array([computed]), np.array([10**6]), len(bursts), 4.0, page
    )
    taken = 0
    for burst in bursts:
        wanted = max(slots, -(-(computed + STEP.reserve_tokens) // page) * page)
        taken, slots = taken + wanted - slots, wanted
        computed += burst
    assert taken <= foreseen[0]
    if set(bursts) == {4} or len(bursts) == 1:
        assert taken == foreseen[0]


def test_slots_that_are_there_are_not_taken_again() -> None:
    more = STEP.growth_tokens(np.array([108, 106, 100]), np.array([100, 100, 100]), np.array([9, 9, 9]), 1)
    assert more.tolist() == [0, 2, 8]


def test_a_request_holds_its_context_and_room_for_two_steps() -> None:
    table = RequestTable(4, step=STEP)
    row = table.add(Slo(), 0.0, 100, 50)
    table.output_tokens[row] = 3
    assert table.held_tokens(np.array([row])) == [100 + 3 - 1 + 8]
    assert RequestTable(4).step.spare_tokens == 0


def test_a_decode_computes_its_verified_tokens_alone_and_one_beside_prefill() -> None:
    assert decode_shape(10, 500, verified=4).new_tokens == 40
    assert decode_shape(10, 500, beside_prefill=True, verified=4).new_tokens == 10


def test_the_average_burst_follows_what_came_lately() -> None:
    bursts = BurstLength()
    assert bursts.seen(0, 0) == 1.0
    assert bursts.seen(30, 10) == 3.0
    for _ in range(500):
        lately = bursts.seen(10, 10)
    assert lately == pytest.approx(1.0, abs=0.02)


def test_what_is_left_until_the_end_is_spread_over_deliveries_not_tokens() -> None:
    table = RequestTable(4, step=STEP)
    row = table.add(Slo(e2e_s=10.0), 0.0, 100, 1000)
    table.last_token_s[row], table.expected_tokens[row] = 2.0, 80.0
    rows = np.array([row])
    assert table.due_s(rows) == pytest.approx([2.0 + 8.0 / 80])
    table.tokens_per_step = 2.5
    assert table.due_s(rows) == pytest.approx([2.0 + 8.0 / 32])


def test_a_gap_limit_holds_between_bursts_and_a_pace_between_tokens() -> None:
    table = RequestTable(4, step=STEP)
    every, paced = (
        table.add(Slo(tbt_s=0.1, gap_rule=rule), 0.0, 100, 1000) for rule in (GapRule.EVERY, GapRule.PACE)
    )
    rows = np.array([every, paced])
    table.first_token_s[rows], table.last_token_s[rows], table.out_tokens[rows] = 1.0, 1.2, 9
    assert table.due_s(rows) == pytest.approx([1.3, 1.9])
