"""Serving runs on real GPUs, as the measured kernels' own package hands them out: what the twin is checked against.

A run is a closed loop: so many clients, each sending a prompt of `isl` tokens, waiting for `osl` tokens, and sending
the next. Known of it are the mean time to the first token and the mean time per token after it.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_slo.twin.devices.spec import DeviceSpec
from sglang_slo.twin.workloads.streams import WorkloadError

NEEDED = ("id", "backend", "model_path", "system", "mode", "isl", "osl", "batch_size", "tp_size")
_ELSEWHERE = {
    "pp_size": "pipeline",
    "attention_dp_size": "data-parallel attention",
    "moe_ep_size": "experts apart",
}
TIMES = ("silicon_ttft_ms", "silicon_tpot_ms")


@dataclass(frozen=True)
class ServingRun:
    """One row. `half`: 0 may be fitted to, 1 is what errors are reported on (by a hash of the id)."""

    id: str
    version: str
    device: DeviceSpec
    input_tokens: int
    output_tokens: int
    clients: int
    ttft_ms: float
    tpot_ms: float

    @property
    def half(self) -> int:
        """0 or 1."""
        return hashlib.sha256(self.id.encode()).digest()[0] % 2

    @property
    def request_ms(self) -> float:
        """Of a whole request."""
        return self.ttft_ms + self.tpot_ms * (self.output_tokens - 1)

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together, which never rest."""
        return self.clients * self.output_tokens / self.request_ms * 1e3


def read_runs(path: Path, model: str, system: str) -> tuple[list[ServingRun], dict[str, int]]:
    """SGLang's runs of a model on a system, and why how many others of them were left out. Raises WorkloadError."""
    runs, left_out = [], dict[str, int]()
    for line, row in _rows(path):
        if row["backend"] != "sglang" or not _same(row["model_path"], model) or row["system"] != system:
            continue
        why = _not_covered(row)
        if why:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        runs.append(_run(row, model, f"{path}:{line}"))
    return runs, left_out


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in (*NEEDED, *TIMES) if name not in (rows.fieldnames or [])]
        if missing:
            raise WorkloadError(
                f"{path}:1: {missing[0]}: column missing; needed: {', '.join((*NEEDED, *TIMES))}"
            )
        for row in rows:
            yield rows.line_num, row


def _same(one: str, other: str) -> bool:
    def plain(name: str) -> str:
        return name.rsplit("/", 1)[-1].lower().removeprefix("meta-").removesuffix("-instruct")

    return plain(one) == plain(other)


def _not_covered(row: dict[str, str]) -> str:
    if row["mode"] != "agg":
        return "prefill and decode apart"
    for field, why in _ELSEWHERE.items():
        if float(row.get(field) or 1) > 1:
            return why
    return ""


def _run(row: dict[str, str], model: str, where: str) -> ServingRun:
    def number(field: str) -> float:
        try:
            value = float(row[field])
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise WorkloadError(f"{where}: {field}: need a number above 0, got {row[field]!r}")
        return value

    return ServingRun(
        row["id"],
        row.get("backend_version") or "unknown",
        DeviceSpec(model, row["system"], int(number("tp_size")), row.get("gemm_quant_mode") or None),
        int(number("isl")),
        int(number("osl")),
        int(number("batch_size")),
        number("silicon_ttft_ms"),
        number("silicon_tpot_ms"),
    )
