"""Workloads: who arrives when, with which lengths, limits and shared prefixes.

A workload is one YAML file (see `data/workloads/`), or a trace by itself. Its streams come from traces (see
`workloads`), from files of lengths, or from distributions; all are merged in order of arrival. The same file and
seed give the same requests at every load: `load` only compresses time, or multiplies the clients of a closed loop.
A fault in a file is reported with file, line and field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sglang_slo.config import ConfigError, read_classes
from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.core.slo import Slo
from sglang_slo.twin.devices import Device, DeviceError, ProfiledDevice
from sglang_slo.twin.devices.load import described, named
from sglang_slo.twin.devices.profiles import DATA
from sglang_slo.twin.predictors import PREDICTORS
from sglang_slo.twin.workloads import detect
from sglang_slo.twin.workloads.entry import stream_of
from sglang_slo.twin.workloads.streams import BLOCK_TOKENS, Stream, WorkloadError, merged, number

__all__ = ["BLOCK_TOKENS", "Workload", "WorkloadError", "load_workload", "names"]

_FIELDS = {
    "profile",
    "device",
    "seed",
    "horizon_s",
    "max_requests",
    "declared_max_new_tokens",
    "classes",
    "streams",
    "noise_sigma",
    "acceptance",
    "predictor",
    "loop",
}


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, arrays [n], and what they run on."""

    name: str
    profile_name: str
    profile: LatencyModel  # what a scheduler knows of the device as it starts
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
    acceptance: float = (
        0.6  # under speculative decoding: mean chance that a drafted token is accepted, over requests
    )
    predictor: str | None = None  # of output lengths (`predictors.PREDICTORS`); None: as --slo-length says

    callers: list[str] | None = None  # who sends each, as a client would tell the server
    texts: list[str | None] | None = None  # prompts, where they are known
    declared_tokens: list[int | None] | None = None  # max_new_tokens as a trace has them
    features: list[str] | None = None  # what else each asks for
    clients: int | None = (
        None  # of a closed loop, in which arrivals are decided as it runs; None: an open one
    )
    staggered: bool = False  # whether they are out of step from the start: see `staggered_outputs`
    device: Device | None = None  # what it runs on; None: the profile itself is the device

    @property
    def on(self) -> Device:
        """The device."""
        return ProfiledDevice(self.profile) if self.device is None else self.device

    def __len__(self) -> int:
        return len(self.arrival_s)

    def declared(self, i: int) -> int:
        """What the client of request i sends as max_new_tokens."""
        true = int(self.output_tokens[i])
        own = self.declared_tokens[i] if self.declared_tokens else None
        if own is not None:
            return max(true, own)
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
    device: str | None = None,
) -> Workload:
    """Read a workload. Raises WorkloadError naming file, line and field.

    `load` multiplies every arrival rate, `data` is a further folder for traces, `seed` and `max_requests`
    override the file's, and so does `device`: a profile's name or file, or MODEL,SYSTEM[,tp=..][,quant=..].
    """
    if not (math.isfinite(load) and load > 0):
        raise WorkloadError(f"load: need a number above 0, got {load!r}")
    path = _find(name_or_path)
    raw = _read_yaml(path)
    the_seed = int(number(raw, "seed", path, default=0, whole=True)) if seed is None else seed
    limit, horizon = _extent(raw, path, max_requests)
    try:
        declared_classes = read_classes(raw.get("classes"), str(path)) if "classes" in raw else {}
        classes = {name: c.slo(name) for name, c in declared_classes.items()}
        runs_on, profile = named(device) if device else described(raw, path)
    except (ConfigError, ProfileError, DeviceError) as error:
        raise WorkloadError(str(error)) from error
    folders = [path.parent, *([data] if data else [])]
    clients, staggered = _loop(raw, path, load)
    if clients is not None and limit is None:
        raise WorkloadError(f"{path}: loop: max_requests is needed: a closed loop has no end of its own")
    streams, ids = _streams(raw, path, folders, the_seed, (limit, horizon), classes)
    rows, class_id = merged(streams, ids, horizon, limit)
    if not len(class_id):
        raise WorkloadError(f"{path}: streams: no request arrives within the horizon")
    given = {"seed": the_seed, "load": load, "class_id": class_id, "clients": clients, "staggered": staggered}
    return _workload(raw, path, rows, classes, (runs_on, profile), given)


def _workload(
    raw: dict[str, Any],
    path: Path,
    rows: Stream,
    classes: dict[str, Slo],
    runs_on: tuple[Device, LatencyModel],
    given: dict[str, Any],
) -> Workload:
    """The workload of a file whose streams were read; `given`: fields that do not come from the file alone."""
    clients, staggered, load = given["clients"], given["staggered"], given["load"]
    return Workload(
        name=path.stem,
        profile_name=runs_on[0].name,
        profile=runs_on[1],
        device=None if isinstance(runs_on[0], ProfiledDevice) else runs_on[0],
        class_names=list(classes),
        limits=list(classes.values()),
        arrival_s=np.zeros(len(rows.arrival_s)) if clients else (rows.arrival_s - rows.arrival_s[0]) / load,
        input_tokens=rows.input_tokens,
        output_tokens=staggered_outputs(rows.output_tokens, clients)
        if clients and staggered
        else rows.output_tokens,
        blocks=rows.blocks or [],
        declared_max_new_tokens=_declared(raw, path),
        noise_sigma=number(raw, "noise_sigma", path, default=0.0),
        acceptance=_share(raw, "acceptance", path, Workload.acceptance),
        predictor=chosen_predictor(raw["predictor"], f"{path}: predictor") if "predictor" in raw else None,
        callers=rows.callers,
        texts=rows.texts,
        declared_tokens=rows.declared,
        features=rows.features,
        **given,
    )


def _share(raw: dict[str, Any], name: str, path: Path, default: float) -> float:
    value = number(raw, name, path, default=default)
    if value > 1:
        raise WorkloadError(f"{path}: {name}: need a number between 0 and 1, got {value!r}")
    return float(value)


def chosen_predictor(name: Any, where: str) -> str:
    """One of PREDICTORS. Raises WorkloadError naming `where`."""
    if name not in PREDICTORS:
        raise WorkloadError(f"{where}: need one of {', '.join(PREDICTORS)}, got {name!r}")
    return str(name)


def _extent(raw: dict[str, Any], path: Path, max_requests: int | None) -> tuple[int | None, float]:
    """(most requests or None, horizon in seconds)."""
    if max_requests is not None and max_requests < 1:
        raise WorkloadError(f"max_requests: need at least 1, got {max_requests}")
    limit = max_requests
    if limit is None and "max_requests" in raw:
        limit = int(number(raw, "max_requests", path, whole=True))
    horizon = number(raw, "horizon_s", path) if "horizon_s" in raw else math.inf
    traces = all(isinstance(s, dict) and "trace" in s for s in raw.get("streams") or [{}])
    if limit is None and math.isinf(horizon) and not traces:
        raise WorkloadError(f"{path}: horizon_s or max_requests: one of them is needed without a trace")
    return limit, horizon


def _find(name_or_path: str) -> Path:
    shipped = DATA / "workloads" / f"{name_or_path}.yaml"
    if shipped.exists():
        return shipped
    path = Path(name_or_path)
    if not path.is_file():
        raise WorkloadError(
            f"workload: need a YAML file, a trace, or one of {', '.join(names())}, got {name_or_path!r}"
        )
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml"):  # a trace by itself
        own = detect(path) == "request_log"
        stream = {"trace": path.name} if own else {"trace": path.name, "class": "default"}
        return {"streams": [stream], **({} if own else {"classes": {"default": {}}})}
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


def _declared(raw: dict[str, Any], path: Path) -> int | None:
    value = raw.get("declared_max_new_tokens", True)
    if value is True:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkloadError(f"{path}: declared_max_new_tokens: need true or a whole number, got {value!r}")
    return value


def staggered_outputs(output_tokens: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """The same, but the first answer of client k of N is cut to k/N of its length.

    All start at once, and from then on they are as much out of step as clients of a service that has run for long.
    """
    first = output_tokens[:clients]
    cut = np.ceil(first * (np.arange(len(first)) + 1) / len(first)).astype(np.int64)
    return np.concatenate((cut, output_tokens[clients:]))


def _loop(raw: dict[str, Any], path: Path, load: float) -> tuple[int | None, bool]:
    """(clients at this load or None, whether they are out of step)."""
    if "loop" not in raw:
        return None, False
    loop, where = raw["loop"], f"{path}: loop"
    if not isinstance(loop, dict) or not set(loop) <= {"clients", "start"}:
        raise WorkloadError(f"{where}: need {{clients: N, start: staggered or at_once}}, got {loop!r}")
    clients, start = number(loop, "clients", where, whole=True), loop.get("start", "at_once")
    if clients < 1:
        raise WorkloadError(f"{where}.clients: need at least 1, got {clients}")
    if start not in ("staggered", "at_once"):
        raise WorkloadError(f"{where}.start: need staggered or at_once, got {start!r}")
    return max(round(clients * load), 1), start == "staggered"


def _streams(
    raw: dict[str, Any],
    path: Path,
    folders: list[Path],
    seed: int,
    extent: tuple[int | None, float],
    classes: dict[str, Slo],
) -> tuple[list[Stream], list[NDArray[np.int64]]]:
    """The streams, and the class of each of their requests; classes that a trace declares are added."""
    specs = raw.get("streams")
    if not isinstance(specs, list) or not specs:
        raise WorkloadError(f"{path}: streams: need a list of at least one stream")
    streams, ids = [], []
    for place, spec in enumerate(specs):
        if "loop" in raw and isinstance(spec, dict) and "trace" not in spec:
            spec = {
                "arrivals": {"poisson_rps": 1.0},
                **spec,
            }  # they only say in which order streams take turns
        rng = np.random.default_rng([seed, place])
        stream, own = stream_of(spec, f"{path}: streams[{place}]", folders, rng, extent, classes)
        streams.append(stream)
        ids.append(own)
    return streams, ids
