"""Classes of `slo.yaml`: named limits, read strictly, and what makes limits contradict each other.

The same rules hold for a class in the file, for the server's default numbers and for what a request asks for
(server/limits.py): a pace or a percentile needs the gap limit that it is about, one request has one rule, and
a pause cannot be shorter than the gap limit that it is an exception to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sglang_slo.core.slo import CUSTOM_CLASS, LIMITS_MS, MAX_LIMIT_MS, MIN_LIMIT_MS, SloClass

NUMBERS_MS = (*LIMITS_MS, "max_pause_ms")
CLASS_FIELDS = tuple(f.name for f in dataclasses.fields(SloClass))
PERCENTILE = 99
MAX_IMPORTANCE = 1_000_000
A_NUMBER = f"a number of ms from {MIN_LIMIT_MS:g} to {MAX_LIMIT_MS:g}"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field and what is accepted."""


def is_limit(value: Any) -> bool:
    """True for a number of ms that may be a limit; false for NaN, infinity and true."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and MIN_LIMIT_MS <= value <= MAX_LIMIT_MS


def contradiction(limits: SloClass) -> tuple[str, str] | None:
    """The field that does not go with the others and what is wrong with it; None if all is well."""
    if limits.pace and limits.percentile is not None:
        return "pace", "at odds with percentile; give one"
    if limits.pace and limits.tbt_ms is None:
        return "pace", "needs a tbt_ms, which is the pace"
    if limits.percentile is not None and limits.tbt_ms is None:
        return "percentile", "needs a tbt_ms, which most gaps keep"
    if limits.max_pause_ms is None:
        return None
    if limits.percentile is None or limits.tbt_ms is None:
        return "max_pause_ms", f"goes with percentile {PERCENTILE} only; without it every gap keeps tbt_ms"
    if limits.max_pause_ms < limits.tbt_ms:
        return "max_pause_ms", f"must not be below tbt_ms ({limits.tbt_ms:g}), got {limits.max_pause_ms:g}"
    return None


def read_classes(raw: Any, where: str) -> dict[str, SloClass]:
    """`{name: {ttft_ms: .., ..}}` to classes. Raises ConfigError naming the class and the field."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: classes: need a mapping of name to limits")
    classes: dict[str, SloClass] = {}
    for name, limits in raw.items():
        at = f"{where}: classes.{name}"
        if not isinstance(name, str) or not name or not isinstance(limits, Mapping):
            raise ConfigError(f"{at}: need a name and its limits, {{ttft_ms: number, tbt_ms: number, ..}}")
        if name == CUSTOM_CLASS:
            raise ConfigError(f"{at}: this name is kept for requests that come with numbers and no class")
        for key, value in limits.items():
            _check_field(at, key, value)
        classes[name] = SloClass(**limits)
        problem = contradiction(classes[name])
        if problem is not None:
            raise ConfigError(f"{at}.{problem[0]}: {problem[1]}")
    return classes


def read_names(raw: Any, classes: Mapping[str, SloClass], where: str) -> dict[str, str]:
    """A map of another system's names to ours: `service_tiers`, `objectives`. Raises ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: need a mapping of name to class")
    for name, slo_class in raw.items():
        if not isinstance(name, str) or slo_class not in classes:
            raise ConfigError(f"{where}.{name}: need one of the classes {sorted(classes)}, got {slo_class!r}")
    return dict(raw)


def _check_field(at: str, key: Any, value: Any) -> None:
    at = f"{at}.{key}"
    if key in NUMBERS_MS:
        if value is not None and not is_limit(value):
            raise ConfigError(f"{at}: need {A_NUMBER}, got {value!r}")
    elif key == "pace":
        if not isinstance(value, bool):
            raise ConfigError(f"{at}: need true or false, got {value!r}")
    elif key == "percentile":
        if value is not None and (value != PERCENTILE or isinstance(value, bool)):
            raise ConfigError(f"{at}: need {PERCENTILE}, got {value!r}")
    elif key == "importance":
        integer = isinstance(value, int) and not isinstance(value, bool)
        if not integer or abs(value) > MAX_IMPORTANCE:
            raise ConfigError(f"{at}: need an integer up to {MAX_IMPORTANCE}, got {value!r}")
    else:
        raise ConfigError(f"{at}: unknown; accepted: {', '.join(CLASS_FIELDS)}")
