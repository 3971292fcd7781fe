"""Limits said in the JSON body of a request, read from the bytes: SGLang's endpoints drop what they do not know.

Places, strongest first: the field `slo` (an object; a list for a batch of prompts; for Vertex also in each instance);
`metadata.slo_*` and `custom_labels.slo_*`, by the names of headers (`slo_class`, `slo_ttft_ms`), which OpenAI's clients
and SGLang's router let through; `service_tier`, by the map of that name in slo.yaml. `custom_params.slo` is read where SGLang
carries it (door.py), and here for the endpoints where it does not. Most bodies speak of no limit and are not parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from sglang_slo.config import SloConfig
from sglang_slo.server.errors import name, shown
from sglang_slo.server.headers import Gathered
from sglang_slo.server.limits import NOTHING, LimitError, Limits

PREFIX = "slo_"  # of keys in metadata and custom_labels
MOST_LEVELS = 500  # of nested lists and objects, that Python can be sure to work with
LABELS = ("metadata", "custom_labels")


@dataclass(frozen=True)
class Said:
    """What a body says. `own`: its `slo` field as it is, an object or a list for a batch; None: absent."""

    own: Any = None
    params: Any = None  # `custom_params.slo`, which not all of SGLang's endpoints carry to the door
    labels: Limits = NOTHING
    tier: Limits = NOTHING


SILENT = Said()
# A key that begins with `slo` in any case, and an escape, which may spell one. Bodies can be 50 MB of base64: a search
# for a quote or a backslash first takes a quarter of the time of a search for the words, and makes no copy.
_WORD, _ESCAPE = re.compile(rb'"[sS][lL][oO]'), re.compile(rb"\\[u]00")


def read_body(body: bytes, config: SloConfig) -> Said:
    """What a JSON body says about limits; a body that is not a JSON object says nothing. Raises LimitError."""
    # UTF-16 and UTF-32 put zero bytes between letters
    spoken = b"\0" in body[:4] or _WORD.search(body) or _ESCAPE.search(body)
    tiers = bool(config.service_tiers) and b'"service_tier"' in body
    if not spoken and not tiers:
        return SILENT
    request = _parse(body)
    if not isinstance(request, dict):
        return SILENT
    no_other_spelling(request)
    params = request.get("custom_params")
    carried = params.get("slo") if isinstance(params, dict) else None
    return Said(_own(request), carried, _labels(request), _tier(request, config))


def no_other_spelling(request: Mapping[Any, Any], where: str = "") -> None:
    """Raises LimitError for a key `SLO`, which would be dropped."""
    for key in request:
        if isinstance(key, str) and len(key) == 3 and key != "slo" and key.lower() == "slo":
            raise LimitError(where + key, "unknown field; accepted: slo, in lower case")


def _own(request: dict[str, Any]) -> Any:
    own, instances = request.get("slo"), request.get("instances")
    if not isinstance(instances, list):
        return own
    rows = [row.get("slo") if isinstance(row, dict) else None for row in instances]
    if all(row is None for row in rows):
        return own
    if own is not None:
        raise LimitError("slo and instances.slo", "give one")
    return rows


def _labels(request: dict[str, Any]) -> Limits:
    found = Gathered()
    for label in LABELS:
        labels = request.get(label)
        for key, value in labels.items() if isinstance(labels, dict) else ():
            if not key.startswith(PREFIX):
                continue
            where = f"{label}.{name(key)}"
            if isinstance(value, bool):
                value = str(value).lower()
            if not isinstance(value, str | int | float):
                raise LimitError(where, f"need text or a number, got {shown(value)}")
            text = value if isinstance(value, str) else shown(value)
            found.add(key[len(PREFIX) :], text, where)
    return found.limits()


def _tier(request: dict[str, Any], config: SloConfig) -> Limits:
    tier = request.get("service_tier")
    slo_class = config.service_tiers.get(tier) if isinstance(tier, str) else None
    return NOTHING if slo_class is None else Limits({"class": slo_class}, {"class": "service_tier"})


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body, object_pairs_hook=_pairs)
    except LimitError:
        raise
    except RecursionError:
        return _deep(body)
    except ValueError:  # not JSON, or not as we read it: SGLang will say so
        return None


def _deep(body: bytes) -> Any:
    # SGLang's parser goes deeper than Python's, but cannot see that a key came twice.
    try:
        request = orjson.loads(body)
    except ValueError:
        return None
    if isinstance(request, dict) and any(_speaks(key) for key in _keys(request)):
        raise LimitError(
            "slo", f"the body is nested too deeply to read its limits; need at most {MOST_LEVELS} levels"
        )
    return None


def _speaks(key: str) -> bool:
    return key.lower() == "slo" or key.startswith(PREFIX)


def _keys(request: dict[str, Any]) -> Iterator[str]:
    yield from request
    for part in LABELS:
        if isinstance(request.get(part), dict):
            yield from request[part]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; two limits for one thing are a mistake.
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and (key in _ONCE or key.startswith(PREFIX)):
                raise LimitError(name(key), "given twice in one object; give it once")
            seen.add(key)
    return result


_ONCE = {
    "slo",
    "ttft_ms",
    "tbt_ms",
    "tpot_ms",
    "e2e_ms",
    "pace",
    "percentile",
    "max_pause_ms",
    "class",
    "verdict",
    "custom_params",
    "sampling_params",
    "metadata",
    "custom_labels",
    "service_tier",
}
