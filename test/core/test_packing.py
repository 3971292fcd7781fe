"""Fit fills both resources; nothing moves where KV is not short."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.core.packing import pack

requests = st.lists(st.tuples(st.floats(0.1, 20), st.integers(1, 4000), st.integers(1, 9000)), max_size=40)


def _pack(pairs: list[tuple[float, int, int]], tokens_left: int, kv_left: int) -> list[int]:
    slack = np.array(sorted(p[0] for p in pairs))
    tokens, kv = np.array([p[1] for p in pairs], int), np.array([p[1] + p[2] for p in pairs], int)
    return pack(np.arange(len(pairs)), slack, tokens, kv, tokens_left, kv_left, 0.05).tolist()


@given(requests, st.integers(0, 9000), st.integers(0, 50_000))
def test_packing_only_changes_the_order(
    pairs: list[tuple[float, int, int]], tokens_left: int, kv_left: int
) -> None:
    assert sorted(_pack(pairs, tokens_left, kv_left)) == list(range(len(pairs)))


@given(requests)
def test_order_by_deadline_stands_where_kv_is_not_short(pairs: list[tuple[float, int, int]]) -> None:
    assert _pack(pairs, 4000, 10**9) == list(range(len(pairs)))


def test_a_long_answer_is_paired_with_a_long_prompt() -> None:
    # (slack, prompt, answer): in order, two long answers would fill the pool and leave the compute idle
    pairs = [(10.0, 10, 5000), (10.1, 10, 5000), (10.2, 3000, 10)]
    order = _pack(pairs, 4000, 8500)
    assert set(order[:2]) == {0, 2} or set(order[:2]) == {1, 2}


def test_who_has_little_slack_left_keeps_its_place() -> None:
    pairs = [(0.1, 10, 5000), (10.1, 10, 5000), (10.2, 3000, 10)]
    assert _pack(pairs, 4000, 6000)[0] == 0
