"""An exception between any two changes, with the pool full: nobody is lost, no KV leaks, and stock's tokens come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers import schedule_batch

import real_scheduler as real
from crowded import BOLD, COUNT, MANY, requests
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.plan import Planner
from sglang_slo.core.table import RequestTable
from sglang_slo.runtime.kv.held import HeldPrefills
from sglang_slo.runtime.kv.preempt import Preemptor
from sglang_slo.runtime.kv.swap_line import SwapLine
from sglang_slo.runtime.requests import batches, features
from sglang_slo.runtime.requests.registry import RequestRegistry
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.engine import EngineBatches
from sglang_slo.runtime.scheduler.planned_adder import PlannedAdder
from sglang_slo.runtime.scheduler.planning import MOST_IDLE_PLANS, Planning
from waves import Break, Wave, waves

FEW = 6  # requests in a wave
SMALL = ["--max-total-tokens", "400", *BOLD, *MANY, "--slo-host-kv-gb", "0.002"]
PLACES: list[tuple[Any, str]] = [
    (Preemptor, "preempt"),
    (Preemptor, "_leave"),
    (Preemptor, "_note"),
    (Preemptor, "arrived"),
    (Preemptor, "_pick_up"),
    (Preemptor, "bring_back"),
    (Preemptor, "requeued"),
    (SwapLine, "save"),
    (SwapLine, "take"),
    (SwapLine, "bring_back"),
    (SwapLine, "_hidden"),
    (SwapLine, "_copied_back"),
    (SwapLine, "landed"),
    (Applier, "prefill"),
    (Applier, "park"),
    (PlannedAdder, "add_one_req"),
    (EngineBatches, "build_prefill"),
    (Planning, "_make_plan"),
    (features, "of"),
    (RequestRegistry, "_due_for_the_end"),
    (RequestRegistry, "predicted"),
    (RequestTable, "remove"),
    (batches, "without"),
    (batches, "merged"),
    (batches, "decode_batch"),
    (batches, "correct_prefixes"),
]


# where slots are taken and given back: in pages, too
IN_PAGES = [
    place
    for place in PLACES
    if place[0] in (SwapLine, Applier, PlannedAdder, EngineBatches)
    or place[1] in ("_leave", "preempt", "decode_batch")
]


HELD: list[tuple[Any, str]] = [
    (HeldPrefills, name) for name in ("hold", "make_room", "entered", "waiting", "_let_go")
]
Case = tuple[str, Any, str, bool]  # the pool, what raises, and whether after what it does


class _Raises:
    """Raises before or after each `every`-th call, `times` times."""

    def __init__(self, original: Any, after: bool, times: int) -> None:
        self.original, self.after, self.left, self.calls = original, after, times, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        due = self.left > 0 and self.calls % 2 == 0
        self.left -= due
        if due and not self.after:
            raise RuntimeError("broken before")
        result = self.original(*args, **kwargs)
        if due:
            raise RuntimeError("broken after")
        return result


def few(prefix: str = "") -> list[Any]:
    """Enough for KV to run short in the pool of a wave."""
    return [real.request(f"{prefix}r{i}", p, 30 + 3 * i) for i, p in enumerate(real.prompts(FEW, 20))]


def _broken(owner: Any, name: str, after: bool) -> Break:
    """`owner.name` raises in some of its calls."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        raising = _Raises(getattr(owner, name), after, 3)
        # a plain function, so that it is bound like the method it stands for
        patch.setattr(owner, name, lambda *args, **kwargs: raising(*args, **kwargs))

    return apply


def test_plans_that_give_an_idle_device_nothing_to_do_are_not_followed_for_long(
    folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "plan", lambda self, view: IterationPlan())
    iterations: list[int] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        iterations.append(iteration)
        return requests() if iteration == 1 else []

    run = real.run(script, COUNT, ["--max-total-tokens", "20000"], folder)
    assert run.tokens == expected
    assert (
        0
        < run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"]
        < len(iterations) / MOST_IDLE_PLANS + 1
    )


POOLS: dict[str, tuple[list[tuple[Any, str]], list[str]]] = {
    "tokens": (PLACES, []),
    "pages": (IN_PAGES, ["--page-size", "16"]),
    "no tree": (HELD, ["--disable-radix-cache", "--chunked-prefill-size", "16"]),
}
CASES: list[Case] = [
    (pool, owner, name, after)
    for pool, (places, _) in POOLS.items()
    for owner, name in places
    for after in (False, True)
]


@pytest.fixture(scope="module")
def half_way(folder: Path) -> dict[Case, Wave]:
    """What came of an exception in each place."""
    found: dict[Case, Wave] = {}
    for pool, (_, flags) in POOLS.items():
        cases = [case for case in CASES if case[0] == pool]
        argv = [*SMALL, "--max-total-tokens", "208", "--slo-preempt", "swap", *flags]
        served = waves([_broken(*case[1:]) for case in cases], few, argv, folder, nothing_left)
        found |= zip(cases, served, strict=True)
    return found


@pytest.fixture(scope="module")
def stocks(folder: Path) -> dict[str, list[int]]:
    """SGLang's own tokens, with room for everyone."""
    return real.run(real.all_at_once(few()), FEW, ["--max-total-tokens", "20000"], folder, False).tokens


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=[f"{p}-{o.__name__.split('.')[-1]}.{n}-{'after' if a else 'before'}" for p, o, n, a in CASES],
)
def test_nobody_is_lost_half_way(
    case: Case, half_way: dict[Case, Wave], stocks: dict[str, list[int]]
) -> None:
    wave = half_way[case]
    assert wave.tokens == stocks
    assert not wave.left
    assert case[0] != "pages" or wave.preempted["swap"] > 0


def test_a_way_back_whose_price_cannot_be_told_takes_no_kv(
    folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_back, hidden = SwapLine.bring_back, SwapLine._hidden
    on_the_way, raises = [False], [3]

    def watched(self: Any, *args: Any) -> bool:
        on_the_way[0] = True
        try:
            return bring_back(self, *args)
        finally:
            on_the_way[0] = False

    def broken(self: Any, *args: Any) -> int:
        if on_the_way[0] and raises[0]:
            raises[0] -= 1
            raise ZeroDivisionError
        return hidden(self, *args)

    monkeypatch.setattr(SwapLine, "bring_back", watched)
    monkeypatch.setattr(SwapLine, "_hidden", broken)
    run = real.run(real.all_at_once(requests()), COUNT, [*SMALL, "--slo-preempt", "swap"], folder)
    assert raises == [0] and run.tokens == expected
    nothing_left(run.scheduler)


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("name", ["alloc_for_extend", "SamplingBatchInfo"])
def test_those_of_a_batch_that_sglang_cannot_build_are_answered(
    name: str, chunk: int, folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_one = getattr(schedule_batch, name)
    built = real_one.from_schedule_batch if name == "SamplingBatchInfo" else real_one
    raising = _Raises(built, False, 2)
    if name == "SamplingBatchInfo":
        monkeypatch.setattr(real_one, "from_schedule_batch", raising)
    else:
        monkeypatch.setattr(schedule_batch, name, raising)
    argv = [*SMALL, "--slo-preempt", "swap", "--chunked-prefill-size", str(chunk)]
    run = real.run(real.all_at_once(requests()), COUNT, argv, folder)
    assert 0 < len(run.aborted) < COUNT
    assert run.tokens == {rid: tokens for rid, tokens in expected.items() if rid not in run.aborted}
    nothing_left(run.scheduler)


def nothing_left(s: Any) -> None:
    """Everything was given back."""
    free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
    assert free == s.max_total_num_tokens
    assert len(s.req_to_token_pool.free_slots) == s.req_to_token_pool.size
    assert s.slo_preempt.idle and not s.slo_registry.reqs and len(s.slo_registry.table) == 0
    if s.slo_preempt.line is not None:
        assert s.slo_preempt.line.pool.used_tokens == 0
