"""One iteration on fakes: what is planned is done, and what raises leaves the iteration to stock scheduling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fakes import FakeBatch, FakeRequest, doors
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.plan import Planner
from sglang_slo.runtime.kv.held import HeldPrefills
from sglang_slo.runtime.kv.look_up import PrefixLookUp
from sglang_slo.runtime.kv.preempt import Preemptor
from sglang_slo.runtime.kv.prefix_pins import Pins
from sglang_slo.runtime.kv.prefixes import PrefixGroups
from sglang_slo.runtime.ports import Ports
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.lifecycle import Lifecycle
from sglang_slo.runtime.scheduler.planning import MOST_IDLE_PLANS, IdlePlanError, Planning
from sglang_slo.runtime.scheduler.viewer import Viewer
from sglang_slo.runtime.sglang import kv


class World:
    """The parts of an iteration around fakes, as `parts.build` puts them together."""

    def __init__(self, ports: Ports) -> None:
        self.ports, self.fallbacks, self.shed = ports, [], []
        look_up, groups = PrefixLookUp(ports.kv, ports.requests.table), PrefixGroups()
        pins = Pins(ports.kv.tree, ports.requests.table, 100, look_up.look_up)
        held = HeldPrefills(ports.kv, ports.requests.table, ports.waiting)
        self.preempt = Preemptor(ports, None, look_up, pins, held)
        self.lifecycle = Lifecycle(ports, look_up, groups, pins, held, None, None)
        opening = (self.lifecycle.open, self.lifecycle.open_begun)
        self.viewer = self.lifecycle.viewer = Viewer(ports, self.preempt, pins, look_up, *opening)
        self.planner = Planner(ports.settings)
        self.planning = Planning(
            ports,
            self.planner,
            self.viewer,
            self.preempt,
            Applier(
                ports,
                look_up,
                held,
                self.preempt.queue_again,
                lambda req, finish: self.shed.append((req, finish)),
            ),
            pins,
            groups,
            look_up,
            held,
            self.fallbacks.append,
        )

    def waits(self, req: Any) -> Any:
        """A request comes."""
        self.lifecycle.open(req)
        self.ports.waiting.reqs.append(req)
        return req


@pytest.fixture
def world() -> World:
    return World(doors())


def test_who_waits_is_built_into_a_batch(world: World) -> None:
    req = world.waits(FakeRequest(slo={"ttft_ms": 1000}))
    step = world.planning.prefill(FakeBatch([]))
    assert step is not None and world.ports.batches.asked == [{req: 20}]
    assert world.ports.iteration.plan is not None and not world.fallbacks


def test_a_plan_that_raises_leaves_a_batch_that_stock_scheduling_understands(world: World) -> None:
    world.waits(FakeRequest())
    world.planner.plan = _raise
    running = FakeBatch([])
    assert world.planning.prefill(running) is None
    assert world.ports.iteration.plan is None and world.ports.iteration.running is running
    assert not running.batch_is_full and len(world.fallbacks) == 1


def test_a_batch_that_was_built_is_launched_whatever_raises_afterwards(world: World) -> None:
    world.waits(FakeRequest())
    prefill = world.planning._applier.prefill

    def broken(*args: Any) -> Any:
        prefill(*args)
        raise RuntimeError("after")

    world.planning._applier.prefill = broken
    step = world.planning.prefill(FakeBatch([]))
    assert step is not None and step is world.ports.iteration.step and len(world.fallbacks) == 1


def test_plans_that_idle_while_somebody_waits_are_followed_so_often_and_no_more(world: World) -> None:
    world.waits(FakeRequest())
    world.planner.plan = lambda view: IterationPlan()
    for _ in range(MOST_IDLE_PLANS):
        step = world.planning.prefill(FakeBatch([]))
        assert step is not None and not world.fallbacks
        world.planning.end(step, False)
    assert world.planning.prefill(FakeBatch([])) is None
    assert isinstance(world.fallbacks[0], IdlePlanError)


def test_victims_wait_at_the_end_of_the_iteration(world: World) -> None:
    req: Any = FakeRequest()
    world.lifecycle.open(req)
    world.preempt.leaving.append(req)
    world.planning.end(SimpleNamespace(batch_to_run=None, running_batch=FakeBatch([])), False)
    assert world.ports.waiting.reqs == [req] and not world.preempt.leaving


def test_with_nobody_waiting_everyone_decodes_without_a_plan(world: World) -> None:
    req: Any = FakeRequest(slo={"tbt_ms": 1000})
    world.lifecycle.open(req)
    world.ports.requests.table.last_token_s[req.slo_row] = world.ports.agreed.now_s
    world.planner.plan = _raise
    step = world.planning.prefill(FakeBatch([req]))
    assert step is not None and step.batch_to_run is None and not world.fallbacks


def test_who_came_in_unseen_is_opened_when_it_is_planned(world: World) -> None:
    unseen: Any = FakeRequest()
    world.ports.waiting.reqs.append(unseen)
    world.planning.prefill(FakeBatch([]))
    assert unseen.slo_row >= 0 and unseen in world.ports.batches.asked[0]


def test_who_is_refused_gets_an_answer_and_loses_its_row(world: World) -> None:
    req = world.waits(FakeRequest())
    world.planning._applier.refuse([req.slo_row], [])
    [(answer, told)] = world.ports.tell.told
    assert (
        told is req and answer.rid == req.rid and "--slo-queue-limit-s" in answer.finished_reason["message"]
    )
    assert not world.ports.waiting.reqs and not world.ports.requests.reqs and world.shed == [(req, "shed")]


def _raise(*_: object) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("listed", ["stale", "next in line"])
def test_one_that_was_admitted_before_its_turn_to_be_looked_up_is_left_alone(
    listed: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds KV by then, and SGLang would take what it finds in the cache for what the request holds there."""
    runs, waits = (world.waits(FakeRequest(slo={"ttft_ms": 1000})) for _ in range(2))
    world.ports.waiting.reqs.remove(runs)
    monkeypatch.setattr(kv, "row_of", lambda req: 3 if req is runs else None)
    monkeypatch.setattr(kv, "committed_tokens", lambda req: 20)
    if listed == "stale":
        monkeypatch.setattr(world.planning._groups, "stale", lambda: [runs, waits])
    else:
        world.ports.iteration.next_in_line = [runs.slo_row, waits.slo_row]
    looked_up = (runs.looked_up, waits.looked_up)
    assert world.planning.prefill(FakeBatch([])) is not None
    assert runs.looked_up == looked_up[0] and waits.looked_up > looked_up[1]


def test_after_a_failure_nobody_is_next_in_line_by_the_plan_that_failed(world: World) -> None:
    world.ports.iteration.next_in_line = [world.waits(FakeRequest()).slo_row]
    world.planning.fall_back(RuntimeError("broken"))
    assert world.ports.iteration.next_in_line == []
