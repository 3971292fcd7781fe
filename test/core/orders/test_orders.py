"""Every order policy loses nobody; the example of CONTRIBUTING.md is a policy like any other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core.orders import ORDERS
from sglang_slo.core.orders.queue import Queue
from sglang_slo.settings_in import accepted

TIMES = st.floats(0.0, 100.0) | st.just(np.inf)


def queue(deadlines: list[float], expected: list[float], works: list[float] | None = None) -> Queue:
    n = len(deadlines)
    return Queue(
        rows=np.arange(10, 10 + n),
        deadline_s=np.array(deadlines, float),
        work_s=np.ones(n) if works is None else np.array(works, float),
        seq=np.arange(n),
        importance=np.zeros(n, np.int64),
        expected_tokens=np.array(expected, float),
        start_s=0.0,
    )


@pytest.mark.parametrize("name", ORDERS)
@given(st.lists(st.tuples(TIMES, st.floats(0.0, 1e4), st.floats(0.0, 20.0)), max_size=30))
def test_each_waiting_request_is_in_exactly_one_line(
    name: str, jobs: list[tuple[float, float, float]]
) -> None:
    waiting = queue([d for d, _, _ in jobs], [n for _, n, _ in jobs], [w for _, _, w in jobs])
    ranking = ORDERS[name](waiting)
    assert sorted([*ranking.feasible, *ranking.infeasible]) == sorted(waiting.rows)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "stock"])
def test_who_has_no_deadline_keeps_the_guaranteed_share(name: str) -> None:
    ranking = ORDERS[name](queue([np.inf, 5.0, np.inf], [1.0, 1.0, 1.0]))
    assert ranking.feasible.tolist() == [11] and ranking.infeasible.tolist() == [10, 12]


def test_shortest_goes_by_predicted_output_and_then_by_arrival() -> None:
    ranking = ORDERS["shortest"](queue([50.0, 60.0, 70.0, 0.5], [300.0, 20.0, 300.0, 1.0]))
    assert ranking.feasible.tolist() == [11, 10, 12] and ranking.infeasible.tolist() == [13]


def test_every_policy_is_a_value_of_the_flag() -> None:
    (order,) = [f for f in SloConfig.__dataclass_fields__.values() if f.name == "order"]
    assert set(ORDERS) == set(order.metadata["choices"]) and set(ORDERS) < set(accepted(order) or ())
