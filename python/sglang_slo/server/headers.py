"""Limits said in headers, or in the words that headers use: names with units, values as text.

`x-slo-`, `x-sgl-slo-` and `x-llm-d-slo-` begin the same names; several spellings of one limit must agree:

    ttft-ms tbt-ms tpot-ms e2e-ms max-pause-ms   a number; `-s` and `-us` for `-ms`; or a duration: 2500ms, 2.5s, 300us
    pace  percentile  class  verdict             true or false; 99; the name of a class; true or false

`tpot` is the mean time per output token, as everywhere in the field. A gateway that counts a limit down sends
`ttft-ms: 0` (or e2e) once it is overdue: the smallest limit, then, which is judged as missed.

`tracestate` survives most proxies: its member `slo` holds `class:chat;ttft:500;tbt:40ms` (ms where no unit is
said; also tpot, e2e, max-pause, pace, percentile). Inference objectives (`x-llm-d-`, `x-gateway-inference-objective`)
name a class by the map `objectives` of slo.yaml, else a class of the same name; others are not for us.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sglang_slo.classes import A_NUMBER, NUMBERS_MS, PERCENTILE
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import MIN_LIMIT_MS
from sglang_slo.server.errors import name as named
from sglang_slo.server.errors import shown
from sglang_slo.server.limits import NOTHING, LimitError, Limits, class_name, number

PREFIXES = ("x-slo-", "x-sgl-slo-", "x-llm-d-slo-")
OBJECTIVES = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
UNITS_MS = {"ms": 1.0, "s": 1e3, "us": 1e-3}
MEMBER = "slo"  # of tracestate

_STEMS = {field.removesuffix("_ms"): field for field in NUMBERS_MS}
_MAY_BE_OVERDUE = ("ttft_ms", "e2e_ms")
_DECIMAL = re.compile(r"([0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,3})?)(ms|us|s)?", re.ASCII)
_TRUE, _FALSE = ("true", "1"), ("false", "0")
_ACCEPTED = "ttft, tbt, tpot, e2e or max-pause with -ms, -s or -us; pace, percentile, class, verdict"


class Gathered:
    """Fields given by name and text, one after the other; a field may come twice if both agree."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.where: dict[str, str] = {}

    def add(self, key: str, text: str, where: str, unit: str | None = None) -> None:
        """The field `key` (`ttft-ms`, `ttft_s`, `class`; a bare `ttft` if `unit` says its unit). Raises LimitError."""
        field, value = _read(key.replace("-", "_"), text.strip(), where, unit)
        if field in self.given and self.given[field] != value:
            before = self.where[field]
            both = f"{before} and {where}" if before != where else f"{where}, given twice"
            raise LimitError(
                both,
                f"at odds ({shown(self.given[field])} and {shown(value)}); give one, or the same in both",
            )
        self.given[field], self.where[field] = value, where

    def limits(self) -> Limits:
        """What was gathered."""
        return Limits(self.given, self.where) if self.given else NOTHING


def parse_headers(headers: Iterable[tuple[str, str]]) -> Limits:
    """The limits among (name, value) pairs of a request's headers, by our own names. Raises LimitError."""
    found = Gathered()
    for name, text in headers:
        name = name.lower().replace("_", "-")  # as some clients' keyword arguments come out
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            found.add(name[len(prefix) :], text, named(name))
    return found.limits()


def parse_tracestate(headers: Iterable[tuple[str, str]]) -> Limits:
    """The limits in the member `slo` of `tracestate`. Raises LimitError."""
    found = Gathered()
    for name, text in headers:
        if name.lower() != "tracestate":
            continue
        for member in text.split(","):
            key, _, value = member.strip().partition("=")
            if key.strip() != MEMBER:
                continue
            for part in filter(None, (p.strip() for p in value.split(";"))):
                field, colon, said = part.partition(":")
                where = f"tracestate {MEMBER}.{named(field)}"
                if not colon:
                    raise LimitError(where, "need name:value, as in slo=class:chat;ttft:500")
                found.add(field, said, where, unit="ms")
    return found.limits()


def parse_objective(headers: Iterable[tuple[str, str]], config: SloConfig) -> Limits:
    """The class that an inference objective stands for on this server, if any."""
    for name, text in headers:
        if name.lower() in OBJECTIVES:
            slo_class = config.objectives.get(text.strip(), text.strip())
            if slo_class in config.classes:
                return Limits({"class": slo_class}, {"class": name.lower()})
    return NOTHING


def _read(key: str, text: str, where: str, unit: str | None) -> tuple[str, Any]:
    if key == "class":
        return key, class_name(text, where)
    if key in ("pace", "verdict"):
        if text.lower() not in _TRUE + _FALSE:
            raise LimitError(where, f"need true or false, got {shown(text)}")
        return key, text.lower() in _TRUE
    if key == "percentile":
        if text != str(PERCENTILE):
            raise LimitError(where, f"need {PERCENTILE}, got {shown(text)}")
        return key, PERCENTILE
    stem, _, suffix = key.rpartition("_")
    if stem in _STEMS and suffix in UNITS_MS:
        return _STEMS[stem], _duration_ms(text, suffix, _STEMS[stem], where)
    if unit is not None and key in _STEMS:
        return _STEMS[key], _duration_ms(text, unit, _STEMS[key], where)
    raise LimitError(where, f"unknown; accepted: {_ACCEPTED}")


def _duration_ms(text: str, unit: str, field: str, where: str) -> float:
    match = _DECIMAL.fullmatch(text)  # float() alone would take "nan", "1_000" and other digits than ours
    if match is None:
        raise LimitError(where, f"need {A_NUMBER}, or a duration such as 2500ms or 2.5s; got {shown(text)}")
    value_ms = float(match[1]) * UNITS_MS[match[2] or unit]
    if value_ms == 0 and field in _MAY_BE_OVERDUE and float(match[1]) == 0:
        return MIN_LIMIT_MS
    try:
        return number(value_ms, where)
    except LimitError:
        raise LimitError(where, f"need {A_NUMBER}, got {shown(text)}") from None
