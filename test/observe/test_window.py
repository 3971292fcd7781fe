"""Sliding windows forget exactly what is too old, count what is not, and stay small."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from observed import make_record
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import judge
from sglang_slo.observe.window import ALL_CLASSES, MAX_CLASSES, OTHER_CLASSES, SlidingWindow, Tally, Windows

CHAT = Slo(0.5, 0.05, "chat")


def tally_of(ttft_s: float, slo: Slo = CHAT, **fields: object) -> Tally:
    tally = Tally()
    record = make_record(ttft_s, (0.01,), slo, **fields)
    tally.take(record, judge(record))
    return tally


events = st.lists(st.tuples(st.floats(0, 30), st.sampled_from("ab"), st.floats(0.01, 2)), max_size=60)


@settings(deadline=None)
@given(events, st.floats(0, 100))
def test_window_equals_a_recount_of_its_slots(steps: list[tuple[float, str, float]], wait_s: float) -> None:
    window, now_s, seen = SlidingWindow(20, 2, 0.0), 0.0, []
    for step_s, name, ttft_s in steps:
        now_s += step_s
        window.add(name, tally_of(ttft_s), now_s)
        seen.append((now_s, name, ttft_s))
    now_s += wait_s
    report = window.report(now_s)
    for name in "ab":
        kept = [t for s, n, t in seen if n == name and int(s // 2) > int(now_s // 2) - 10]
        assert (name in report) == bool(kept)
        if kept:
            assert report[name]["finished"] == len(kept)
            assert report[name]["attained"] == sum(t <= 0.5 for t in kept)
            assert report[name]["attainment"] == sum(t <= 0.5 for t in kept) / len(kept)
    assert report[ALL_CLASSES]["finished"] == sum(report[n]["finished"] for n in "ab" if n in report)


def test_goodput_counts_attained_requests_and_their_tokens_only() -> None:
    window = SlidingWindow(60, 1, 0.0)
    window.add("chat", tally_of(0.1, output_tokens=30), 9.5)
    window.add("chat", tally_of(2.0, output_tokens=500), 10.0)
    figures = window.report(10.0)["chat"]
    assert figures["goodput_rps"] == 1 / 10
    assert figures["goodput_tokens_per_s"] == 3.0
    assert figures["throughput_tokens_per_s"] == 53.0
    assert {k: v for k, v in figures["misses"].items() if v} == {"ttft": 1}


def test_best_effort_neither_helps_nor_hurts_attainment() -> None:
    window = SlidingWindow(60, 1, 0.0)
    window.add("batch", tally_of(50.0, Slo()), 1.0)
    assert window.report(1.0)["batch"]["attainment"] is None
    window.add("chat", tally_of(2.0), 1.0)
    figures = window.report(1.0)[ALL_CLASSES]
    assert (figures["attainment"], figures["judged"], figures["finished"]) == (0.0, 1, 2)


def test_a_clock_that_steps_back_loses_nothing() -> None:
    window = SlidingWindow(60, 1, 0.0)
    window.add("chat", tally_of(0.1), 10.0)
    window.add("chat", tally_of(0.1), 3.0)
    assert window.report(2.0)["chat"]["finished"] == 2


def test_memory_does_not_grow_with_traffic() -> None:
    window = SlidingWindow(60, 1, 0.0)
    for i in range(5000):
        window.add("chat", tally_of(0.001 * (i % 100 + 1)), i / 10)
    assert len(window._slots) <= 61
    window.report(1e6)
    assert not window._slots and not window._total


def test_classes_beyond_the_cap_are_pooled() -> None:
    windows = Windows(0.0)
    for i in range(MAX_CLASSES + 5):
        windows.arrived(Slo(slo_class=f"c{i}"), 0.0)
    report = windows.report(0.0)["1m"]
    assert len(report) == MAX_CLASSES + 2
    assert report[OTHER_CLASSES]["arrived"] == 5
    assert report[ALL_CLASSES]["arrived"] == MAX_CLASSES + 5


def test_percentiles_are_in_milliseconds() -> None:
    windows = Windows(0.0)
    record = make_record(0.2, (0.02, 0.04), CHAT)
    windows.finished(record, judge(record), 1.0)
    figures = windows.report(1.0)["5m"]["chat"]
    for name, true in (("ttft_ms", 200), ("tbt_p99_ms", 40), ("tpot_ms", 30)):
        assert all(abs(v - true) <= 0.011 * true for v in figures[name].values()), name
