"""A stream of arrivals, from wherever it comes, and what its readers share: faults name file, line and field."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.slo import Slo

LISTS = ("blocks", "classes", "callers", "texts", "declared", "limits", "features")
BLOCK_TOKENS = 512  # prompt tokens per prefix block in Mooncake's traces


class WorkloadError(ValueError):
    """A workload or trace that cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Stream:
    """Arrivals of one stream, in order. Arrays and lists [n]; a list is None where the source says nothing.

    `blocks[i]`: prefix block ids of request i; `timed`: whether the source says when requests arrive.
    """

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    blocks: list[tuple[int, ...] | None] | None = None
    end_s: float = math.inf  # the source has no arrivals beyond this
    timed: bool = True
    classes: list[str | None] | None = None
    callers: list[str] | None = None
    texts: list[str | None] | None = None  # prompts
    declared: list[int | None] | None = None  # what clients sent as max_new_tokens
    limits: list[Slo | None] | None = None
    features: list[str] | None = None  # what else a request asks for: `FEATURES`

    def pick(self, keep: NDArray[Any]) -> Stream:
        """The rows that `keep` (a mask or indices) selects."""
        rows = (np.flatnonzero(keep) if keep.dtype == bool else keep).tolist()
        lists: dict[str, Any] = {}
        for name in LISTS:
            values = getattr(self, name)
            lists[name] = None if values is None else [values[i] for i in rows]
        return replace(
            self,
            arrival_s=self.arrival_s[keep],
            input_tokens=self.input_tokens[keep],
            output_tokens=self.output_tokens[keep],
            **lists,
        )


def number(
    raw: dict[str, Any], field: str, where: Path | str, default: float | None = None, whole: bool = False
) -> Any:
    """`raw[field]`, checked. Raises WorkloadError naming `where` and the field."""
    value: Any = raw.get(field, default)
    ok = isinstance(value, int) if whole else isinstance(value, int | float)
    if not ok or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        kind = "a whole number" if whole else "a number"
        raise WorkloadError(f"{where}: {field}: need {kind} of at least 0, got {value!r}")
    return value


def resolve(name: str, folders: list[Path], where: str) -> Path:
    """The file `name` in the first of `folders` that has it. Raises WorkloadError."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(f) for f in folders)
    raise WorkloadError(
        f"{where}: no file {name!r} in {looked} (--data or SGLANG_SLO_DATA names a further folder)"
    )


def merged(
    streams: list[Stream], class_ids: list[NDArray[np.int64]], horizon_s: float, limit: int | None
) -> tuple[Stream, NDArray[np.int64]]:
    """All streams in order of arrival, at most `limit` requests, and the class of each.

    A trace that ends early ends the whole: what is left would be another mix. The stream's place is put before its
    block ids, so that equal ids of two streams are not the same block.
    """
    blocks: list[tuple[int, ...] | None] = []
    for place, s in enumerate(streams):
        own = s.blocks or [None] * len(s.arrival_s)
        blocks += [None if b is None else (place, *b) for b in own]
    whole = Stream(
        np.concatenate([s.arrival_s for s in streams]),
        np.concatenate([s.input_tokens for s in streams]),
        np.concatenate([s.output_tokens for s in streams]),
        blocks,
        callers=_joined(streams, "callers", ""),
        texts=_joined(streams, "texts", None),
        declared=_joined(streams, "declared", None),
        features=_joined(streams, "features", ""),
    )
    class_id = np.concatenate(class_ids)
    order = np.argsort(whole.arrival_s, kind="stable")
    end_s = min([horizon_s, *(s.end_s for s in streams)])
    order = order[whole.arrival_s[order] <= end_s][:limit]
    return whole.pick(order), class_id[order]


def _joined(streams: list[Stream], name: str, missing: Any) -> list[Any]:
    """The column `name` of all streams, one behind the other."""
    parts = [getattr(s, name) or [missing] * len(s.arrival_s) for s in streams]
    return [value for part in parts for value in part]
