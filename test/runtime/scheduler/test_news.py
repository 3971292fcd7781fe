"""Ticks on fakes: made whatever raises, found wherever they are, taken by every rank alike."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fakes import MODEL, FakeRequest, doors, troubles
from sglang_slo.core.slo import BEST_EFFORT
from sglang_slo.runtime.kv.swap_cost import SwapCost
from sglang_slo.runtime.ports import Ports, Tick
from sglang_slo.runtime.scheduler.news import News, in_one, without_ticks


class Fit:
    """Keeps the launches it is given; `refit` is its next model."""

    def __init__(self, refit: Any = None) -> None:
        self.refit, self.launches = refit, []

    def maybe_refit(self) -> Any:
        return self.refit

    def add(self, launch: Any) -> None:
        self.launches.append(launch)


def news(ports: Ports, fit: Fit, lengths: Any = None) -> News:
    preempt = SimpleNamespace(line=None, cost=SwapCost(None))
    return News(ports, fit, preempt, lambda: lengths)


def test_a_tick_is_found_wherever_it_is_and_taken_out() -> None:
    tick, other = Tick(1.0), object()
    for received in ([other, tick], [tick, other]):
        assert in_one(received) is tick and without_ticks(received) == [other]
    assert in_one([other]) is None and without_ticks([other]) == [other] and in_one([]) is None


def test_lengths_that_raise_cost_their_news_and_nothing_else() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    ports, lengths = doors(), SimpleNamespace(predict=broken, gate=SimpleNamespace(trusted=True))
    of = news(ports, Fit(MODEL), lengths)
    of.ended.append((7, 3.0))
    tick = of.make([object()])
    assert tick.ended == [(7, 3.0)] and tick.model is MODEL and not tick.log_quantiles
    assert troubles(ports) == 1 and not of.ended


def test_a_tick_is_made_even_if_all_else_raises() -> None:
    ports = doors()
    of = news(ports, SimpleNamespace(maybe_refit=None))
    assert of.make([]).now_s > 0 and troubles(ports) == 1


def test_what_is_taken_is_what_all_plan_with() -> None:
    ports, fit, req = doors(), Fit(), FakeRequest()
    ports.requests.open(req, BEST_EFFORT, 1.0, MODEL)
    model = replace(MODEL, name="newer")
    tick = Tick(5.0, model=model, log_quantiles={req.rid: [1.0] * 9}, revised=True)
    news(ports, fit).take(tick)
    assert ports.agreed.now_s == 5.0 and ports.agreed.model is model
