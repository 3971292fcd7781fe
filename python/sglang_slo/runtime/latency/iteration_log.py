"""Measured iterations, one CSV line each, into the file that `SGLANG_SLO_ITERATION_LOG` names; off by
default.

For checks of the latency model and of the twin against a real server. Written by the rank that measures;
lines reach the file a block at a time and at the process's end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sglang_slo.runtime.requests.registry import Launch

ENV = "SGLANG_SLO_ITERATION_LOG"
COLUMNS = "launched_s,idle_s,duration_s,extend,new_tokens,pairs,context_tokens,requests"


class IterationLog:
    """An open log, or nothing if none was asked for, or another rank (`wanted` False) writes it."""

    def __init__(self, wanted: bool = True) -> None:
        path = os.environ.get(ENV) if wanted else None
        # Lives as long as the process: there is no place to close it.
        self._out: TextIO | None = open(path, "a", buffering=1 << 13) if path else None  # noqa: PTH123, SIM115
        if self._out is not None and self._out.tell() == 0:
            self._out.write(COLUMNS + "\n")
            self._out.flush()

    def add(self, launch: Launch) -> None:
        """Note an iteration whose end has been measured."""
        if self._out is None:
            return
        s = launch.shape
        self._out.write(
            f"{launch.launched_s:.6f},{launch.idle_s:.6f},{launch.duration_s:.6f},{int(s.extend)},"
            f"{s.new_tokens},{s.pairs:.1f},{s.context_tokens},{s.requests}\n"
        )
