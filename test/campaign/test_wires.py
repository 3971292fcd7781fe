"""Wires find every function that is called, raise where they are told to, and leave the harness alone."""

from __future__ import annotations

import pytest

import sglang_slo.runtime.scheduler.scheduler  # noqa: F401
from campaign.wires import InjectedError, Wires
from sglang_slo.config import SloConfig
from sglang_slo.core.kv import preemption
from sglang_slo.observe.observer import Observer
from sglang_slo.twin.sim import driver


def as_the_scheduler() -> dict[str, object]:
    """A namespace whose functions the wires take for the scheduler's own."""
    space: dict[str, object] = {"__name__": "sglang_slo.runtime.scheduler.scheduler"}
    exec("def call(f, *a, **k): return f(*a, **k)", space)
    return space


def test_a_wire_raises_once_or_always_for_the_scheduler_and_never_for_the_harness() -> None:
    wires, call = Wires(), as_the_scheduler()["call"]
    name = "core.kv.preemption.lead_iterations"
    args = (0.05, 0.02)
    expected = preemption.lead_iterations(*args)
    with wires.strung():
        wires.arm(name, once=True, after=False)
        with pytest.raises(InjectedError):
            call(preemption.lead_iterations, *args)  # type: ignore[operator]
        assert call(preemption.lead_iterations, *args) == expected  # type: ignore[operator]
        wires.arm(name, once=False, after=True)
        for _ in range(2):
            with pytest.raises(InjectedError):
                call(preemption.lead_iterations, *args)  # type: ignore[operator]
        assert preemption.lead_iterations(*args) == expected  # called by a test
    assert not hasattr(preemption.lead_iterations, "__wrapped__")


def test_an_exception_is_raised_inside_a_decorator_that_catches() -> None:
    wires, call = Wires(), as_the_scheduler()["call"]
    observer = Observer(SloConfig())
    with wires.strung():
        wires.arm("observe.observer.Observer.arrived", once=True, after=False)
        call(observer.arrived, None, 0.0)  # type: ignore[operator]
        assert wires.fired == 1
    assert observer.trouble.count == 1


def test_the_twin_has_no_wires() -> None:
    with Wires().strung():
        assert not hasattr(driver.run, "__wrapped__")
        assert hasattr(preemption.lead_iterations, "__wrapped__")
