"""Files that are one JSON document: ShareGPT's conversations, guidellm's benchmarks, bench_serving's details."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_slo.twin.workloads.lines import objects
from sglang_slo.twin.workloads.rows import Row, number, tokens, tokens_of
from sglang_slo.twin.workloads.streams import WorkloadError

ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bard", "bing")


def sharegpt(path: Path) -> Iterator[Row]:
    """The first question and answer of each conversation, as SGLang's own benchmark takes it; about 4 characters a token."""
    for place, item in enumerate(_list(document(path), "the document", path)):
        turns = item.get("conversations", item.get("conversation")) if isinstance(item, dict) else None
        if not isinstance(turns, list):
            raise WorkloadError(f"{path}: [{place}].conversations: need a list, got {turns!r}")
        texts = [_turn(t, f"[{place}].conversations[{i}]", path) for i, t in enumerate(turns[:2])]
        if len(texts) == 2 and all(texts):
            yield Row(tokens_of(len(texts[0])), tokens_of(len(texts[1])), text=texts[0], line=place + 1)


def _turn(turn: Any, where: str, path: Path) -> str:
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if not isinstance(text, str):
        raise WorkloadError(f"{path}: {where}.value: need text, got {text!r}")
    return text


def guidellm(path: Path) -> Iterator[Row]:
    """guidellm's benchmarks.json: the finished requests of its first benchmark (each is another load)."""
    benchmarks = _list(document(path).get("benchmarks"), "benchmarks", path)
    requests = benchmarks[0].get("requests") if benchmarks and isinstance(benchmarks[0], dict) else None
    done = requests.get("successful") if isinstance(requests, dict) else requests
    for i, row in enumerate(_list(done, "benchmarks[0].requests.successful", path)):
        where = f"benchmarks[0].requests.successful[{i}]"
        if not isinstance(row, dict):
            raise WorkloadError(f"{path}: {where}: need an object, got {row!r}")
        yield Row(
            tokens(row.get("prompt_tokens"), f"{where}.prompt_tokens", path, 1),
            tokens(row.get("output_tokens"), f"{where}.output_tokens", path, 1),
            number(_started(row), f"{where}.request_start_time", path, 1),
            line=i + 1,
        )


def _started(row: dict[str, Any]) -> Any:
    for name in ("request_start_time", "start_time"):
        if row.get(name) is not None:
            return row[name]
    info = row.get("info") or row.get("scheduler_info") or {}
    timings = info.get("timings") or info.get("request_timings") or {}
    return timings.get("request_start")


def bench_serving(path: Path, rng: np.random.Generator) -> Iterator[Row]:
    """The last result of `sglang.bench_serving --output-details`: lengths as they were, arrivals drawn at its rate.

    It keeps no times of arrival. At an infinite rate all came at once.
    """
    results = list(objects(path))
    if not results:
        return
    line, result = results[-1]
    inputs, outputs = result.get("input_lens"), result.get("output_lens")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise WorkloadError(
            f"{path}:{line}: input_lens, output_lens: need two lists of one length (--output-details)"
        )
    rate = result.get("request_rate", math.inf)
    gap = (
        0.0
        if rate in (math.inf, "inf", "trace", None)
        else 1 / number(rate, "request_rate", path, line, 1e-9)
    )
    arrivals = np.cumsum(rng.exponential(1.0, len(inputs))) * gap
    for i, (length, out) in enumerate(zip(inputs, outputs, strict=True)):
        if out:  # 0: failed
            yield Row(
                tokens(length, f"input_lens[{i}]", path, line),
                tokens(out, f"output_lens[{i}]", path, line),
                float(arrivals[i]),
                line=line,
            )


def document(path: Path) -> Any:
    """The whole file as JSON. Raises WorkloadError."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise WorkloadError(f"{path}: need JSON: {error}") from error


def _list(value: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise WorkloadError(f"{path}: {name}: need a list, got {type(value).__name__}")
    return value
