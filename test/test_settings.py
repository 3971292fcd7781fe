"""Settings from outside: the schema says what the server accepts, and old values are taken with a notice."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sglang_slo.classes import ConfigError
from sglang_slo.config import SloConfig, settings
from sglang_slo.settings_in import RENAMED_VALUES, add_flags, from_args
from sglang_slo.settings_schema import schema

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
GOOD = [
    {},
    {"classes": {"chat": {"ttft_ms": 500, "tbt_ms": 50, "pace": True}}, "default_class": "chat"},
    {"tbt_ms": 40, "percentile": 99, "max_pause_ms": 400},
    {
        "order": "shortest",
        "lost_wait_s": None,
        "service_tiers": {"priority": "chat"},
        "classes": {"chat": {}},
    },
]
BAD = [
    ("ordr", {"ordr": "edf"}),
    ("order", {"order": "fastest"}),
    ("ttft", {"ttft_ms": 0}),
    ("margin", {"margin": -1}),
    ("lookahead", {"lookahead_tokens": 0}),
    ("park", {"park": "maybe"}),
    ("percentile", {"tbt_ms": 40, "percentile": 95}),
    ("tbt", {"classes": {"chat": {"tbt_ms": "fast"}}}),
    ("ttf_ms", {"classes": {"chat": {"ttf_ms": 50}}}),
]


def read(raw: dict[str, Any], folder: Path, *flags: str) -> SloConfig:
    """What the server makes of a file and flags."""
    file = folder / "slo.yaml"
    file.write_text(yaml.safe_dump(raw))
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_args(parser.parse_args(["--slo-config", str(file), *flags]))


@pytest.mark.parametrize("raw", [*GOOD, yaml.safe_load((DEPLOY / "slo.yaml").read_text())])
def test_what_the_server_takes_the_schema_takes(raw: dict[str, Any], tmp_path: Path) -> None:
    read(raw, tmp_path)
    jsonschema.validate(raw, schema())


@pytest.mark.parametrize(("field", "raw"), BAD, ids=[field for field, _ in BAD])
def test_what_the_schema_refuses_the_server_refuses_by_name(
    field: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, schema())
    with pytest.raises(ConfigError, match=field):
        read(raw, tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(n, old, new) for n, values in RENAMED_VALUES.items() for old, new in values.items()],
)
@pytest.mark.parametrize("by_flag", [True, False], ids=["flag", "file"])
def test_a_value_of_the_release_before_is_taken_with_a_notice(
    name: str, old: str, new: str, by_flag: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = read({}, tmp_path, f"--slo-{name}", old) if by_flag else read({name: old}, tmp_path)
    assert getattr(config, name) == new
    assert f"slo-{name}" in caplog.text and old in caplog.text and new in caplog.text
    assert read({}, tmp_path, f"--slo-{name}", new) == config and caplog.text.count(old) == 1


def test_the_schema_describes_every_setting() -> None:
    said = schema()["properties"]
    assert {f.name for f in settings()} <= said.keys()
    assert all(said[f.name]["description"] for f in settings())
