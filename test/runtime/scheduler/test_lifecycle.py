"""A request's way through the books, on fakes: opened once, closed once, found when it left unseen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fakes import FakeBatch, FakeRequest, doors, troubles
from sglang_slo.runtime.kv.held import HeldPrefills
from sglang_slo.runtime.kv.look_up import PrefixLookUp
from sglang_slo.runtime.kv.prefix_pins import Pins
from sglang_slo.runtime.kv.prefixes import PrefixGroups
from sglang_slo.runtime.ports import Ports, Tick
from sglang_slo.runtime.scheduler.lifecycle import OLDEST_ARRIVAL_S, Lifecycle


class Told:
    """Reporter and predictor of lengths: keeps what it is told."""

    def __init__(self) -> None:
        self.opened_at: list[float] = []
        self.gone: list[Any] = []
        self.reported: list[Any] = []

    def opened(self, req: Any, arrival_s: float, now_s: float) -> None:
        self.opened_at.append(arrival_s)

    def ended(self, req: Any, *now: Any) -> None:
        (self.reported if now else self.gone).append(req)


def lifecycle(ports: Ports, told: Told) -> Lifecycle:
    look_up = PrefixLookUp(ports.kv, ports.requests.table)
    pins = Pins(ports.kv.tree, ports.requests.table, 100, look_up.look_up)
    life = Lifecycle(
        ports,
        look_up,
        PrefixGroups(),
        pins,
        HeldPrefills(ports.kv, ports.requests.table, ports.waiting),
        told,
        told,
    )
    life.viewer = SimpleNamespace(arrived=lambda req: None)
    return life


NOBODY: Any = SimpleNamespace(alive=list)


def test_one_that_comes_back_keeps_its_row_and_is_told_of_once() -> None:
    told, req, ports = Told(), FakeRequest(), doors()
    life = lifecycle(ports, told)
    life.open(req)
    row = req.slo_row
    life.open(req)
    assert req.slo_row == row and len(told.opened_at) == 1


def test_an_arrival_by_another_hosts_clock_counts_from_now() -> None:
    told, ports = Told(), doors()
    life = lifecycle(ports, told)
    ports.agreed.tick = Tick(2 * OLDEST_ARRIVAL_S)
    for created_s in (2 * OLDEST_ARRIVAL_S - 5, 5.0, 3 * OLDEST_ARRIVAL_S):
        req = FakeRequest()
        req.time_stats.created_time = created_s
        life.open(req)
    now = 2 * OLDEST_ARRIVAL_S
    assert told.opened_at == [now - 5, now, now]


def test_a_limit_that_cannot_be_read_is_best_effort_and_told() -> None:
    ports, req = doors(), FakeRequest(slo={"ttft_ms": "soon"})
    lifecycle(ports, Told()).open(req)
    assert req.slo_row >= 0 and ports.requests.table.deadline_s[req.slo_row] == float("inf")
    assert troubles(ports) == 1


def test_a_sweep_ends_who_is_nowhere_and_nobody_else() -> None:
    told, ports = Told(), doors()
    life = lifecycle(ports, told)
    waiting, running, split, cut, away, lost = (FakeRequest() for _ in range(6))
    for req in (waiting, running, split, cut, away, lost):
        life.open(req)
    ports.waiting.reqs, ports.waiting.cut = [waiting], cut
    ports.batches.known = [FakeBatch([running]), None]
    ports.iteration.split = FakeBatch([split])
    life.sweep(None, SimpleNamespace(alive=lambda: [away]))
    assert told.gone == told.reported == [lost] and lost.slo_row == -1
    assert len(ports.requests.reqs) == 5
    life.sweep(None, NOBODY)
    assert told.gone.count(lost) == 1
