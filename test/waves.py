"""One scheduler for many failures: a wave of requests for each, with something of ours broken while the wave is served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import real_scheduler as real

Break = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Wave:
    """What came of one. `left`: what had not been given back when it was over, if anything."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    troubles: int = 0  # counted while it was served
    preempted: Counter[str] = field(default_factory=Counter)
    left: str = ""


def waves(
    breaks: Sequence[Break],
    requests: Callable[[str], list[Any]],
    argv: list[str],
    folder: Path,
    check: Callable[[Any], None] = lambda _: None,
) -> list[Wave]:
    """A wave for each of `breaks`, in order. `requests(prefix)`: with ids that begin so; `check` after each wave."""
    script = _Script(breaks, requests, check)
    run = real.run(script, len(breaks) * len(requests("")), argv, folder)
    script.end(run.scheduler)
    for rid, tokens in run.tokens.items():
        wave, _, name = rid.partition(":")
        script.waves[int(wave)].tokens[name] = tokens
    return script.waves


class _Script:
    def __init__(
        self, breaks: Sequence[Break], requests: Callable[[str], list[Any]], check: Callable[[Any], None]
    ) -> None:
        self._breaks, self._requests, self._check = breaks, requests, check
        self.waves: list[Wave] = []
        self._patch = pytest.MonkeyPatch()
        self._before: tuple[int, Counter[str]] = (0, Counter())

    def __call__(self, scheduler: Any, iteration: int) -> list[Any]:
        if not scheduler.is_fully_idle():
            return []
        if self.waves:
            self.end(scheduler)
        self._before = _counted(scheduler)
        self.waves.append(Wave())
        number = len(self.waves) - 1
        self._breaks[number](self._patch)
        return self._requests(f"{number}:")

    def end(self, scheduler: Any) -> None:
        """The last wave is over: everything works again, and nothing of it is in the cache."""
        self._patch.undo()
        wave, before = self.waves[-1], self._before
        scheduler.on_idle()
        troubles, preempted = _counted(scheduler)
        wave.troubles, wave.preempted = troubles - before[0], preempted - before[1]
        try:
            self._check(scheduler)
        except AssertionError as error:
            wave.left = str(error) or "something"
        scheduler.flush_cache()


def _counted(scheduler: Any) -> tuple[int, Counter[str]]:
    observer = scheduler.slo_observer
    troubles = observer.trouble.count + observer.snapshot(0.0)["fallbacks"]["count"]
    return int(troubles), Counter(scheduler.slo_preempt.counts)
