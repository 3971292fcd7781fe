"""Traces with a JSON object a line: Mooncake's, aiperf's records, alpaca_eval's lengths, and our own request log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.observe.judge import RULE_NAMES
from sglang_slo.twin.workloads.rows import Row, number, tokens, tokens_of
from sglang_slo.twin.workloads.streams import BLOCK_TOKENS, WorkloadError


def mooncake(path: Path) -> Iterator[Row]:
    """timestamp (ms), input_length, output_length, hash_ids: blocks of 512 tokens that prompts share."""
    for line, row in objects(path):
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or not all(isinstance(h, int) for h in ids):
            raise WorkloadError(f"{path}:{line}: hash_ids: need a list of whole numbers, got {ids!r}")
        inputs = tokens(row.get("input_length"), "input_length", path, line)
        if len(ids) < math.ceil(inputs / BLOCK_TOKENS):
            raise WorkloadError(f"{path}:{line}: hash_ids: too few blocks for input_length {inputs}")
        yield Row(
            inputs,
            tokens(row.get("output_length"), "output_length", path, line),
            number(row.get("timestamp"), "timestamp", path, line) / 1e3,
            blocks=tuple(ids),
            line=line,
        )


def aiperf(path: Path) -> Iterator[Row]:
    """aiperf's `profile_export.jsonl`: finished requests of the phase that was profiled; a conversation is a caller."""
    first: float | None = None
    for line, row in objects(path):
        about, metrics = _object(row, "metadata", path, line), _object(row, "metrics", path, line)
        if row.get("error") or about.get("was_cancelled") or about.get("benchmark_phase") == "warmup":
            continue
        at = number(about.get("request_start_ns"), "metadata.request_start_ns", path, line) / 1e9
        first = at if first is None else min(first, at)
        inputs, outputs = (
            tokens(_object(metrics, name, path, line).get("value"), f"metrics.{name}.value", path, line)
            for name in ("input_sequence_length", "output_sequence_length")
        )
        yield Row(inputs, outputs, at, caller=str(about.get("conversation_id") or ""), line=line)


def request_log(path: Path) -> Iterator[Row]:
    """What a server writes with `--slo-request-log`: classes and limits as they were declared."""
    for line, row in objects(path):
        if not row.get("output_tokens") or not row.get("prompt_tokens"):
            continue  # shed, or gone before its first token: how long it would have been is not known
        features: dict[str, Any] = row["features"] if isinstance(row.get("features"), dict) else {}
        declared = features.get("declared_max")
        text = row.get("text")
        yield Row(
            tokens(row["prompt_tokens"], "prompt_tokens", path, line),
            tokens(row["output_tokens"], "output_tokens", path, line),
            number(row.get("arrival_s"), "arrival_s", path, line),
            str(row.get("class") or "default"),
            str(features.get("caller") or ""),
            text if isinstance(text, str) else None,
            tokens(declared, "features.declared_max", path, line) if declared is not None else None,
            _limits(row, path, line),
            line=line,
        )


def alpaca_eval(path: Path) -> Iterator[Row]:
    """instruction, and the length in characters of each model's answer: every pair is a request, the model its caller."""
    for line, row in objects(path):
        text = row.get("instruction")
        if not isinstance(text, str) or not text:
            raise WorkloadError(f"{path}:{line}: instruction: need text, got {text!r}")
        for model, characters in _object(row, "output_chars", path, line).items():
            length = number(characters, f"output_chars.{model}", path, line)
            yield Row(tokens_of(len(text)), tokens_of(int(length)), caller=model, text=text, line=line)


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects with their lines. Raises WorkloadError."""
    with path.open() as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise WorkloadError(f"{path}:{line}: need JSON: {error}") from error
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}:{line}: need a JSON object, got {text.strip()[:60]!r}")
            yield line, row


def _object(row: dict[str, Any], name: str, path: Path, line: int) -> dict[str, Any]:
    value = row.get(name)
    if not isinstance(value, dict):
        raise WorkloadError(f"{path}:{line}: {name}: need an object, got {value!r}")
    return value


def _limits(row: dict[str, Any], path: Path, line: int) -> Slo:
    def limit(name: str) -> float:
        value = row.get(name)
        return math.inf if value is None else number(value, name, path, line)

    rules = {name: rule for rule, name in RULE_NAMES.items()}
    rule = row.get("rule", RULE_NAMES[GapRule.EVERY])
    if not isinstance(rule, str) or rule not in rules:
        raise WorkloadError(f"{path}:{line}: rule: need one of {', '.join(rules)}, got {rule!r}")
    return Slo(
        limit("ttft_limit_s"),
        limit("tbt_limit_s"),
        str(row.get("class") or "default"),
        limit("tpot_limit_s"),
        limit("e2e_limit_s"),
        rules[rule],
        limit("max_pause_limit_s"),
        int(number(row.get("importance", 0), "importance", path, line, low=-math.inf, whole=True)),
    )
