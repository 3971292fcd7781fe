"""What all readers of traces share: one checked row at a time, faults named by file, line and field, and the stream at
the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sglang_slo.core.slo import Slo
from sglang_slo.twin.workloads.streams import Stream, WorkloadError

CHARACTERS_PER_TOKEN = 4.0  # of text without a tokenizer; English in a large vocabulary


@dataclass
class Row:
    """One request of a trace. `arrival_s` None: the source does not say when; `line`: for messages."""

    input_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    slo_class: str | None = None
    caller: str = ""
    text: str | None = None
    declared: int | None = None
    limits: Slo | None = None
    blocks: tuple[int, ...] | None = None
    line: int = field(default=0, compare=False)


def number(value: Any, name: str, path: Path, line: int, low: float = 0.0, whole: bool = False) -> float:
    """A finite number of at least `low`. Raises WorkloadError naming file, line and field."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or found < low or isinstance(value, bool) or (whole and found != int(found)):
        kind = "a whole number" if whole else "a number"
        raise WorkloadError(f"{path}:{line}: {name}: need {kind} of at least {low:g}, got {value!r}")
    return found


def tokens(value: Any, name: str, path: Path, line: int) -> int:
    """A whole number of at least 1. Raises WorkloadError naming file, line and field."""
    return int(number(value, name, path, line, 1, whole=True))


def tokens_of(characters: int) -> int:
    """About how many tokens a text of so many characters is."""
    return max(round(characters / CHARACTERS_PER_TOKEN), 1)


def stream_of(rows: Iterable[Row], path: Path, in_order: bool = False) -> Stream:
    """The rows as a stream in order of arrival, from 0. `in_order`: a row earlier than the one before is a fault.

    Raises WorkloadError if there is none. Without arrivals all are 0, and `timed` is False.
    """
    all_rows = list(rows)
    if not all_rows:
        raise WorkloadError(f"{path}: no rows")
    timed = all(row.arrival_s is not None for row in all_rows)
    arrival = np.array([row.arrival_s if timed else 0.0 for row in all_rows], float)
    if in_order and (np.diff(arrival) < 0).any():
        late = all_rows[int(np.flatnonzero(np.diff(arrival) < 0)[0]) + 1]
        raise WorkloadError(f"{path}:{late.line}: arrival_s: earlier than the line before")
    order = np.argsort(arrival, kind="stable")
    kept = [all_rows[i] for i in order.tolist()]
    blocks = [row.blocks for row in kept]
    return Stream(
        arrival[order],
        np.array([row.input_tokens for row in kept], np.int64),
        np.array([row.output_tokens for row in kept], np.int64),
        blocks if any(b is not None for b in blocks) else None,
        float(arrival[order][-1]) if timed else math.inf,
        timed=timed,
        classes=_column([row.slo_class for row in kept]),
        callers=[row.caller for row in kept],
        texts=_column([row.text for row in kept]),
        declared=_column([row.declared for row in kept]),
        limits=_column([row.limits for row in kept]),
    )


def _column(values: list[Any]) -> list[Any] | None:
    return None if all(v is None for v in values) else values
