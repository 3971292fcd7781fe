"""Files of finished requests, one JSON object a line, checked: for training and judging offline.

Two kinds of row: `{instruction, output_chars: {model: n}}` (one prompt, the lengths of several models' answers in
characters; n / 4 tokens) and the request log's own, `{output_tokens, text | prompt_tokens, slo_class, ...}`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.features import CHARS_PER_TOKEN, ArrivalFeatures, Rows, encode

NO_LIMIT_TOKENS = 65536  # declared maximum of rows that do not tell
_TEXT_KEYS = ("text", "prompt", "instruction")
_NAMES = {"slo_class": ("slo_class", "class"), "model": ("model", "lora"), "caller": ("caller",)}
_NUMBERS = {
    "prompt_tokens": ("prompt_tokens", "input_tokens"),
    "declared_max": ("declared_max", "declared_max_tokens", "max_new_tokens"),
    "turns": ("turns",),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
}


class DataError(ValueError):
    """A row that cannot be used; the message names file, line and field."""


@dataclass
class Data:
    """Requests and their lengths. `rows` [n], `lengths_tokens` [n], `models` [n] names, `prompt` [n] prompt numbers."""

    rows: Rows
    lengths_tokens: NDArray[np.float64]
    models: NDArray[np.str_]
    prompt: NDArray[np.intp]


def read(path: Path) -> Data:
    """All requests of a JSONL file. Raises DataError (bad row, none at all) or OSError."""
    requests: list[ArrivalFeatures] = []
    lengths: list[float] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                for request, tokens in _requests(_object(line, f"{path}:{number}"), f"{path}:{number}"):
                    requests.append(request)
                    lengths.append(tokens)
    if not requests:
        raise DataError(
            f"{path}: no rows; need JSON lines with instruction and output_chars, or output_tokens"
        )
    models = np.array([r.model for r in requests])
    rows = encode(requests)
    no_text = rows["prompt"] == 0
    rows["prompt"][no_text] = 1 + np.flatnonzero(no_text)  # lengths only: every row is a prompt of its own
    _, prompt = np.unique(rows["prompt"], return_inverse=True)
    return Data(rows, np.array(lengths), models, prompt)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: need a JSON object, got {type(row).__name__}")
    return row


def _requests(row: dict[str, Any], where: str) -> list[tuple[ArrivalFeatures, float]]:
    """The requests of one row with their lengths in tokens."""
    if "output_chars" not in row:
        return [_logged(row, where)]
    text, answers = row.get("instruction"), row["output_chars"]
    if not isinstance(text, str):
        raise DataError(f"{where}: instruction: need text, got {text!r}")
    if not isinstance(answers, dict):
        raise DataError(f"{where}: output_chars: need a mapping of model to characters, got {answers!r}")
    return [
        (
            ArrivalFeatures(NO_LIMIT_TOKENS, text=text, model=str(model)),
            _number(n, f"{where}: output_chars.{model}") / CHARS_PER_TOKEN,
        )
        for model, n in answers.items()
        if n is not None
    ]


def _logged(row: dict[str, Any], where: str) -> tuple[ArrivalFeatures, float]:
    if "output_tokens" not in row:
        raise DataError(f"{where}: need output_chars or output_tokens, got {sorted(row)[:8]}")
    nested = row.get("features")
    row = {**nested, **row} if isinstance(nested, dict) else row
    fields: dict[str, Any] = {"declared_max": NO_LIMIT_TOKENS}
    for name, keys in _NUMBERS.items():
        for key in keys:
            if row.get(key) is not None:
                number = _number(row[key], f"{where}: {key}")
                fields[name] = number if name in ("temperature", "top_p") else int(number)
    for name, keys in _NAMES.items():
        for key in keys:
            if row.get(key) is not None:
                fields[name] = str(row[key])
    text = next((row[k] for k in _TEXT_KEYS if row.get(k) is not None), None)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: text: need text, got {text!r}")
    tokens = _number(row["output_tokens"], f"{where}: output_tokens")
    return ArrivalFeatures(text=text, **fields), tokens


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: need a number of at least 0, got {value!r}")
    return float(value)
