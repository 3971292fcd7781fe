"""A prompt that is set aside half-way goes on where it stopped, and leaves nothing behind if it is aborted.

With a prefix tree, which keeps its KV, and without one, where it keeps its own.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq

import real_scheduler as real
from sglang_slo.runtime.kv.held import HeldPrefills

FLAGS = ["--max-total-tokens", "2000", "--chunked-prefill-size", "32", "--slo-length", "none"]
TIGHT = {"custom_params": {"slo": {"ttft_ms": 1000.0}}}
OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
CACHE = {"tree": [], "no tree": ["--disable-radix-cache"]}
each_cache = pytest.mark.parametrize("cache", CACHE)


def nothing_is_left(run: real.Run) -> None:
    s = run.scheduler
    free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
    assert free == s.max_total_num_tokens
    assert len(s.req_to_token_pool.free_slots) == s.req_to_token_pool.size
    assert len(s.slo_registry.table) == 0 and s.chunked_req is None
    assert s.slo_observer.trouble.count == 0 and s.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0


class _ParksTheLong:
    """A long prompt, and an urgent one as soon as the long one is cut; `then` when it has been set aside."""

    def __init__(self, then: list[Any], prompt: int = 40, output: int = 8) -> None:
        self.then, self.parked, self._prompt, self._output = then, False, prompt, output
        self._long, self._short = real.prompts(2, 600)
        self._sent = False

    def __call__(self, scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            return [real.request("long", self._long, 8)]
        if scheduler.chunked_req is not None and not self._sent:
            self._sent = True
            return [real.request("short", self._short[: self._prompt], self._output, **TIGHT)]
        if not self.parked and any(getattr(r, "slo_parked", 0) for r in scheduler.waiting_queue):
            self.parked = True
            return self.then
        return []


@each_cache
@pytest.mark.parametrize("overlap", OVERLAP)
def test_a_parked_prompt_ends_with_stocks_tokens(overlap: str, cache: str, tmp_path: Path) -> None:
    script = _ParksTheLong([])
    run = real.run(script, 2, [*FLAGS, *OVERLAP[overlap], *CACHE[cache]], tmp_path)
    long, short = real.prompts(2, 600)
    again = [real.request("long", long, 8), real.request("short", short[:40], 8)]
    assert script.parked
    assert run.tokens == real.run(real.all_at_once(again), 2, FLAGS[:2], tmp_path, False).tokens
    assert run.reqs["long"].slo_parked and not run.reqs["long"].slo_recomputed_tokens
    nothing_is_left(run)


@each_cache
@pytest.mark.parametrize("overlap", OVERLAP)
def test_an_abort_of_a_parked_prompt_leaves_nothing(overlap: str, cache: str, tmp_path: Path) -> None:
    script = _ParksTheLong([AbortReq(rid="long")])
    run = real.run(script, 2, [*FLAGS, *OVERLAP[overlap], *CACHE[cache]], tmp_path)
    assert script.parked and run.aborted == ["long"] and list(run.tokens) == ["short"]
    nothing_is_left(run)


def _broken_once(scheduler: Any) -> None:
    """The next planning raises, and stock scheduling takes the iteration."""
    plan, planner = scheduler.slo_planner.plan, scheduler.slo_planner

    def broken(view: Any) -> Any:
        planner.plan = plan
        raise RuntimeError("broken")

    planner.plan = broken


@each_cache
@pytest.mark.parametrize("overlap", OVERLAP)
def test_one_that_stock_scheduling_begins_again_at_once_has_stocks_tokens(
    overlap: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set aside, then planning raises: its chunk in flight gives it no token when its next one is launched."""
    script = _ParksTheLong([], prompt=20)  # stock's chunk has room for a piece of the long one behind it
    make_room, cut, failed = HeldPrefills.make_room, [], []

    def fails(self: HeldPrefills, *args: Any, **kwargs: Any) -> Any:
        if cut and getattr(cut[0], "slo_parked", 0) and not failed:
            failed.append(1)
            raise RuntimeError("broken")
        return make_room(self, *args, **kwargs)

    def scripted(scheduler: Any, iteration: int) -> list[Any]:
        if scheduler.chunked_req is not None and not cut:
            cut.append(scheduler.chunked_req)
        return script(scheduler, iteration)

    monkeypatch.setattr(HeldPrefills, "make_room", fails)
    run = real.run(scripted, 2, [*FLAGS, *OVERLAP[overlap], *CACHE[cache]], tmp_path)
    long, short = real.prompts(2, 600)
    again = [real.request("long", long, 8), real.request("short", short[:20], 8)]
    assert failed and run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 1
    assert run.tokens == real.run(real.all_at_once(again), 2, FLAGS[:2], tmp_path, False).tokens


def _all_slots_taken(scheduler: Any) -> None:
    """All KV that nobody holds is needed at once."""
    pool = scheduler.slo_ports.kv
    scheduler.slo_parts.held.make_room(pool.unheld_tokens() + 1)


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("happens", [_broken_once, _all_slots_taken])
def test_without_a_tree_one_that_has_to_let_go_of_its_prompt_computes_it_again(
    happens: Any, overlap: str, tmp_path: Path
) -> None:
    script = _ParksTheLong([])
    done: list[int] = []

    def scripted(scheduler: Any, iteration: int) -> list[Any]:
        news = script(scheduler, iteration)
        if script.parked and not done:
            done.append(iteration)
            happens(scheduler)
        return news

    run = real.run(scripted, 2, [*FLAGS, *OVERLAP[overlap], *CACHE["no tree"]], tmp_path)
    long, short = real.prompts(2, 600)
    again = [real.request("long", long, 8), real.request("short", short[:40], 8)]
    assert run.tokens == real.run(real.all_at_once(again), 2, FLAGS[:2], tmp_path, False).tokens
    assert run.reqs["long"].slo_recomputed_tokens > 0
    assert not run.scheduler.slo_ports.kv.held
    s = run.scheduler
    assert s.token_to_kv_pool_allocator.available_size() == s.max_total_num_tokens


def test_without_a_tree_the_row_that_one_set_aside_holds_is_its_own_to_use(tmp_path: Path) -> None:
    """No more requests may run than do and than are set aside; nobody has to end before it goes on."""
    script = _ParksTheLong([], prompt=32, output=300)  # one chunk
    run = real.run(script, 2, [*FLAGS, *CACHE["no tree"], "--max-running-requests", "2"], tmp_path)
    assert script.parked and list(run.tokens) == ["long", "short"]
    nothing_is_left(run)


@each_cache
@pytest.mark.parametrize("seed", range(3))
def test_random_aborts_among_cut_parked_and_preempted_requests_leave_nothing(
    seed: int, cache: str, tmp_path: Path
) -> None:
    rng, count, sent, gone = random.Random(seed), 40, [0], set[str]()
    prompts = list(real.prompts(count, 120))

    def script(scheduler: Any, iteration: int) -> list[Any]:
        news: list[Any] = []
        while sent[0] < count and rng.random() < 0.5:
            i = sent[0]
            limits = TIGHT if i % 3 == 0 else {}
            news.append(
                real.request(f"r{i:02}", prompts[i][: rng.randint(5, 120)], rng.randint(2, 60), **limits)
            )
            sent[0] += 1
        if sent[0] and rng.random() < 0.15:
            rid = f"r{rng.randrange(sent[0]):02}"
            if rid not in gone:
                gone.add(rid)
                news.append(AbortReq(rid=rid))
        return news

    bold = ["--max-total-tokens", "500", "--slo-kv", "stock", "--schedule-conservativeness", "0.05"]
    argv = [*FLAGS, *bold, *CACHE[cache], "--slo-host-kv-gb", "0.002", "--slo-max-preemptions", "20"]
    run = real.run(script, count, argv, tmp_path)
    assert set(run.aborted) <= gone
    assert sum(run.counts.values()) > 0  # KV did run short
    nothing_is_left(run)
