"""What counts as a kept promise, and whose fault a broken one is."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observed import make_record
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.observe.judge import answer, judge

CHAT = Slo(0.5, 0.05, "chat")


def test_all_limits_kept_is_attained() -> None:
    verdict = judge(make_record(0.4, (0.01, 0.05), CHAT))
    assert (verdict.attained, verdict.reasons, verdict.counted) == (True, (), True)
    assert verdict.ttft_used == pytest.approx(0.8)
    assert verdict.gap_used == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ttft_s", "gap_s", "reasons"),
    [(0.6, 0.01, ("ttft",)), (0.4, 0.06, ("gap",)), (0.6, 0.06, ("ttft", "gap"))],
)
def test_verdict_names_every_limit_that_was_missed(
    ttft_s: float, gap_s: float, reasons: tuple[str, ...]
) -> None:
    verdict = judge(make_record(ttft_s, (gap_s,), CHAT))
    assert (verdict.attained, verdict.reasons) == (False, reasons)


def test_one_slow_gap_in_a_hundred_is_forgiven_only_where_that_was_asked_for() -> None:
    gaps = (0.01,) * 99 + (0.4,)
    asked = Slo(0.5, 0.05, "chat", gap_rule=GapRule.P99, max_pause_s=0.5)
    assert judge(make_record(0.1, gaps, asked)).attained
    assert judge(make_record(0.1, (0.01,) * 99 + (9.0,), asked)).reasons == ("pause",)
    verdict = judge(make_record(0.1, gaps, CHAT))
    assert verdict.reasons == ("gap",) and verdict.by_rule["p99"]


def test_best_effort_always_attains_and_was_promised_nothing() -> None:
    verdict = judge(make_record(1e6, (1e6,)))
    assert verdict.attained and not verdict.promised


def test_single_token_has_no_gap_to_miss() -> None:
    assert judge(make_record(0.1, (), CHAT)).attained


def test_client_that_leaves_in_time_is_not_held_against_the_server() -> None:
    verdict = judge(make_record(None, (), CHAT, finish="abort", finished_s=100.4))
    assert (verdict.attained, verdict.counted, verdict.reasons) == (False, False, ())


def test_client_that_leaves_after_its_limit_passed_is_a_miss() -> None:
    verdict = judge(make_record(None, (), CHAT, finish="abort", finished_s=100.6))
    assert (verdict.attained, verdict.counted, verdict.reasons) == (False, True, ("ttft",))


def test_client_that_leaves_a_stream_that_stood_still_is_a_miss_and_one_in_time_is_not() -> None:
    for waited_s, reasons in ((0.04, ()), (0.06, ("gap",))):
        record = make_record(0.1, (0.01,), CHAT, finish="abort", finished_s=100.11 + waited_s)
        verdict = judge(record)
        assert (verdict.counted, verdict.reasons) == (bool(reasons), reasons)


@pytest.mark.parametrize("finish", ["shed", "error"])
def test_what_the_server_gave_up_is_a_miss_however_early(finish: str) -> None:
    verdict = judge(make_record(None, (), CHAT, finish=finish, finished_s=100.0))
    assert (verdict.attained, verdict.counted, verdict.reasons) == (False, True, (finish,))


def test_invalid_request_counts_nowhere() -> None:
    verdict = judge(make_record(None, (), CHAT, finish="rejected", finished_s=900.0))
    assert (verdict.attained, verdict.counted) == (False, False)


times = st.floats(0, 1e4, allow_nan=False)
limits = st.one_of(st.just(math.inf), st.floats(1e-3, 1e4))


@given(times, st.lists(times, max_size=150), limits, limits, st.sampled_from(["stop", "length", "abort"]))
def test_attained_exactly_when_nothing_was_missed(
    ttft_s: float, gaps_s: list[float], ttft_limit_s: float, tbt_limit_s: float, finish: str
) -> None:
    record = make_record(ttft_s, tuple(gaps_s), Slo(ttft_limit_s, tbt_limit_s), finish=finish)
    verdict = judge(record)
    assert verdict.attained == (finish != "abort" and not verdict.reasons)
    assert verdict.attained == verdict.by_rule["every"]
    assert not verdict.attained or max(verdict.ttft_used, verdict.gap_used) <= 1 + 1e-6
    json.dumps(answer(record, verdict), allow_nan=False)


def test_answer_tells_the_client_in_milliseconds_and_null_for_no_limit() -> None:
    record = make_record(0.25, (0.02, 0.03), Slo(0.5, math.inf, "chat"))
    told = answer(record, judge(record))
    assert told == {
        "class": "chat",
        "attained": True,
        "missed": [],
        "rule": "every",
        "attained_by_rule": {"every": True, "paced": True, "p99": True, "mean": True},
        "ttft_ms": 250.0,
        "longest_pause_ms": 30.0,
        "tbt_p99_ms": 30.0,
        "tpot_ms": 25.0,
        "pace_lag_ms": 0.0,
        "e2e_ms": 300.0,
        "ttft_limit_ms": 500.0,
        "tbt_limit_ms": None,
        "max_pause_limit_ms": None,
        "tpot_limit_ms": None,
        "e2e_limit_ms": None,
        "unattainable": False,
    }
