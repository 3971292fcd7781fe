"""Without a model, classes and callers are told apart, and both lists stay short."""

from __future__ import annotations

import math

import numpy as np

from sglang_slo.estimator.fallback import MAX_CALLERS, MAX_CLASSES, MIN_COUNT, History


def test_a_class_is_known_once_enough_of_it_finished():
    history = History()
    for i in range(MIN_COUNT):
        assert history.class_quantiles("chat") is None
        history.add("chat", "", 100 + i)
    own = history.class_quantiles("chat")
    assert own is not None and math.log(100) <= own[0] <= own[-1] <= math.log(120)
    assert history.class_quantiles("code") is None
    assert history.global_quantiles() is not None


def test_a_callers_recent_lengths_are_followed():
    history = History()
    for n in [10] * 30 + [1000] * 30:
        history.add("chat", "app", n)
    mean, last, count = history.columns("chat", "app")[:3]
    assert mean > math.log(900) and last == math.log(1000) and count == math.log1p(60)
    assert all(math.isnan(v) for v in history.columns("chat", "other")[:3])


def test_classes_and_callers_are_bounded_and_everybody_is_never_forgotten():
    history = History()
    for i in range(MAX_CALLERS + 50):
        history.add(f"class {i}", f"caller {i}", 5)
    assert len(history._callers) == MAX_CALLERS
    assert len(history._classes) == MAX_CLASSES
    assert history.global_quantiles() is not None


def test_the_mean_is_of_tokens_not_of_logs():
    history = History()
    for n in [10, 1000] * MIN_COUNT:
        history.add("chat", "", n)
    assert np.isclose(history.mean_log_tokens() or 0, math.log(505))
