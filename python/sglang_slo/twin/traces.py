"""Recorded traffic: CSV with arrival_s, input_tokens, output_tokens, and JSONL in Mooncake's format.

Mooncake's timestamps are rounded down to bins of MOONCAKE_BIN_S; arrivals are spread over their bin by the seed,
and prompts keep the prefix blocks they share.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sglang_slo.twin.streams import BLOCK_TOKENS, Stream, WorkloadError

MOONCAKE_BIN_S = 3.0


def read_trace(path: Path, rng: np.random.Generator) -> Stream:
    """A trace, CSV or Mooncake's JSONL. Raises WorkloadError naming file, line and field."""
    if path.suffix == ".jsonl":
        return _read_mooncake(path, rng)
    columns = read_csv(path, ("arrival_s", "input_tokens", "output_tokens"))
    arrival = np.array(columns["arrival_s"])
    if (np.diff(arrival) < 0).any():
        line = int(np.flatnonzero(np.diff(arrival) < 0)[0]) + 3
        raise WorkloadError(f"{path}:{line}: arrival_s: earlier than the line before")
    return Stream(
        arrival,
        np.array(columns["input_tokens"], np.int64),
        np.array(columns["output_tokens"], np.int64),
        end_s=float(arrival[-1]),
    )


def read_csv(path: Path, fields: tuple[str, ...]) -> dict[str, list[float]]:
    """The named columns. Raises WorkloadError naming file, line and field."""
    columns: dict[str, list[float]] = {f: [] for f in fields}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [f for f in fields if f not in (rows.fieldnames or [])]
        if missing:
            raise WorkloadError(f"{path}:1: {missing[0]}: column missing; needed: {', '.join(fields)}")
        for row in rows:
            for f in fields:
                columns[f].append(_cell(row[f], f, path, rows.line_num))
    if not columns[fields[0]]:
        raise WorkloadError(f"{path}: no rows")
    return columns


def _cell(value: Any, field: str, path: Path, line: int) -> float:
    low = 0 if field in ("arrival_s", "timestamp") else 1
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < low or (low and number != int(number)):
        kind = "a whole number of at least 1" if low else "a number of at least 0"
        raise WorkloadError(f"{path}:{line}: {field}: need {kind}, got {value!r}")
    return number


def _read_mooncake(path: Path, rng: np.random.Generator) -> Stream:
    arrival, inputs, outputs = [], [], []
    blocks: list[tuple[int, ...] | None] = []
    with path.open() as file:
        for line, text in enumerate(file, 1):
            try:
                row = json.loads(text)
                ids = tuple(int(h) for h in row["hash_ids"])
            except (ValueError, KeyError, TypeError) as error:
                raise WorkloadError(f"{path}:{line}: need JSON with hash_ids: {error}") from error
            arrival.append(_cell(row.get("timestamp"), "timestamp", path, line) / 1e3)
            inputs.append(int(_cell(row.get("input_length"), "input_length", path, line)))
            outputs.append(int(_cell(row.get("output_length"), "output_length", path, line)))
            if len(ids) < math.ceil(inputs[-1] / BLOCK_TOKENS):
                raise WorkloadError(f"{path}:{line}: hash_ids: too few blocks for input_length {inputs[-1]}")
            blocks.append(ids)
    if not arrival:
        raise WorkloadError(f"{path}: no rows")
    end = arrival[-1] + MOONCAKE_BIN_S
    spread = np.array(arrival) + rng.random(len(arrival)) * MOONCAKE_BIN_S
    order = np.argsort(spread, kind="stable")
    whole = Stream(spread, np.array(inputs, np.int64), np.array(outputs, np.int64), blocks, end)
    return whole.pick(order)
