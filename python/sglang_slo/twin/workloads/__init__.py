"""Traces of the field without writing code: told apart by what is in them, or named.

    csv             arrival_s, input_tokens, output_tokens; class and caller if there (without arrival_s: lengths)
    azure           Azure's LLM inference traces of 2023 and 2024
    burstgpt        BurstGPT
    mooncake        Mooncake's, with the prefix blocks that prompts share
    sharegpt        conversations: lengths and prompts, no times
    alpaca_eval     instructions and the lengths of several models' answers: no times
    bench_serving   what `sglang.bench_serving --output-details` writes
    aiperf          its profile_export.jsonl
    guidellm        its benchmarks.json
    request_log     what our own server writes with --slo-request-log

Mooncake's times are rounded down to bins of three seconds; arrivals are spread over their bin by the seed.

May import core and devices. Always: a fault names file, line and field, and the same seed gives the same requests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sglang_slo.twin.workloads import documents, lines, tables
from sglang_slo.twin.workloads.rows import stream_of
from sglang_slo.twin.workloads.streams import Stream, WorkloadError

FORMATS = (
    "csv",
    "azure",
    "burstgpt",
    "mooncake",
    "sharegpt",
    "alpaca_eval",
    "bench_serving",
    "aiperf",
    "guidellm",
    "request_log",
)
MOONCAKE_BIN_S = 3.0
# Keys that tell the objects of one format from those of all others.
_KEYS = {
    "mooncake": ("hash_ids",),
    "bench_serving": ("input_lens", "output_lens"),
    "aiperf": ("metadata", "metrics"),
    "request_log": ("prompt_tokens", "output_tokens", "arrival_s"),
    "alpaca_eval": ("instruction", "output_chars"),
    "guidellm": ("benchmarks",),
}


def read(path: Path, rng: np.random.Generator, form: str | None = None) -> Stream:
    """A trace or lengths, of the named format or of the one that its content shows.

    Raises WorkloadError naming file, line and field.
    """
    form = form or detect(path)
    if form == "mooncake":
        return _spread(stream_of(lines.mooncake(path), path), rng)
    if form == "bench_serving":
        return stream_of(documents.bench_serving(path, rng), path)
    readers: dict[str, Any] = {
        "csv": tables.plain,
        "azure": tables.azure,
        "burstgpt": tables.burstgpt,
        "sharegpt": documents.sharegpt,
        "alpaca_eval": lines.alpaca_eval,
        "aiperf": lines.aiperf,
        "guidellm": documents.guidellm,
        "request_log": lines.request_log,
    }
    if form not in readers:
        raise WorkloadError(f"{path}: format: need one of {', '.join(FORMATS)}, got {form!r}")
    return stream_of(readers[form](path), path, in_order=form == "csv")


def detect(path: Path) -> str:
    """The format that the content shows. Raises WorkloadError naming the file and what is accepted."""
    try:
        with path.open() as file:
            head = file.readline()
            while head and not head.strip():
                head = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    if head.lstrip().startswith("["):
        return "sharegpt"
    if head.lstrip().startswith("{"):
        return _detect_object(path, head)
    columns = {name.strip() for name in head.split(",")}
    for form, needed in (("azure", tables.AZURE), ("burstgpt", tables.BURSTGPT)):
        if set(needed) <= columns:
            return form
    return "csv"


def _detect_object(path: Path, head: str) -> str:
    try:
        row = json.loads(head)
    except ValueError:  # one document over many lines
        row = documents.document(path)
    for form, keys in _KEYS.items():
        if isinstance(row, dict) and all(key in row for key in keys):
            return form
    known = "; ".join(f"{form}: {', '.join(keys)}" for form, keys in _KEYS.items())
    raise WorkloadError(f"{path}:1: JSON of no format that is known by its fields ({known})")


def _spread(stream: Stream, rng: np.random.Generator) -> Stream:
    """Arrivals anywhere within their bin."""
    from dataclasses import replace

    at = stream.arrival_s + rng.random(len(stream.arrival_s)) * MOONCAKE_BIN_S
    whole = replace(stream, arrival_s=at, end_s=float(stream.arrival_s[-1]) + MOONCAKE_BIN_S)
    return whole.pick(np.argsort(at, kind="stable"))
