"""From what a client said to the limits of its request: checked, completed and put into the form that is trusted.

Pure and strict. Whatever cannot be used raises LimitError naming the field and what is accepted; nothing is
ever replaced by a default in silence. `parse` reads the `slo` object of a body; headers.py and body.py read the
other places; `resolve` completes what was said from the class, then from the server's defaults. A `null` limit
says "none". Numbers without a class are class `custom`, numbers beside a class keep the class's name.

Between HTTP server and scheduler limits travel as a `WireSlo` in `custom_params["slo"]`, which no JSON can
make (wire.py carries it); anything else found there is a client's text and is read as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_slo.classes import A_NUMBER, NUMBERS_MS, PERCENTILE, contradiction, is_limit
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import CUSTOM_CLASS, DEFAULT_CLASS, LIMITS_MS, Slo, SloClass
from sglang_slo.server.errors import FieldError, name, shown

FIELDS = (*LIMITS_MS, "pace", "percentile", "max_pause_ms", "class", "verdict")
NO_NUMBERS = ("class", "verdict")  # a class says its own numbers; whether to tell the verdict is no limit


class LimitError(FieldError):
    """A limit that cannot be used. `field`: where it was found; the message names it and what is accepted."""


@dataclass(frozen=True)
class Limits:
    """What one source asked for: field to value, only the fields given. A limit of None means no limit."""

    given: Mapping[str, Any]
    where: Mapping[str, str]  # field to its name as the client wrote it

    def over(self, other: Limits) -> Limits:
        """These limits, completed by those of a weaker source."""
        if not other.given:
            return self
        return Limits({**other.given, **self.given}, {**other.where, **self.where})


NOTHING = Limits({}, {})


@dataclass(frozen=True)
class WireSlo:
    """What only the server may say. `received_s`: arrival, on the machine's monotone clock."""

    slo: Slo
    received_s: float


class Limited(dict[str, Any]):
    """Sampling parameters with trusted limits in them. `before`: as the client sent them.

    SGLang's exporters write a request's parameters as JSON, once they have been tokenized: then those are right.
    """

    def __init__(self, params: Mapping[str, Any], before: dict[str, Any]) -> None:
        super().__init__(params)
        self.before = before


def parse(raw: Any, where: str = "slo") -> Limits:
    """The `slo` object of a body, with some of `FIELDS`. Raises LimitError."""
    if raw is None:
        return NOTHING
    accepted = f"an object with some of {', '.join(FIELDS)}"
    if not isinstance(raw, Mapping):
        raise LimitError(where, f"need {accepted}, got {shown(raw)}")
    if not raw:
        raise LimitError(where, f"empty; need {accepted}")
    given = {key: _value(key, value, f"{where}.{name(key)}") for key, value in raw.items()}
    return Limits(given, {key: f"{where}.{key}" for key in given})


def number(value: Any, where: str) -> float:
    """A limit in ms. Raises LimitError."""
    if not is_limit(value):
        raise LimitError(where, f"need {A_NUMBER}, got {shown(value)}")
    return float(value)


def class_name(value: Any, where: str) -> str:
    """The name of a class, declared or not. Raises LimitError."""
    if not isinstance(value, str) or not value:
        raise LimitError(where, f"need the name of a class, got {shown(value)}")
    return value


def _value(key: Any, value: Any, where: str) -> Any:
    if key == "class":
        return class_name(value, where)
    if key in NUMBERS_MS:
        return None if value is None else number(value, where)
    if key in ("pace", "verdict"):
        if not isinstance(value, bool):
            raise LimitError(where, f"need true or false, got {shown(value)}")
        return value
    if key == "percentile":
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != PERCENTILE:
            raise LimitError(where, f"need {PERCENTILE}, got {shown(value)}")
        return PERCENTILE
    raise LimitError(where, f"unknown field; accepted: {', '.join(FIELDS)}")


def resolve(limits: Limits, config: SloConfig) -> Slo:
    """The limits of a request that asked for `limits` of a server with `config`. Raises LimitError.

    What was not asked for comes from the class named, else from the server's default class or numbers.
    """
    given = limits.given
    own = [field for field in given if field not in NO_NUMBERS]
    if config.classes_only and own:
        raise LimitError(limits.where[own[0]], f"this server accepts classes only: {_classes(config)}")
    label = given.get("class")
    if label is not None and label not in config.classes:
        raise LimitError(limits.where["class"], f"unknown class {shown(label)}; accepted: {_classes(config)}")
    base_name = label or config.default_class
    base = config.default_limits() if base_name is None else config.classes[base_name]
    asked = _over(base, given)
    problem = contradiction(asked)
    if problem is not None:
        field, text = problem
        raise LimitError(limits.where.get(field, field), text)
    if label is None:
        label = CUSTOM_CLASS if own else base_name or DEFAULT_CLASS
    return _floored(asked, config).slo(label)


def _over(base: SloClass, given: Mapping[str, Any]) -> SloClass:
    """`base` with the fields given. Its rule for gaps yields to a rule that was given, and where its gap limit does."""
    fields = {
        field: given[field] for field in (*LIMITS_MS, "pace", "percentile", "max_pause_ms") if field in given
    }
    asked = dataclasses.replace(base, **fields)
    drop: dict[str, Any] = {}
    if "pace" not in given and (given.get("percentile") is not None or asked.tbt_ms is None):
        drop["pace"] = False
    if "percentile" not in given and (given.get("pace") or asked.tbt_ms is None):
        drop["percentile"] = None
    asked = dataclasses.replace(asked, **drop)
    if "max_pause_ms" not in given and contradiction(asked) is not None:
        field, _ = contradiction(asked) or ("", "")
        asked = dataclasses.replace(asked, max_pause_ms=None) if field == "max_pause_ms" else asked
    return asked


def _floored(limits: SloClass, config: SloConfig) -> SloClass:
    tbt_ms = _floor(limits.tbt_ms, config.min_tbt_ms)
    return dataclasses.replace(
        limits,
        ttft_ms=_floor(limits.ttft_ms, config.min_ttft_ms),
        e2e_ms=_floor(limits.e2e_ms, config.min_ttft_ms),
        tbt_ms=tbt_ms,
        tpot_ms=_floor(limits.tpot_ms, config.min_tbt_ms),
        max_pause_ms=_floor(limits.max_pause_ms, tbt_ms or 0.0),
    )


def to_wire(slo: Slo, received_s: float) -> WireSlo:
    """The trusted form of limits. `received_s`: when the request reached the server, s on the monotone clock."""
    return WireSlo(slo, received_s)


def slo_of(custom_params: Any, config: SloConfig) -> Slo:
    """The limits in a request's `custom_params`, a dict or None. Raises LimitError and nothing else.

    Takes what `to_wire` made as it is; anything else is a client's text, whatever it claims to be.
    """
    raw = custom_params.get("slo") if isinstance(custom_params, Mapping) else None
    if isinstance(raw, WireSlo):
        return raw.slo
    return resolve(parse(raw, "custom_params.slo"), config)


def received_s(custom_params: Any) -> float | None:
    """When a request reached the server, s on the monotone clock, if the server has noted it."""
    raw = custom_params.get("slo") if isinstance(custom_params, Mapping) else None
    return raw.received_s if isinstance(raw, WireSlo) else None


def first_of(sources: Iterator[Limits]) -> Limits:
    """Sources in order of strength, made one: field by field the strongest that says something."""
    result = NOTHING
    for source in sources:
        result = result.over(source)
    return result


def _classes(config: SloConfig) -> str:
    return ", ".join(sorted(config.classes)) or "none (this server declares no classes)"


def _floor(limit_ms: float | None, least_ms: float) -> float | None:
    return None if limit_ms is None else max(limit_ms, least_ms)
