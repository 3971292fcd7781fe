"""Every figure of `/slo/status` moves when what it tells of happens on a real scheduler, and those of the moment go back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq

import real_scheduler as real
from sglang_slo import clock
from sglang_slo.core.plan import Planner

SHARED = ["--slo-max-preemptions", "50", "--disable-overlap-schedule"]
# KV for three of eight, and a host to swap to
CROWDED = [*SHARED, "--max-total-tokens", "320", "--slo-kv", "stock", "--schedule-conservativeness", "0.05"]
RECOMPUTING = [*CROWDED, "--slo-preempt", "recompute"]
CROWDED += ["--slo-host-kv-gb", "0.004"]
# long prompts in small chunks, set aside for short ones, and a forecast that is too bold
PARKING = [*SHARED, "--max-total-tokens", "900", "--chunked-prefill-size", "64", "--slo-preempt", "recompute"]
PARKING += ["--slo-reserve-floor", "0.02", "--slo-arrival-reserve", "0.1", "--slo-queue-limit-s", "0.02"]
# what stays as it is for as long as a server runs, and counts of what has tests of its own
FIXED = {"version", "policy", "dp_rank", "now.kv.capacity", "now.swap.host_capacity"}
ELSEWHERE = (
    "windows.",
    "now.kv.reserve",
    "now.lengths.",
    "request_log_rows_lost",
    "now.swap.failed_copies",
    "totals.left_in_time",
)
LIMITS: tuple[dict[str, Any], ...] = (
    {"ttft_ms": 60000, "tbt_ms": 60000},
    {"tbt_ms": 1},
    {"e2e_ms": 1000},
    {"ttft_ms": 0.01, "class": "of no server"},
    {},
)
AT_REST = {
    *(
        "now.running",
        "now.parked",
        "now.preempted",
        "now.given_up",
        "now.oldest_waiting_s",
        "now.chunk_tokens",
    ),
    *("now.kv.held", "now.kv.pinned", "now.swap.host_used"),
}


def leaves(thing: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure of a status, with its path."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, thing


def _watched(
    argv: list[str], sent: dict[int, list[Any]], folder: Path
) -> tuple[dict[str, set[Any]], dict[str, Any]]:
    """All values that each figure had, and those it has once all is over."""
    seen: dict[str, set[Any]] = {}

    def script(scheduler: Any, iteration: int) -> list[Any]:
        for path, value in leaves(scheduler.slo_observer.snapshot(clock.now(), scheduler._gauges)):
            seen.setdefault(path, set() if iteration == 1 else {None}).add(value)  # None: not told of before
        return sent.get(iteration, [])

    expected = sum(not isinstance(one, AbortReq) for some in sent.values() for one in some)
    scheduler = real.run(script, expected, argv, folder).scheduler
    return seen, dict(leaves(scheduler.slo_observer.snapshot(clock.now(), scheduler._gauges)))


def _request(name: str, prompt: list[int], output: int, slo: dict[str, Any]) -> Any:
    return real.request(name, prompt, output, **({"custom_params": {"slo": slo}} if slo else {}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, set[Any]], dict[str, Any]]]:
    """Short of KV with swapping, prompts that are set aside and a plan that fails once, short of KV without a host."""
    crowd = [_request(f"r{i}", p, 40, LIMITS[i % 5]) for i, p in enumerate(real.prompts(12, 24))]
    swapped = _watched(
        CROWDED, {1: crowd[:8], 20: crowd[8:], 24: [AbortReq(rid="r9")]}, tmp_path_factory.mktemp("swap")
    )
    long = [_request(f"l{i}", p, 60, {}) for i, p in enumerate(real.prompts(6, 300))]
    short = [_request(f"s{i}", p, 30, {"ttft_ms": 1000}) for i, p in enumerate(real.prompts(8, 20))]
    plan, raised = Planner.plan, []

    def fails_once(self: Planner, view: Any) -> Any:
        if len(view.decoding) and not raised:
            raised.append(1)
            raise ValueError("broken on purpose")
        return plan(self, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "plan", fails_once)
        parked = _watched(PARKING, {1: long, 3: short[:4], 9: short[4:]}, tmp_path_factory.mktemp("park"))
    again = [_request(f"a{i}", p, 40, {}) for i, p in enumerate(real.prompts(8, 24))]
    return [swapped, parked, _watched(RECOMPUTING, {1: again}, tmp_path_factory.mktemp("recompute"))]


def test_every_figure_moves(runs: list[tuple[dict[str, set[Any]], dict[str, Any]]]) -> None:
    paths = set().union(*(seen for seen, _ in runs))
    still = {path for path in paths if all(len(seen.get(path, ())) < 2 for seen, _ in runs)}
    assert {path for path in still if path not in FIXED and not path.startswith(ELSEWHERE)} == set()


def test_figures_of_the_moment_go_back_when_all_is_over(
    runs: list[tuple[dict[str, set[Any]], dict[str, Any]]],
) -> None:
    for _, after in runs:
        assert {path: after[path] for path in AT_REST if after.get(path)} == {}
        assert not [path for path in after if path.startswith("now.queued.")]
