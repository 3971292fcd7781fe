"""What a request says that matters to the choice of its replica: limits, prompt, length. The server alone judges it.

Reads the ways that docs/limits.md names and that need no settings of the server; what it does not understand counts as not
said, and arrives at the server unchanged all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from choice import DEFAULT_CLASS, Ask, prefix_blocks

HEADERS = re.compile(r"x-(?:sgl-|llm-d-)?slo-(class|ttft-(?:ms|s|us))$")
STATE = re.compile(r"(?:^|,)\s*slo=([^,]*)")
DURATION = re.compile(r"([0-9.]+)(ms|us|s)?$")
UNIT_S = {"ms": 1e-3, "s": 1.0, "us": 1e-6}
OUTPUT_TOKENS = 128  # where a request says no length


def read(rid: str, headers: Mapping[str, str], body: bytes, chars_per_token: float) -> Ask:
    """The request as the choice sees it. Never raises on what clients send."""
    try:
        said = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        said = {}
    said = said if isinstance(said, dict) else {}
    prompt, tokens = _prompt(said)
    slo_class, ttft_s = _limits(said, {name.lower(): value for name, value in headers.items()})
    return Ask(
        rid,
        tokens or int(len(prompt) / chars_per_token) + 1,
        _output_tokens(said),
        slo_class,
        ttft_s,
        prefix_blocks(prompt),
    )


def _prompt(said: dict[str, Any]) -> tuple[str, int]:
    """The text of a prompt; and its tokens, where it is said in tokens (else 0)."""
    ids = said.get("input_ids")
    if isinstance(ids, list) and ids:
        flat = sum(len(one) for one in ids if isinstance(one, list)) or len(ids)
        return json.dumps(ids), flat
    for key in ("messages", "text", "prompt", "input"):
        if key in said:
            value = said[key]
            beside = json.dumps(said["tools"]) if "tools" in said else ""
            return beside + (value if isinstance(value, str) else json.dumps(value)), 0
    return "", 0


def _output_tokens(said: dict[str, Any]) -> int:
    params = said.get("sampling_params")
    for place in (said, params if isinstance(params, dict) else {}):
        for key in ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens"):
            if isinstance(place.get(key), int):
                return int(min(max(place[key], 1), 1_000_000))
    return OUTPUT_TOKENS


def _limits(said: dict[str, Any], headers: dict[str, str]) -> tuple[str, float | None]:
    """Class and TTFT limit in seconds, from the weakest place to the strongest, each field by itself."""
    found: dict[str, Any] = {}
    for objective in ("x-gateway-inference-objective", "x-llm-d-inference-objective"):
        if objective in headers:
            found["class"] = headers[objective]
    state = STATE.search(headers.get("tracestate", ""))
    for member in state[1].split(";") if state else ():
        name, _, value = member.partition(":")
        found[name.strip()] = value
    for name, value in headers.items():
        match = HEADERS.match(name)
        if match:
            field, _, unit = match[1].partition("-")
            bare = field != "class" and value.strip()[-1:].isdigit()
            found[field] = value.strip() + unit if bare else value.strip()
    for place in ("metadata", "custom_labels"):
        labels = said.get(place)
        for name, value in labels.items() if isinstance(labels, dict) else ():
            if name in ("slo_class", "slo_ttft_ms"):
                found[name.split("_")[1]] = value
    for limits in (_params(said).get("slo"), said.get("slo")):
        if isinstance(limits, dict):
            found |= {k.removesuffix("_ms"): v for k, v in limits.items() if k in ("class", "ttft_ms")}
    named = found.get("class")
    return (named if isinstance(named, str) and named else DEFAULT_CLASS), _seconds(found.get("ttft"))


def _params(said: dict[str, Any]) -> dict[str, Any]:
    sampling = said.get("sampling_params")
    for place in (said, sampling if isinstance(sampling, dict) else {}):
        if isinstance(place.get("custom_params"), dict):
            return dict(place["custom_params"])
    return {}


def _seconds(value: Any) -> float | None:
    """A duration, in milliseconds where it says no unit; None: nothing that can be used."""
    match = DURATION.fullmatch(str(value).strip())
    try:
        return float(match[1]) * UNIT_S[match[2] or "ms"] if match else None
    except ValueError:
        return None
