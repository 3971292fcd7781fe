"""The body that SGLang is to see: limits from headers and from the `slo` field, written into `custom_params`.

Pure: bytes in, bytes out. A request without limits comes back as the very same object, unparsed where
possible.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.server.limits import LimitError, Limits, parse, resolve, to_wire


def rewrite(body: bytes, headers: Limits, native: bool, config: SloConfig) -> bytes:
    """The body that SGLang is to see. Returns the same object if there is nothing to say. Raises LimitError.

    `native`: /generate, where limits travel in `sampling_params.custom_params`; else OpenAI's form, where
    `custom_params` lies at the top. A body that is not a JSON object is left for SGLang to refuse.
    """
    lower = body.lower()
    # Most requests bring no limit: look for the word before parsing (or for an escape that might spell it).
    spoken = b"slo" in lower or b"\\u00" in lower
    if not spoken and not headers.given:
        return body
    try:
        request = json.loads(body, object_pairs_hook=_pairs) if spoken else orjson.loads(body)
    except LimitError:
        raise
    except (ValueError, RecursionError):  # not JSON
        return body
    if not isinstance(request, dict):
        return body
    _no_other_spelling(request)
    changed = _native(request, headers, config) if native else _openai(request, headers, config)
    return _dump(request, lower) if changed else body


def _openai(request: dict[str, Any], headers: Limits, config: SloConfig) -> bool:
    own = request.pop("slo", None)
    custom = request.get("custom_params")
    limits = _one(own, _inside(custom, "custom_params"), "slo", "custom_params").over(headers)
    if not limits.given:
        return False
    request["custom_params"] = {**(custom or {}), "slo": to_wire(resolve(limits, config), clock.now())}
    return True


def _native(request: dict[str, Any], headers: Limits, config: SloConfig) -> bool:
    own = request.pop("slo", None)
    params = request.get("sampling_params")
    size = _batch_size(request)
    if isinstance(own, list):
        if size is None:
            raise LimitError("slo", "a list is accepted for a batch only; need one object")
        if len(own) != size:
            raise LimitError("slo", f"need one object, or a list of {size} for this batch, got {len(own)}")
    if isinstance(params, list) and (size is None or len(params) != size):
        if own is not None or headers.given:
            raise LimitError("sampling_params", f"need one object, or a list of {size or 1}")
        return False
    if not isinstance(own, list) and not isinstance(params, list):
        resolved, changed = _sampling(params, own, headers, config, "slo", "sampling_params")
        request["sampling_params"] = resolved
        return changed
    assert size is not None
    rows = [
        _sampling(
            params[i] if isinstance(params, list) else params,
            own[i] if isinstance(own, list) else own,
            headers,
            config,
            f"slo[{i}]" if isinstance(own, list) else "slo",
            f"sampling_params[{i}]" if isinstance(params, list) else "sampling_params",
        )
        for i in range(size)
    ]
    request["sampling_params"] = [row[0] for row in rows]
    return any(row[1] for row in rows)


def _sampling(
    params: Any, own: Any, headers: Limits, config: SloConfig, own_name: str, params_name: str
) -> tuple[Any, bool]:
    # The sampling parameters of one request with its limits in them, and whether there were any.
    if params is not None and not isinstance(params, dict):
        if own is not None or headers.given:
            raise LimitError(params_name, "need an object")
        return params, False
    custom = (params or {}).get("custom_params")
    custom_name = f"{params_name}.custom_params"
    limits = _one(own, _inside(custom, custom_name), own_name, custom_name).over(headers)
    if not limits.given:
        return params, False
    custom = {**(custom or {}), "slo": to_wire(resolve(limits, config), clock.now())}
    return {**(params or {}), "custom_params": custom}, True


def _one(own: Any, inner: Any, own_name: str, custom_name: str) -> Limits:
    # The body has two places for limits; both may be used only if they say the same.
    a, b = parse(own, own_name), parse(inner, f"{custom_name}.slo")
    if own is not None and inner is not None and a.given != b.given:
        raise LimitError(f"{own_name} and {custom_name}.slo", "at odds; give one, or the same in both")
    return a if a.given else b


def _inside(custom: Any, name: str) -> Any:
    if custom is None:
        return None
    if not isinstance(custom, dict):
        raise LimitError(name, "need an object")
    _no_other_spelling(custom, f"{name}.")
    return custom.get("slo")


def _no_other_spelling(request: dict[str, Any], where: str = "") -> None:
    for key in request:
        if key != "slo" and key.lower() == "slo":
            raise LimitError(where + key, "unknown field; accepted: slo, in lower case")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; two limits for one thing are a mistake.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        for key in ("slo", "ttft_ms", "tbt_ms", "class", "custom_params", "sampling_params"):
            if keys.count(key) > 1:
                raise LimitError(key, "given twice in one object; give it once")
    return result


def _batch_size(request: dict[str, Any]) -> int | None:
    # As SGLang decides it: a list of prompts, or a list of lists of token ids. None: a single request.
    text, ids, embeds = request.get("text"), request.get("input_ids"), request.get("input_embeds")
    if text is not None:
        return len(text) if isinstance(text, list) else None
    if ids is not None:
        return len(ids) if isinstance(ids, list) and ids and isinstance(ids[0], list) else None
    if isinstance(embeds, list) and embeds and isinstance(embeds[0], list) and embeds[0]:
        return len(embeds) if isinstance(embeds[0][0], list) else None
    return None


def _dump(request: dict[str, Any], lower: bytes) -> bytes:
    if b"nan" in lower or b"infinity" in lower:  # orjson would write null for them, json keeps what was sent
        return json.dumps(request).encode()
    try:
        return orjson.dumps(request)
    except TypeError:  # integers beyond 64 bits and lone surrogates, which JSON allows
        return json.dumps(request).encode()
