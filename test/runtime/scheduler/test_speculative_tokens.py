"""Under speculative decoding, in a real scheduler with the demo model: no token changes, whatever is done to a request."""

from __future__ import annotations

from pathlib import Path

import pytest

import real_scheduler as real
from crowded import BOLD, COUNT, MANY, POOL, requests
from sglang_slo.runtime.sglang import speculation

if not speculation.COVERED:
    pytest.skip("stock scheduling on this SGLang", allow_module_level=True)

from speculating import EAGLE, for_real

OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
PAGES = {"page 1": [], "page 16": ["--page-size", "16"]}


def served(argv: list[str], folder: Path, slo: bool = True) -> real.Run:
    """Requests that come two by two, so that decodes meet prefill."""
    todo = requests()

    def script(scheduler: object, iteration: int) -> list[object]:
        return [todo.pop(0) for _ in range(min(2, len(todo)))] if iteration % 3 == 1 else []

    with for_real():
        run = real.run(script, COUNT, [*EAGLE, *argv], folder, slo)
    s = run.scheduler
    assert (
        s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
        == s.max_total_num_tokens
    )
    assert len(s.req_to_token_pool.free_slots) == s.req_to_token_pool.size
    if slo:
        assert s.slo_on and not s.slo_observer.fallbacks.count and not s.slo_observer.trouble.count
        assert len(s.slo_registry.table) == 0 and s.slo_preempt.idle
    return run


def given(run: real.Run) -> dict[str, list[int]]:
    """Of each request, what its client is given: the last burst may pass its end."""
    return {rid: tokens[: run.reqs[rid].finished_len] for rid, tokens in run.tokens.items()}


def test_sglangs_own_scheduling_gives_the_same_tokens_with_this_worker(
    folder: Path, expected: dict[str, list[int]]
) -> None:
    assert given(served(["--max-total-tokens", "20000"], folder, False)) == expected


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("way", ["keep", "recompute"])
def test_tokens_are_the_same_whichever_way_out(
    way: str, overlap: str, pages: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    argv = [*POOL, *BOLD, *MANY, "--slo-preempt", way, *OVERLAP[overlap], *PAGES[pages]]
    run = served(argv, folder)
    assert run.counts.get(way, 0) > 0
    assert given(run) == expected


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("mix", ["always", "never"])
def test_tokens_are_the_same_mixed_with_prefill_or_apart(
    mix: str, overlap: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    argv = ["--max-total-tokens", "20000", "--slo-mix", mix, *OVERLAP[overlap]]
    assert given(served(argv, folder)) == expected
