"""A quiet hour says nothing of how fast the line of the infeasible moves."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_slo.core.ordering import FairShareQueue

AHEAD = np.array([20_000])


def _busy(line: FairShareQueue, start_s: float, iterations: int = 200) -> None:
    for i in range(iterations):
        line.account(start_s + 0.1 * i, 400, 8000)


@pytest.mark.parametrize("quiet_s", [60.0, 3600.0])
@pytest.mark.parametrize("rests", [True, False])
def test_the_expected_wait_is_the_same_after_a_quiet_time(quiet_s: float, rests: bool) -> None:
    line = FairShareQueue(0.05)
    _busy(line, 0.0)
    before = float(line.wait_s(AHEAD)[0])
    if rests:  # a planning that found nobody waiting; without one, the server did not plan at all
        line.rest(0.1)
    _busy(line, 20.0 + quiet_s, 3)
    assert float(line.wait_s(AHEAD)[0]) == pytest.approx(before, rel=0.3)


def test_time_in_which_somebody_waits_counts() -> None:
    line = FairShareQueue(0.05)
    _busy(line, 0.0)
    before = float(line.wait_s(AHEAD)[0])
    for i in range(100):  # decodes leave no time for prefill
        line.account(20.0 + 0.1 * i, 0, 0)
    assert float(line.wait_s(AHEAD)[0]) > 1.5 * before
