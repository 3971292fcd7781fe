"""Load is told from what is finished while others wait; a tight limit is forgotten when it does not come again."""

from __future__ import annotations

import math

import pytest

from sglang_slo.core.load import LIMIT_MEMORY_S, LoadMeter, RecentLimits


def _meter(every_s: float, finishes_after_s: float, waiting: int) -> LoadMeter:
    meter = LoadMeter()
    now, done = 0.0, 0
    for i in range(200):
        now = i * every_s
        finished = int((now - finishes_after_s) // every_s) + 1 if now >= finishes_after_s else 0
        meter.count(now, 1, finished - done, waiting)
        done = finished
    return meter


@pytest.mark.parametrize("every_s", [0.5, 2.0, 7.0, 40.0])
def test_a_server_on_which_nobody_waits_is_not_loaded_however_few_requests_come(every_s: float) -> None:
    assert _meter(every_s, 3.0, waiting=0).load(0) == 0.0


def test_arrivals_over_what_is_finished_while_others_wait() -> None:
    assert _meter(0.5, 3.0, waiting=5).load(5) == pytest.approx(1.0, abs=0.05)
    meter = LoadMeter()
    for i in range(600):
        meter.count(i * 0.1, 2, 1, waiting=i)
    assert meter.load(600) == pytest.approx(2.0, rel=0.05)
    assert meter.load(0) == 1.0


def test_nothing_is_known_before_anything_has_finished() -> None:
    meter = LoadMeter()
    meter.count(0.0, 3, 0, 3)
    assert math.isnan(meter.load(3))


def test_a_tight_limit_counts_for_as_long_as_it_is_recent() -> None:
    limits = RecentLimits()
    assert limits.tightest_s(0.0) == math.inf
    limits.arrived(0.0, 0.05)
    limits.arrived(30.0, 2.0)
    assert limits.tightest_s(LIMIT_MEMORY_S) == 0.05
    assert limits.tightest_s(LIMIT_MEMORY_S + 1) == 2.0
    assert limits.tightest_s(LIMIT_MEMORY_S + 31) == math.inf
