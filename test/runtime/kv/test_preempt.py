"""Preemption in a real scheduler: every way out is taken, nothing is lost or leaked, and no token changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    PauseGenerationReqInput,
    UpdateWeightFromDiskReqInput,
)

import real_scheduler as real
from crowded import BOLD, COUNT, MANY, SWAP, requests
from sglang_slo.runtime.kv import host_pool
from sglang_slo.runtime.kv.host_pool import ArenaHostPool

OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
PAGED = ["--page-size", "16"]
PAGES = {"page 1": [], "page 16": PAGED}


def nothing_is_left(run: real.Run) -> None:
    s = run.scheduler
    free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
    assert free == s.max_total_num_tokens
    assert len(s.req_to_token_pool.free_slots) == s.req_to_token_pool.size
    assert len(s.slo_registry.table) == 0 and not s.slo_registry.reqs
    assert s.slo_preempt.idle
    if s.slo_preempt.line is not None:
        pool = s.slo_preempt.line.pool
        assert pool.used_tokens == 0 and pool._extents._free == [(0, pool.capacity_tokens)]
    assert s.slo_observer.trouble.count == 0


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("way", ["swap", "keep", "recompute"])
def test_tokens_are_the_same_whichever_way_out(
    way: str, overlap: str, pages: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    argv = [*SWAP, "--slo-preempt", way, *OVERLAP[overlap], *PAGES[pages]]
    run = real.run(real.all_at_once(requests()), COUNT, argv, folder)
    assert run.tokens == expected
    assert run.counts[way] > 0 and not run.counts.get("stock")
    assert run.counts.get("swap", 0) == run.scheduler.slo_preempt.swap_ins
    nothing_is_left(run)


@pytest.mark.parametrize("way", ["swap", "recompute"])
def test_without_a_prefix_cache_tokens_are_the_same_and_nobody_is_kept(
    way: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    argv = [*SWAP, "--slo-preempt", way, "--disable-radix-cache", "--chunked-prefill-size", "16"]
    run = real.run(real.all_at_once(requests()), COUNT, argv, folder)
    assert run.tokens == expected
    assert run.counts[way] > 0 and not run.counts.get("keep")
    nothing_is_left(run)


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("overlap", OVERLAP)
def test_tokens_are_the_same_in_mixed_batches_of_cut_and_parked_prompts(
    overlap: str, pages: str, folder: Path
) -> None:
    prompts = list(real.prompts(COUNT, 90))
    sent = [real.request(f"r{i}", p, 40) for i, p in enumerate(prompts)]
    again = [real.request(f"r{i}", p, 40) for i, p in enumerate(prompts)]
    whole = real.run(real.all_at_once(sent), COUNT, ["--max-total-tokens", "20000"], folder, False).tokens
    argv = [*SWAP, "--max-total-tokens", "544", "--chunked-prefill-size", "32", "--slo-mix", "always"]
    run = real.run(real.all_at_once(again), COUNT, [*argv, *OVERLAP[overlap], *PAGES[pages]], folder)
    assert run.tokens == whole
    assert run.counts["swap"] > 0
    nothing_is_left(run)


@pytest.mark.parametrize("protected", ["all", "all that decode at first"])
@pytest.mark.parametrize("way", ["swap", "recompute", "stock"])
def test_all_are_served_where_everyone_is_to_be_left_alone(
    protected: str, way: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    sent = requests()

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if protected == "all" or iteration < 40:
            scheduler.slo_registry.table.stays_until_s[:] = 1e18
        return sent if iteration == 1 else []

    run = real.run(script, COUNT, [*SWAP, "--slo-preempt", way], folder)
    assert run.tokens == expected
    assert run.counts[way] > 0
    nothing_is_left(run)


def test_one_that_fills_the_whole_pool_alone_is_answered(folder: Path) -> None:
    prompts = list(real.prompts(3, 100))
    sent = [real.request(f"r{i}", p, 900) for i, p in enumerate(prompts)]
    run = real.run(real.all_at_once(sent), 3, ["--max-total-tokens", "150", *BOLD, *MANY], folder)
    assert sorted(run.tokens) == ["r0", "r1", "r2"]  # cut at what the pool holds, as SGLang does
    assert all(0 < len(tokens) < 60 for tokens in run.tokens.values())
    nothing_is_left(run)


def test_a_full_host_means_recompute(folder: Path, expected: dict[str, list[int]]) -> None:
    run = real.run(real.all_at_once(requests()), COUNT, [*SWAP, "--slo-host-kv-gb", "0.00005"], folder)
    assert run.tokens == expected
    assert run.counts["recompute"] > 0
    nothing_is_left(run)


@pytest.mark.parametrize("direction", ["_save_buffer", "_load_buffer"])
def test_a_copy_that_fails_means_recompute(
    direction: str, folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = iter(range(10**6))
    sound = getattr(ArenaHostPool, direction)

    def broken(*args: Any) -> None:
        if next(copies) // 4 % 2 == 0:  # four buffers a copy: every other copy
            raise RuntimeError("the copy engine is on fire")
        sound(*args)

    monkeypatch.setattr(host_pool, "measure", lambda *_: None)
    monkeypatch.setattr(ArenaHostPool, direction, staticmethod(broken))
    run = real.run(real.all_at_once(requests()), COUNT, SWAP, folder)
    assert run.tokens == expected
    assert run.scheduler.slo_preempt.line.failed > 0
    nothing_is_left(run)


def test_nobody_is_preempted_more_often_than_allowed(folder: Path, expected: dict[str, list[int]]) -> None:
    most: list[int] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        most.append(int(scheduler.slo_registry.table.preemptions.max()))
        return requests() if iteration == 1 else []

    argv = [*SWAP, "--slo-max-preemptions", "1"]
    run = real.run(script, COUNT, argv, folder)
    assert run.tokens == expected
    ours = sum(run.counts.get(way, 0) for way in ("swap", "keep", "recompute"))
    assert max(most) <= 1 + run.counts.get("stock", 0) and ours <= COUNT
    nothing_is_left(run)


class _WhenSwapped:
    """Sends a command the first time that `stage` of the swap line holds someone."""

    def __init__(self, command: Any, stage: str = "out") -> None:
        self.command, self.stage, self.rid = command, stage, ""

    def __call__(self, scheduler: Any, iteration: int) -> list[Any]:
        if iteration == 1:
            return requests()
        held = getattr(scheduler.slo_preempt.line, self.stage)
        if self.rid or not held:
            return []
        self.rid = held[0].req.rid
        return self.command(self.rid)


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers take a few iterations, as on a GPU, instead of none."""
    init = ArenaHostPool.__init__

    def hiding(self: Any, *args: Any) -> None:
        init(self, *args)
        self.hides = True

    monkeypatch.setattr(ArenaHostPool, "__init__", hiding)
    monkeypatch.setattr("sglang_slo.core.kv.preemption.swap_s", lambda model, tokens: 0.06)


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("overlap", OVERLAP)
def test_transfers_that_take_iterations_change_no_token(
    overlap: str, pages: str, folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    argv = [*SWAP, *OVERLAP[overlap], *PAGES[pages]]
    run = real.run(real.all_at_once(requests()), COUNT, argv, folder)
    assert run.tokens == expected
    assert run.scheduler.slo_preempt.swap_ins > 0
    nothing_is_left(run)


@pytest.mark.parametrize("stage", ["out", "arriving"])
def test_an_abort_in_mid_swap_frees_both_sides(
    stage: str, folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    script = _WhenSwapped(lambda rid: [AbortReq(rid=rid)], stage)
    run = real.run(script, COUNT, SWAP, folder)
    assert run.aborted == [script.rid]
    assert run.tokens == {rid: tokens for rid, tokens in expected.items() if rid != script.rid}
    nothing_is_left(run)


def test_abort_of_everyone_leaves_nothing(folder: Path) -> None:
    script = _WhenSwapped(lambda rid: [AbortReq(rid="", abort_all=True)])
    run = real.run(script, COUNT, SWAP, folder)
    assert len(run.aborted) > 0 and len(run.aborted) + len(run.tokens) == COUNT
    nothing_is_left(run)


@pytest.mark.parametrize("stage", ["out", "arriving"])
def test_new_weights_drop_the_copies(
    stage: str, folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    same = str(real.demo_model_path(folder))
    script = _WhenSwapped(
        lambda rid: [UpdateWeightFromDiskReqInput(model_path=same, load_format="auto", flush_cache=False)],
        stage,
    )
    run = real.run(script, COUNT, SWAP, folder)
    assert run.tokens == expected
    assert run.scheduler.slo_preempt.swap_ins < run.counts["swap"]
    nothing_is_left(run)


def test_pause_by_retraction_holds_no_kv_for_the_swapped(
    folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    held: list[int] = []

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if scheduler._engine_paused:
            s = scheduler
            free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
            held.append(s.max_total_num_tokens - free)
            return [ContinueGenerationReqInput()]
        return swapped(scheduler, iteration)

    swapped = _WhenSwapped(lambda rid: [PauseGenerationReqInput(mode="retract")], "arriving")
    run = real.run(script, COUNT, SWAP, folder)
    assert held == [0]
    assert run.tokens == expected
    nothing_is_left(run)


def test_a_server_with_requests_on_the_host_is_not_idle_and_keeps_its_cache(
    folder: Path, expected: dict[str, list[int]]
) -> None:
    idle: list[bool] = []

    def flush(rid: str) -> list[Any]:
        return [FlushCacheReqInput()]

    def script(scheduler: Any, iteration: int) -> list[Any]:
        if iteration > 1 and scheduler.slo_preempt.line.out:
            idle.append(scheduler.is_fully_idle())
        return swapped(scheduler, iteration)

    swapped = _WhenSwapped(flush)
    run = real.run(script, COUNT, SWAP, folder)
    assert idle and not any(idle)
    assert run.tokens == expected
    nothing_is_left(run)
