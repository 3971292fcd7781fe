"""The JSON schema of `slo.yaml`, for editors and for checks before a rollout: pydantic's of the settings' types, with what
each setting says of itself. What it accepts, the server accepts, but for rules between several settings.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from sglang_slo.classes import NUMBERS_MS, PERCENTILE
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import MAX_LIMIT_MS, MIN_LIMIT_MS


def schema() -> dict[str, Any]:
    """As JSON values."""
    found: dict[str, Any] = TypeAdapter(SloConfig).json_schema()
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "slo.yaml", **found}
    found["additionalProperties"] = False
    for name, said in found["properties"].items():
        field = SloConfig.__dataclass_fields__[name]
        said.pop("title", None)
        said["description"] = field.metadata["help"]
        if field.metadata.get("choices"):
            said["enum"] = list(field.metadata["choices"])
        low = field.metadata.get("low", float("-inf"))
        _number(said, low if low > float("-inf") else None, None)
    one_class = found["$defs"]["SloClass"]
    one_class["additionalProperties"] = False
    for limits in (one_class["properties"], found["properties"]):
        for name in NUMBERS_MS:
            _number(limits[name], MIN_LIMIT_MS, MAX_LIMIT_MS)
        limits["percentile"]["enum"] = [PERCENTILE, None]
    for said in one_class["properties"].values():
        said.pop("title", None)
    return found


def _number(said: dict[str, Any], low: float | None, high: float | None) -> None:
    """Bounds of a number, wherever the schema says that it may be one."""
    for kind in (said, *said.get("anyOf", ())):
        if kind.get("type") in ("number", "integer"):
            kind |= {k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None}
