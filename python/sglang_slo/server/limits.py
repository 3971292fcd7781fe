"""From what a client sent to the limits of its request: headers and the `slo` field, checked and resolved.

Pure and strict: the body beats headers, numbers beat the class, the class beats the server's own numbers; a
`null` limit says "none". Whatever cannot be used raises LimitError naming the field and what is accepted:
nothing is ever replaced by a default in silence. The HTTP side writes the result with `to_wire`; the
scheduler reads it back, or what an offline caller wrote by hand, with `slo_of`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_slo.config import SloConfig
from sglang_slo.core.slo import MAX_LIMIT_MS, Slo, limit_s

# Header name (lower case) to field; several spellings of one field must agree.
HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tbt-ms": "tbt_ms",
    "x-slo-tpot-ms": "tbt_ms",
    "x-slo-class": "class",
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tbt_ms",
}
HEADER_PREFIXES = ("x-slo-", "x-llm-d-slo-")
FIELDS = ("ttft_ms", "tbt_ms", "class")
RESOLVED = "resolved"  # marks what `to_wire` wrote; a client that sends it is told that it is unknown

_DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_A_NUMBER = f"a number of ms above 0 and up to {MAX_LIMIT_MS:g}"


class LimitError(ValueError):
    """A limit that cannot be used. `field`: where it was found; the message names it and what is accepted."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class Limits:
    """What one source asked for: field to value, only the fields given. A limit of None means no limit."""

    given: Mapping[str, Any]
    where: Mapping[str, str]  # field to its name as the client wrote it

    def over(self, other: Limits) -> Limits:
        """These limits, completed by those of a weaker source."""
        return Limits({**other.given, **self.given}, {**other.where, **self.where})


NOTHING = Limits({}, {})


def parse(raw: Any, where: str = "slo") -> Limits:
    """The `slo` field of a body: an object of `ttft_ms`, `tbt_ms` (ms, null), `class`. Raises LimitError."""
    if raw is None:
        return NOTHING
    accepted = f"an object with some of {', '.join(FIELDS)}"
    if not isinstance(raw, Mapping):
        raise LimitError(where, f"need {accepted}, got {_shown(raw)}")
    if not raw:
        raise LimitError(where, f"empty; need {accepted}")
    given: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{where}.{key}"
        if key == "class":
            given[key] = _class_name(value, name)
        elif key in FIELDS:
            given[key] = None if value is None else _number(value, name)
        else:
            raise LimitError(name, f"unknown field; accepted: {', '.join(FIELDS)}")
    return Limits(given, {key: f"{where}.{key}" for key in given})


def parse_headers(headers: Iterable[tuple[str, str]]) -> Limits:
    """The limits among (name, value) pairs of a request's headers. Raises LimitError.

    Names are not case-sensitive. One limit may come in several spellings if they agree.
    """
    given: dict[str, Any] = {}
    where: dict[str, str] = {}
    for name, text in headers:
        name = name.lower()
        if not name.startswith(HEADER_PREFIXES):
            continue
        field = HEADERS.get(name)
        if field is None:
            raise LimitError(name, f"unknown header; accepted: {', '.join(HEADERS)}")
        value = _class_name(text.strip(), name) if field == "class" else _decimal(text.strip(), name)
        if field in given and given[field] != value:
            both = f"{where[field]} and {name}" if where[field] != name else f"{name}, given twice"
            raise LimitError(both, f"at odds ({given[field]} and {value}); give one, or the same in both")
        given[field], where[field] = value, name
    return Limits(given, where)


def resolve(limits: Limits, config: SloConfig) -> Slo:
    """The limits of a request that asked for `limits` of a server with `config`. Raises LimitError.

    A class stands for both of its limits; the server's default numbers apply only where no class does.
    """
    given = limits.given
    numbers = [field for field in ("ttft_ms", "tbt_ms") if field in given]
    if config.classes_only and numbers:
        raise LimitError(limits.where[numbers[0]], f"this server accepts classes only: {_classes(config)}")
    name = given.get("class", config.default_class)
    if name is not None and name not in config.classes:
        raise LimitError(limits.where["class"], f"unknown class {_shown(name)}; accepted: {_classes(config)}")
    base = config.classes[name] if name is not None else config
    ttft_ms = _floor(given.get("ttft_ms", base.ttft_ms), config.min_ttft_ms)
    tbt_ms = _floor(given.get("tbt_ms", base.tbt_ms), config.min_tbt_ms)
    return Slo(limit_s(ttft_ms), limit_s(tbt_ms), name or "default")


def to_wire(slo: Slo, received_s: float) -> dict[str, Any]:
    """The form in which limits travel in `sampling_params.custom_params["slo"]`: ms, None for no limit.

    `received_s`: when the request reached the server, on the machine's monotone clock.
    """
    return {
        "ttft_ms": _wire_ms(slo.ttft_s),
        "tbt_ms": _wire_ms(slo.tbt_s),
        "class": slo.slo_class,
        "received_s": received_s,
        RESOLVED: True,
    }


def slo_of(custom_params: Any, config: SloConfig) -> Slo:
    """The limits in a request's `custom_params`, a dict or None. Raises LimitError.

    Takes what `to_wire` wrote as it is; anything else is an offline caller's, checked and resolved here.
    """
    raw = custom_params.get("slo") if isinstance(custom_params, Mapping) else None
    if isinstance(raw, Mapping) and raw.get(RESOLVED) is True:
        return Slo(limit_s(raw["ttft_ms"]), limit_s(raw["tbt_ms"]), raw["class"])
    return resolve(parse(raw, "custom_params.slo"), config)


def received_s(custom_params: Any) -> float | None:
    """When a request reached the server, s on the monotone clock, if the HTTP side has noted it."""
    raw = custom_params.get("slo") if isinstance(custom_params, Mapping) else None
    return raw["received_s"] if isinstance(raw, Mapping) and raw.get(RESOLVED) is True else None


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LimitError(where, f"need {_A_NUMBER}, got {_shown(value)}")
    if not 0 < value <= MAX_LIMIT_MS:  # false for NaN too
        raise LimitError(where, f"need {_A_NUMBER}, got {_shown(value)}")
    return float(value)


def _decimal(text: str, where: str) -> float:
    if not _DECIMAL.fullmatch(text):  # float() alone would take "nan", "1_000" and other digits than ours
        raise LimitError(where, f"need {_A_NUMBER}, got {_shown(text)}")
    return _number(float(text), where)


def _class_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise LimitError(where, f"need the name of a class, got {_shown(value)}")
    return value


def _classes(config: SloConfig) -> str:
    return ", ".join(sorted(config.classes)) or "none (this server declares no classes)"


def _floor(limit_ms: float | None, least_ms: float) -> float | None:
    return None if limit_ms is None else max(limit_ms, least_ms)


def _wire_ms(limit: float) -> float | None:
    return None if math.isinf(limit) else round(limit * 1e3, 9)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
