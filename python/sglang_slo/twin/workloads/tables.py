"""Traces in CSV: our own columns, Azure's of 2023 and 2024, and BurstGPT's."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from sglang_slo.twin.workloads.rows import Row, number, tokens
from sglang_slo.twin.workloads.streams import WorkloadError

OURS = ("arrival_s", "input_tokens", "output_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
LENGTHS = ("input_tokens", "output_tokens")


def plain(path: Path) -> Iterator[Row]:
    """arrival_s (may be missing), input_tokens, output_tokens; class and caller if there."""
    for line, row in _rows(path, LENGTHS):
        yield Row(
            tokens(row["input_tokens"], "input_tokens", path, line),
            tokens(row["output_tokens"], "output_tokens", path, line),
            number(row["arrival_s"], "arrival_s", path, line) if "arrival_s" in row else None,
            row.get("class") or None,
            row.get("caller") or "",
            line=line,
        )


def azure(path: Path) -> Iterator[Row]:
    """AzureLLMInferenceTrace of 2023 and 2024: calendar times; from the first of them."""
    first: float | None = None
    for line, row in _rows(path, AZURE):
        at = _calendar_s(row["TIMESTAMP"], path, line)
        first = at if first is None else first
        yield Row(
            tokens(row["ContextTokens"], "ContextTokens", path, line),
            tokens(row["GeneratedTokens"], "GeneratedTokens", path, line),
            at - first,
            line=line,
        )


def burstgpt(path: Path) -> Iterator[Row]:
    """BurstGPT: seconds; requests that failed (no response tokens) are left out; the session is the caller."""
    for line, row in _rows(path, BURSTGPT):
        response = number(row["Response tokens"], "Response tokens", path, line, whole=True)
        if response < 1:
            continue
        yield Row(
            tokens(row["Request tokens"], "Request tokens", path, line),
            int(response),
            number(row["Timestamp"], "Timestamp", path, line),
            caller=row.get("Session ID") or row.get("Model") or "",
            line=line,
        )


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in needed if name not in (rows.fieldnames or [])]
        if missing:
            raise WorkloadError(f"{path}:1: {missing[0]}: column missing; needed: {', '.join(needed)}")
        for row in rows:
            yield rows.line_num, row


def _calendar_s(text: str, path: Path, line: int) -> float:
    whole, dot, rest = text.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    try:  # fractions have seven digits in 2023, more than a datetime takes
        at = datetime.fromisoformat(whole + rest[digits:])
        fraction = float(f"0.{rest[:digits]}") if dot and digits else 0.0
    except ValueError:
        raise WorkloadError(f"{path}:{line}: TIMESTAMP: need a date and time, got {text!r}") from None
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() + fraction
