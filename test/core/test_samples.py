"""The window of samples: bounded, and rare shapes outlast frequent ones."""

from __future__ import annotations

from core.shapes import timed, traffic
from sglang_slo.core import samples
from sglang_slo.core.latency import BatchShape, decode_shape
from sglang_slo.core.samples import SampleWindow

PREFILL = BatchShape(True, 4096, 4096 * 2048.0, 4096)


def test_the_window_is_bounded_whatever_comes() -> None:
    window = SampleWindow()
    for i in range(3000):
        window.add(BatchShape(i % 2 > 0, 1 << i % 13, float(1 << i % 23), 1 << i % 17), 0.01)
        assert len(window) <= samples.CAPACITY
    assert len(window.diverse()) == len(window)
    for shape, seconds in timed(traffic(samples.RECENT + 50)):
        window.add(shape, seconds)
    assert len(window.recent()) == samples.RECENT


def test_a_rare_prefill_outlasts_thousands_of_decodes() -> None:
    window = SampleWindow()
    window.add(PREFILL, 0.12)
    for _ in range(10_000):
        window.add(decode_shape(30, 40_000), 0.006)
    assert 0.12 in window.diverse().seconds
    assert 0.12 not in window.recent().seconds


def test_of_one_shape_the_latest_are_kept() -> None:
    window = SampleWindow()
    for i in range(100):
        window.add(PREFILL, float(i))
    assert window.diverse().seconds.tolist() == [float(i) for i in range(100 - samples.PER_BIN, 100)]


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    window = SampleWindow()
    window.add(PREFILL, 0.12)
    for _ in range(samples.OLDEST + 1):
        window.add(decode_shape(30, 40_000), 0.006)
    assert 0.12 not in window.diverse().seconds


def test_a_sample_of_little_weight_is_fitted_to_but_not_judged_by() -> None:
    window = SampleWindow()
    window.add(PREFILL, 0.12, weight=0.1)
    window.add(PREFILL, 0.13)
    assert window.diverse().weight.tolist() == [0.1, 1.0]
    assert window.recent().seconds.tolist() == [0.13]
