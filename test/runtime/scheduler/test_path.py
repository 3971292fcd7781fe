"""Whoever follows a batch from SGLang's call for prefill to the launch reads few files, and few of them again."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.schedule_batch import ScheduleBatch

import real_scheduler as real
from crowded import COUNT, SWAP, requests
from sglang_slo.runtime.scheduler.scheduler import SloScheduler

MOST_FILES = 8
MOST_RETURNS = 2  # to a file that was left
OURS = "sglang_slo/"
NO_STEPS = (
    "__init__",
    "<lambda>",
    "<genexpr>",
    "<listcomp>",
)  # who only keeps what it is given decides nothing


class BatchPath:
    """The files of ours that are handed a batch, call by call, in each iteration."""

    def __init__(self) -> None:
        self.iterations: list[list[str]] = []

    def begin(self) -> None:
        self.iterations.append([])
        sys.setprofile(self._called)

    def end(self) -> None:
        sys.setprofile(None)

    def _called(self, frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or OURS not in file or frame.f_code.co_name in NO_STEPS:
            return
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if any(isinstance(frame.f_locals.get(name), ScheduleBatch) for name in names):
            self.iterations[-1].append(file.rpartition(OURS)[2])


def returns(path: list[str]) -> int:
    """How often the path comes back to the file that it comes back to most."""
    visits = Counter(file for file, _ in groupby(path))
    return max(visits.values(), default=1) - 1


def test_a_batch_passes_few_files_and_returns_to_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ours, launch = BatchPath(), SloScheduler.get_new_batch_prefill, stock.Scheduler.run_batch
    choose = SloScheduler.get_next_batch_to_run

    def begin(self: Any, batch: Any) -> Any:
        path.begin()
        return ours(self, batch)

    def chosen(self: Any, **batches: Any) -> Any:
        step = choose(self, **batches)
        if step.batch_to_run is None:  # nothing to launch
            path.end()
        return step

    def end(self: Any, *args: Any, **kwargs: Any) -> Any:
        path.end()
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(SloScheduler, "get_new_batch_prefill", begin)
    monkeypatch.setattr(SloScheduler, "get_next_batch_to_run", chosen)
    monkeypatch.setattr(stock.Scheduler, "run_batch", end)
    try:
        run = real.run(real.all_at_once(requests()), COUNT, SWAP, tmp_path)
    finally:
        path.end()
    assert run.counts and any("runtime/kv/preempt.py" in files for files in path.iterations)
    longest = max(path.iterations, key=lambda files: len(set(files)))
    assert len(set(longest)) <= MOST_FILES, longest
    busiest = max(path.iterations, key=returns)
    assert returns(busiest) <= MOST_RETURNS, [file for file, _ in groupby(busiest)]
