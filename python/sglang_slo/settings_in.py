"""Settings from outside: `--slo-*` flags, and the YAML of `--slo-config`; a flag that is given beats the file.

Names and values that were accepted in the release before are accepted for one more, with a notice (`RENAMED_VALUES`).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import yaml

from sglang_slo.classes import ConfigError, read_classes, read_names
from sglang_slo.config import SloConfig, settings

logger = logging.getLogger(__name__)

# setting -> value of the release before -> what it is called now
RENAMED_VALUES: dict[str, dict[str, str]] = {"order": {"slack": "edf"}, "victims": {"cost": "auto"}}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--slo-config` and one `--slo-*` flag per setting; absent flags leave no trace in the namespace."""
    group = parser.add_argument_group("deadlines (sglang-slo)")
    group.add_argument(
        "--slo-config", metavar="FILE", help="YAML with classes and any setting below, without `slo-`"
    )
    for f in settings():
        kind: Any = str
        if f.type == "bool":
            kind = _bool
        elif str(f.type).startswith("int"):
            kind = int
        elif "float" in str(f.type):
            kind = float
        group.add_argument(
            "--slo-" + f.name.replace("_", "-"),
            dest="slo_" + f.name,
            type=kind,
            choices=accepted(f),
            metavar=None if f.metadata["choices"] is None else "{" + ",".join(f.metadata["choices"]) + "}",
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"),
        )


def from_args(args: argparse.Namespace) -> SloConfig:
    """Settings from the flags that were given, over the YAML file, over the defaults."""
    raw: dict[str, Any] = {}
    if getattr(args, "slo_config", None):
        raw.update(read_yaml(Path(args.slo_config)))
    for f in settings():
        if hasattr(args, "slo_" + f.name):
            raw[f.name] = getattr(args, "slo_" + f.name)
    return SloConfig(**{name: _renamed(name, value) for name, value in raw.items()})


def accepted(f: dataclasses.Field[Any]) -> tuple[str, ...] | None:
    """The values of a setting, those of the release before included; None: any of its type."""
    choices: tuple[str, ...] | None = f.metadata["choices"]
    return None if choices is None else (*choices, *RENAMED_VALUES.get(f.name, ()))


def _renamed(name: str, value: Any) -> Any:
    new = RENAMED_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
    if new is None:
        return value
    flag = "slo-" + name.replace("_", "-")
    logger.warning(
        "sglang-slo: %s %s is called %s now; the old name goes with the next release", flag, value, new
    )
    return new


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a `slo.yaml`. Raises ConfigError naming the file and the field."""
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"slo-config {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"slo-config {path}: need a mapping of settings")
    raw = {str(k).replace("-", "_"): v for k, v in raw.items()}
    known = {f.name for f in dataclasses.fields(SloConfig)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ConfigError(
            f"slo-config {path}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    raw["classes"] = read_classes(raw.get("classes") or {}, str(path))
    for name in ("service_tiers", "objectives"):
        raw[name] = read_names(raw.get(name) or {}, raw["classes"], f"{path}: {name}")
    return raw


def _bool(text: str) -> bool:
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"need on or off, got {text!r}")
