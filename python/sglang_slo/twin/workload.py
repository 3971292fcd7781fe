"""Workloads: who arrives when, with which lengths, limits and shared prefixes.

A workload is one YAML file (see `data/workloads/`). Its streams come from traces (CSV with arrival_s,
input_tokens, output_tokens; JSONL in Mooncake's format with prefix blocks), from files of lengths, or from
distributions; all are merged in order of arrival. The same file and seed give the same requests at every
load: `load` only compresses time. A fault in a file is reported with file, line and field.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sglang_slo.config import ConfigError, read_classes
from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.core.slo import Slo
from sglang_slo.twin.profiles import DATA, load_profile

BLOCK_TOKENS = 512  # prompt tokens per prefix block in Mooncake's traces
MOONCAKE_BIN_S = 3.0  # their timestamps are rounded down to multiples of this
_FIELDS = {
    "profile",
    "seed",
    "horizon_s",
    "max_requests",
    "declared_max_new_tokens",
    "classes",
    "streams",
    "noise_sigma",
}
_STREAM_FIELDS = {
    "class",
    "trace",
    "lengths",
    "arrivals",
    "input_scale",
    "clip_input_tokens",
    "drop_input_over",
    "shared_prefixes",
}


class WorkloadError(ValueError):
    """A workload or trace that cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Stream:
    """Arrivals of one stream, in order. Arrays [n]; `blocks[i]`: prefix block ids of request i, or None."""

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    blocks: list[tuple[int, ...]] | None = None
    end_s: float = math.inf  # the source has no arrivals beyond this

    def pick(self, keep: NDArray[Any]) -> Stream:
        """The rows that `keep` (a mask or indices) selects."""
        blocks = None
        if self.blocks is not None:
            rows = np.flatnonzero(keep) if keep.dtype == bool else keep
            blocks = [self.blocks[i] for i in rows.tolist()]
        return replace(
            self,
            arrival_s=self.arrival_s[keep],
            input_tokens=self.input_tokens[keep],
            output_tokens=self.output_tokens[keep],
            blocks=blocks,
        )


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, arrays [n], and what they run on."""

    name: str
    profile_name: str
    profile: LatencyModel
    seed: int
    load: float
    class_names: list[str]
    limits: list[Slo]  # one per class
    class_id: NDArray[np.int64]
    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]  # true lengths: for the worker alone
    blocks: list[tuple[int, ...] | None]
    declared_max_new_tokens: int | None  # None: clients send the true length
    noise_sigma: float = 0.0  # of the lognormal factor on every iteration's time

    def __len__(self) -> int:
        return len(self.arrival_s)

    def declared(self, i: int) -> int:
        """What the client of request i sends as max_new_tokens."""
        true = int(self.output_tokens[i])
        return true if self.declared_max_new_tokens is None else max(true, self.declared_max_new_tokens)


def names() -> list[str]:
    """Names of the ready-made workloads."""
    return sorted(p.stem for p in (DATA / "workloads").glob("*.yaml"))


def load_workload(
    name_or_path: str,
    *,
    load: float = 1.0,
    data: Path | None = None,
    seed: int | None = None,
    max_requests: int | None = None,
) -> Workload:
    """Read a workload. Raises WorkloadError naming file, line and field.

    `load` multiplies every arrival rate, `data` is a further folder for traces, `seed` and `max_requests`
    override the file's.
    """
    if not (math.isfinite(load) and load > 0):
        raise WorkloadError(f"load: need a number above 0, got {load!r}")
    path = _find(name_or_path)
    raw = _read_yaml(path)
    the_seed = _number(raw, "seed", path, default=0, whole=True) if seed is None else seed
    limit = max_requests or (
        int(_number(raw, "max_requests", path, whole=True)) if "max_requests" in raw else None
    )
    horizon = _number(raw, "horizon_s", path) if "horizon_s" in raw else math.inf
    if limit is None and math.isinf(horizon):
        raise WorkloadError(f"{path}: horizon_s or max_requests: one of them is needed")
    try:
        classes = read_classes(raw.get("classes"), str(path))
        profile = load_profile(str(raw.get("profile", "h200-llama3-8b")), path.parent)
    except (ConfigError, ProfileError) as error:
        raise WorkloadError(str(error)) from error
    class_names = list(classes)
    folders = [path.parent, *([data] if data else [])]
    streams, ids = _streams(raw, path, folders, int(the_seed), horizon, limit, class_names)
    # A trace that ends early ends the workload: what is left would be another mix.
    horizon = min([horizon, *(s.end_s for s in streams)])
    arrival = np.concatenate([s.arrival_s for s in streams])
    class_id = np.concatenate(
        [np.full(len(s.arrival_s), c, np.int64) for s, c in zip(streams, ids, strict=True)]
    )
    blocks: list[tuple[int, ...] | None] = []
    for number, s in enumerate(streams):
        blocks += [(number, *b) for b in s.blocks] if s.blocks is not None else [None] * len(s.arrival_s)
    order = np.argsort(arrival, kind="stable")
    order = order[arrival[order] <= horizon][:limit]
    if not len(order):
        raise WorkloadError(f"{path}: streams: no request arrives within the horizon")
    arrival = arrival[order]
    return Workload(
        name=path.stem,
        profile_name=profile.name,
        profile=profile,
        seed=int(the_seed),
        load=load,
        class_names=class_names,
        limits=[classes[c].slo(c) for c in class_names],
        class_id=class_id[order],
        arrival_s=(arrival - arrival[0]) / load,
        input_tokens=np.concatenate([s.input_tokens for s in streams])[order],
        output_tokens=np.concatenate([s.output_tokens for s in streams])[order],
        blocks=[blocks[i] for i in order.tolist()],
        declared_max_new_tokens=_declared(raw, path),
        noise_sigma=_number(raw, "noise_sigma", path, default=0.0),
    )


def _find(name_or_path: str) -> Path:
    shipped = DATA / "workloads" / f"{name_or_path}.yaml"
    if shipped.exists():
        return shipped
    path = Path(name_or_path)
    if not path.is_file():
        raise WorkloadError(
            f"workload: need a YAML file or one of {', '.join(names())}, got {name_or_path!r}"
        )
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise WorkloadError(f"{path}: need a mapping with {', '.join(sorted(_FIELDS))}")
    unknown = sorted(str(k) for k in raw if k not in _FIELDS)
    if unknown:
        raise WorkloadError(f"{path}: {unknown[0]}: unknown field; known: {', '.join(sorted(_FIELDS))}")
    return raw


def _number(
    raw: dict[str, Any], field: str, where: Path | str, default: float | None = None, whole: bool = False
) -> Any:
    value: Any = raw.get(field, default)
    ok = isinstance(value, int) if whole else isinstance(value, int | float)
    if not ok or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        kind = "a whole number" if whole else "a number"
        raise WorkloadError(f"{where}: {field}: need {kind} of at least 0, got {value!r}")
    return value


def _declared(raw: dict[str, Any], path: Path) -> int | None:
    value = raw.get("declared_max_new_tokens", True)
    if value is True:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkloadError(f"{path}: declared_max_new_tokens: need true or a whole number, got {value!r}")
    return value


def _streams(
    raw: dict[str, Any],
    path: Path,
    folders: list[Path],
    seed: int,
    horizon_s: float,
    limit: int | None,
    class_names: list[str],
) -> tuple[list[Stream], list[int]]:
    specs = raw.get("streams")
    if not isinstance(specs, list) or not specs:
        raise WorkloadError(f"{path}: streams: need a list of at least one stream")
    streams, ids = [], []
    for number, spec in enumerate(specs):
        where = f"{path}: streams[{number}]"
        if not isinstance(spec, dict):
            raise WorkloadError(f"{where}: need a mapping")
        unknown = sorted(str(k) for k in spec if k not in _STREAM_FIELDS)
        if unknown:
            raise WorkloadError(f"{where}.{unknown[0]}: unknown; known: {', '.join(sorted(_STREAM_FIELDS))}")
        if spec.get("class") not in class_names:
            raise WorkloadError(
                f"{where}.class: need one of {', '.join(class_names)}, got {spec.get('class')!r}"
            )
        rng = np.random.default_rng([seed, number])
        if "trace" in spec:
            stream = _read_trace(_resolve(str(spec["trace"]), folders, f"{where}.trace"), rng)
        else:
            stream = _generate(spec, where, folders, rng, horizon_s, limit)
        streams.append(_shaped(stream, spec, where))
        ids.append(class_names.index(spec["class"]))
    return streams, ids


def _shaped(stream: Stream, spec: dict[str, Any], where: str) -> Stream:
    tokens = stream.input_tokens
    if "input_scale" in spec:
        tokens = np.maximum((tokens * _number(spec, "input_scale", where)).astype(np.int64), 1)
    if "clip_input_tokens" in spec:
        tokens = np.minimum(tokens, int(_number(spec, "clip_input_tokens", where, whole=True)))
    stream = replace(stream, input_tokens=tokens)
    if "drop_input_over" in spec:
        stream = stream.pick(tokens <= int(_number(spec, "drop_input_over", where, whole=True)))
    return stream


def _resolve(name: str, folders: list[Path], where: str) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(f) for f in folders)
    raise WorkloadError(
        f"{where}: no file {name!r} in {looked} (--data or SGLANG_SLO_DATA names a further folder)"
    )


def _read_trace(path: Path, rng: np.random.Generator) -> Stream:
    if path.suffix == ".jsonl":
        return _read_mooncake(path, rng)
    columns = _read_csv(path, ("arrival_s", "input_tokens", "output_tokens"))
    arrival = np.array(columns["arrival_s"])
    if (np.diff(arrival) < 0).any():
        line = int(np.flatnonzero(np.diff(arrival) < 0)[0]) + 3
        raise WorkloadError(f"{path}:{line}: arrival_s: earlier than the line before")
    return Stream(
        arrival,
        np.array(columns["input_tokens"], np.int64),
        np.array(columns["output_tokens"], np.int64),
        end_s=float(arrival[-1]),
    )


def _read_csv(path: Path, fields: tuple[str, ...]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {f: [] for f in fields}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [f for f in fields if f not in (rows.fieldnames or [])]
        if missing:
            raise WorkloadError(f"{path}:1: {missing[0]}: column missing; needed: {', '.join(fields)}")
        for row in rows:
            for f in fields:
                columns[f].append(_cell(row[f], f, path, rows.line_num))
    if not columns[fields[0]]:
        raise WorkloadError(f"{path}: no rows")
    return columns


def _cell(value: Any, field: str, path: Path, line: int) -> float:
    low = 0 if field in ("arrival_s", "timestamp") else 1
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < low or (low and number != int(number)):
        kind = "a whole number of at least 1" if low else "a number of at least 0"
        raise WorkloadError(f"{path}:{line}: {field}: need {kind}, got {value!r}")
    return number


def _read_mooncake(path: Path, rng: np.random.Generator) -> Stream:
    arrival, inputs, outputs, blocks = [], [], [], []
    with path.open() as file:
        for line, text in enumerate(file, 1):
            try:
                row = json.loads(text)
                ids = tuple(int(h) for h in row["hash_ids"])
            except (ValueError, KeyError, TypeError) as error:
                raise WorkloadError(f"{path}:{line}: need JSON with hash_ids: {error}") from error
            arrival.append(_cell(row.get("timestamp"), "timestamp", path, line) / 1e3)
            inputs.append(int(_cell(row.get("input_length"), "input_length", path, line)))
            outputs.append(int(_cell(row.get("output_length"), "output_length", path, line)))
            if len(ids) < math.ceil(inputs[-1] / BLOCK_TOKENS):
                raise WorkloadError(f"{path}:{line}: hash_ids: too few blocks for input_length {inputs[-1]}")
            blocks.append(ids)
    if not arrival:
        raise WorkloadError(f"{path}: no rows")
    end = arrival[-1] + MOONCAKE_BIN_S
    spread = np.array(arrival) + rng.random(len(arrival)) * MOONCAKE_BIN_S
    order = np.argsort(spread, kind="stable")
    whole = Stream(spread, np.array(inputs, np.int64), np.array(outputs, np.int64), blocks, end)
    return whole.pick(order)


def _generate(
    spec: dict[str, Any],
    where: str,
    folders: list[Path],
    rng: np.random.Generator,
    horizon_s: float,
    limit: int | None,
) -> Stream:
    arrivals = spec.get("arrivals")
    if not isinstance(arrivals, dict) or not ({"poisson_rps", "gamma_rps"} & set(arrivals)):
        raise WorkloadError(
            f"{where}.arrivals: need {{poisson_rps: r}} or {{gamma_rps: r, cv: c}}, got {arrivals!r}"
        )
    rate = _number(arrivals, "poisson_rps" if "poisson_rps" in arrivals else "gamma_rps", f"{where}.arrivals")
    cv = _number(arrivals, "cv", f"{where}.arrivals", default=1.0) if "gamma_rps" in arrivals else 1.0
    if rate <= 0 or cv <= 0:
        raise WorkloadError(f"{where}.arrivals: rates and cv must be above 0")
    # `limit` arrivals of each stream are enough for the first `limit` of all; else a horizon's worth.
    count = (
        limit if math.isinf(horizon_s) and limit else int(rate * horizon_s * (1.5 + cv) + 20 * cv * cv + 50)
    )
    # Gamma gaps of mean 1/rate and coefficient of variation cv: shape 1/cv^2, scale cv^2/rate.
    arrival = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    arrival = arrival[arrival <= horizon_s]
    inputs, outputs = _lengths(spec.get("lengths"), f"{where}.lengths", folders, rng, len(arrival))
    blocks = None
    if "shared_prefixes" in spec:
        blocks = _shared_blocks(spec["shared_prefixes"], f"{where}.shared_prefixes", inputs, rng)
    return Stream(arrival, inputs, outputs, blocks)


def _shared_blocks(
    spec: Any, where: str, inputs: NDArray[np.int64], rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Block ids such that the first `share` of each prompt is that of its group, and the rest its own."""
    if not isinstance(spec, dict) or set(spec) != {"groups", "share"}:
        raise WorkloadError(f"{where}: need {{groups: k, share: s}}, got {spec!r}")
    groups, share = int(_number(spec, "groups", where, whole=True)), _number(spec, "share", where)
    if groups < 1 or share > 1:
        raise WorkloadError(f"{where}: need groups of at least 1 and a share in [0, 1], got {spec!r}")
    blocks = []
    for i, (group, tokens) in enumerate(zip(rng.integers(0, groups, len(inputs)), inputs, strict=True)):
        count = math.ceil(tokens / BLOCK_TOKENS)
        shared = int(share * count)
        blocks.append(
            tuple(int(group) * 1000 + k for k in range(shared))
            + tuple(10**9 + i * 1000 + k for k in range(shared, count))
        )
    return blocks


def _lengths(
    spec: Any, where: str, folders: list[Path], rng: np.random.Generator, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if isinstance(spec, str):
        columns = _read_csv(_resolve(spec, folders, where), ("input_tokens", "output_tokens"))
        rows = rng.integers(0, len(columns["input_tokens"]), n)
        return (
            np.array(columns["input_tokens"], np.int64)[rows],
            np.array(columns["output_tokens"], np.int64)[rows],
        )
    if not isinstance(spec, dict):
        raise WorkloadError(f"{where}: need a CSV file or {{input: .., output: ..}}, got {spec!r}")
    return (
        _draw(spec.get("input"), f"{where}.input", rng, n),
        _draw(spec.get("output"), f"{where}.output", rng, n),
    )


def _draw(spec: Any, where: str, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """At least 1, from `{lognormal: [mu, sigma]}` (natural log), `{uniform: [low, high]}` or `{fixed: k}`."""
    if isinstance(spec, dict) and len(spec) == 1:
        kind, args = next(iter(spec.items()))
        values = args if isinstance(args, list) else [args]
        ok = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if ok and kind == "lognormal" and len(values) == 2 and values[1] >= 0:
            return np.maximum(np.rint(rng.lognormal(values[0], values[1], n)), 1).astype(np.int64)
        if ok and kind == "uniform" and len(values) == 2 and 1 <= values[0] <= values[1]:
            return rng.integers(int(values[0]), int(values[1]) + 1, n)
        if ok and kind == "fixed" and len(values) == 1 and values[0] >= 1:
            return np.full(n, int(values[0]), np.int64)
    raise WorkloadError(
        f"{where}: need lognormal: [mu, sigma], uniform: [low, high] or fixed: k, got {spec!r}"
    )
