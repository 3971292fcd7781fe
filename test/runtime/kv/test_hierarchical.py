"""SGLang's hierarchical cache under the deadline scheduler, with real copies: what is on the host is loaded, and is right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import invariants
import real_scheduler as real
from sglang_slo.cpu import hierarchical
from sglang_slo.runtime.kv.host_pool import kv_buffers, row_bytes
from sglang_slo.runtime.latency.startup_profile import GUESS
from sglang_slo.runtime.sglang import tree

HOST = ["--enable-hierarchical-cache", "--hicache-ratio", "4"]
SMALL = ["--max-total-tokens", "700", "--chunked-prefill-size", "64", "--slo-length", "none"]
AMPLE = ["--max-total-tokens", "20000"]
OVERLAP = {"overlap": [], "no overlap": ["--disable-overlap-schedule"]}
TURNS, TALKS = 3, 4


def turn(talk: int, number: int, prompts: list[list[int]]) -> Any:
    """A talk's next request: all that was said before, and some more."""
    return real.request(f"t{talk}.{number}", prompts[talk][: 120 + 40 * number], 6)


class Talks:
    """Several talks take turns; together they are more than the device holds, so that each finds its past on the host."""

    def __init__(self) -> None:
        self._prompts = list(real.prompts(TALKS, 300))
        self._left = [turn(talk, number, self._prompts) for number in range(TURNS) for talk in range(TALKS)]
        self.count = len(self._left)

    def __call__(self, scheduler: Any, iteration: int) -> list[Any]:
        if getattr(scheduler, "slo_on", False):
            invariants.check(scheduler)
        runs = not scheduler.running_batch.is_empty() or scheduler.last_batch
        busy = scheduler.waiting_queue or runs
        if scheduler.waiting_queue and not runs:
            time.sleep(1e-3)  # who fetches from storage is another thread
        return [self._left.pop(0)] if self._left and not busy else []


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """SGLang's own tokens, with room for everyone."""
    talks = Talks()
    return real.run(talks, talks.count, AMPLE, folder, False).tokens


def loads_of(argv: list[str], folder: Path) -> tuple[real.Run, int]:
    """The run of all talks, and tokens that were loaded from host memory (of one layer)."""
    loaded, load = [0], hierarchical.load

    def counted(pool: Any, device: Any, host: Any, slots: Any, layer: int, backend: str, **rest: Any) -> None:
        loaded[0] += len(host) if layer == 0 else 0
        load(pool, device, host, slots, layer, backend, **rest)

    talks = Talks()
    with mock.patch.object(hierarchical, "load", counted):
        run = real.run(talks, talks.count, argv, folder)
    return run, loaded[0]


@pytest.mark.parametrize("overlap", OVERLAP)
def test_what_lies_in_host_memory_is_loaded_and_the_tokens_are_stocks(
    overlap: str, folder: Path, expected: dict[str, list[int]]
) -> None:
    run, loaded = loads_of([*SMALL, *HOST, *OVERLAP[overlap]], folder)
    assert run.tokens == expected
    assert loaded > 0 and run.scheduler.slo_on
    assert run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0
    assert run.scheduler.slo_observer.trouble.count == 0


def test_loads_are_priced_as_copies_to_the_host_were_measured(folder: Path) -> None:
    sent = [real.request("r", next(real.prompts(1, 20)), 4)]
    s = real.run(real.all_at_once(sent), 1, [*SMALL, *HOST], folder).scheduler
    buffers = kv_buffers(s.token_to_kv_pool_allocator.get_kvcache())
    assert s.slo_model.kv_bytes_per_token == sum(map(row_bytes, buffers)) != GUESS.kv_bytes_per_token
    assert s.slo_model.swap_bytes_per_s != GUESS.swap_bytes_per_s


def test_a_load_that_finds_no_room_is_computed_instead(
    folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(cache: Any, req: Any) -> int:
        return 0

    monkeypatch.setattr(tree, "load_back", nothing)
    run, loaded = loads_of([*SMALL, *HOST], folder)
    assert run.tokens == expected and loaded == 0
    assert run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0


def test_many_at_once_in_a_pool_that_is_too_small_all_end_with_stocks_tokens(folder: Path) -> None:
    prompts = list(real.prompts(TALKS, 300))

    def sent() -> list[Any]:
        return [turn(talk, number, prompts) for number in range(TURNS) for talk in range(TALKS)]

    count, waves = TURNS * TALKS, sent()

    def script(scheduler: Any, iteration: int) -> list[Any]:
        return [waves.pop(0)] if waves and iteration % 4 == 1 else []

    run = real.run(script, count, [*SMALL, *HOST], folder)
    assert run.tokens == real.run(real.all_at_once(sent()), count, AMPLE, folder, False).tokens
    invariants.check(run.scheduler)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a cache with a third level, on disk."""
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "storage"))
    # its hashes are compiled on the side: a process that ends meanwhile leaves a lock that others wait for, for ever
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    small = ["--enable-hierarchical-cache", "--hicache-ratio", "1.1", "--hicache-storage-backend", "file"]
    soon = ["--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}']
    return [*small, *soon, "--hicache-storage-prefetch-policy", "wait_complete"]


def test_one_whose_kv_comes_from_storage_holds_nobody_up(
    folder: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the KV of one is on its way others are served, and it is when that has come."""
    prompts = list(real.prompts(TALKS, 300))
    waits = [True]
    monkeypatch.setattr(tree, "has_storage", lambda cache: True)
    monkeypatch.setattr(tree, "fetching", lambda cache: waits[0])
    monkeypatch.setattr(tree, "fetched", lambda cache, req: not waits[0] if req.rid == "t0.0" else None)

    def script(scheduler: Any, iteration: int) -> list[Any]:
        waits[0] = iteration < 60
        return [turn(talk, 0, prompts) for talk in range(2)] if iteration == 1 else []

    run = real.run(script, 2, [*SMALL, *HOST], folder)
    assert list(run.tokens) == ["t1.0", "t0.0"]
    assert all(run.tokens[rid] == expected[rid] for rid in run.tokens)
    assert run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0


def test_with_a_cache_on_disk_more_is_loaded_and_the_tokens_are_stocks(
    storage: list[str], folder: Path, expected: dict[str, list[int]]
) -> None:
    run, loaded = loads_of([*SMALL, *storage], folder)
    without, less = loads_of([*SMALL, *storage[:3]], folder)
    assert run.tokens == without.tokens == expected
    assert loaded > less
    assert run.scheduler.slo_observer.snapshot(0.0)["fallbacks"]["count"] == 0
