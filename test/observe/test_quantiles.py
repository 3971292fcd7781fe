"""Quantiles from bins are within 1 % of the true ones."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.observe.quantiles import ACCURACY, LONGEST_S, SHORTEST_S, bin_of, middle_s, quantiles_s

durations = st.one_of(st.just(0.0), st.floats(SHORTEST_S, LONGEST_S))


@given(st.lists(durations, min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_quantile_is_within_accuracy_of_nearest_rank(values: list[float], share: float) -> None:
    true = sorted(values)[max(math.ceil(share * len(values) - 1e-9), 1) - 1]
    found = quantiles_s(Counter(map(bin_of, values)), [share])[0]
    assert found is not None
    assert abs(found - true) <= true * (ACCURACY + 1e-9)


@given(st.lists(durations, min_size=1))
def test_quantiles_ascend(values: list[float]) -> None:
    found = quantiles_s(Counter(map(bin_of, values)), [0.5, 0.95, 0.99, 1.0])
    assert found == sorted(x for x in found if x is not None)


def test_nothing_has_no_quantile() -> None:
    assert quantiles_s(Counter(), [0.5, 0.99]) == [None, None]


@given(st.floats(0, allow_infinity=True, allow_nan=False))
def test_every_duration_has_one_of_boundedly_many_bins(value: float) -> None:
    if math.isfinite(value):
        assert bin_of(0.0) <= bin_of(value) <= bin_of(LONGEST_S)
    assert bin_of(LONGEST_S) - bin_of(0.0) < 1300
    assert middle_s(bin_of(0.0)) == 0.0
