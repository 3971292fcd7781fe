"""One stream of a workload's YAML: from a trace or drawn, shaped, with the class of each of its requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.slo import Slo
from sglang_slo.twin.workloads import FORMATS, read
from sglang_slo.twin.workloads.asking import asking
from sglang_slo.twin.workloads.draws import generate
from sglang_slo.twin.workloads.streams import Stream, WorkloadError, number, resolve

_FIELDS = {
    "class",
    "trace",
    "format",
    "lengths",
    "arrivals",
    "input_scale",
    "clip_input_tokens",
    "drop_input_over",
    "shared_prefixes",
    "features",
    "callers",
}


def stream_of(
    spec: Any,
    where: str,
    folders: list[Path],
    rng: np.random.Generator,
    extent: tuple[int | None, float],
    classes: dict[str, Slo],
) -> tuple[Stream, NDArray[np.int64]]:
    """A stream and the class of each of its requests; classes that its trace declares are added to `classes`.

    `extent`: (most requests or None, horizon in seconds). Raises WorkloadError naming `where` and the field.
    """
    if not isinstance(spec, dict):
        raise WorkloadError(f"{where}: need a mapping")
    unknown = sorted(str(k) for k in spec if k not in _FIELDS)
    if unknown:
        raise WorkloadError(f"{where}.{unknown[0]}: unknown; known: {', '.join(sorted(_FIELDS))}")
    if "class" in spec and spec["class"] not in classes:
        raise WorkloadError(f"{where}.class: need one of {', '.join(classes)}, got {spec['class']!r}")
    if "trace" in spec:
        stream = _trace(spec, folders, where, rng)
    else:
        stream = generate(spec, where, folders, rng, extent[1], extent[0])
    stream = asking(_shaped(stream, spec, where), spec, where, rng)
    return stream, _class_ids(stream, spec.get("class"), where, classes)


def _trace(spec: dict[str, Any], folders: list[Path], where: str, rng: np.random.Generator) -> Stream:
    form = spec.get("format")
    if form is not None and form not in FORMATS:
        raise WorkloadError(f"{where}.format: need one of {', '.join(FORMATS)}, got {form!r}")
    stream = read(resolve(str(spec["trace"]), folders, f"{where}.trace"), rng, form)
    if not stream.timed:
        raise WorkloadError(
            f"{where}.trace: {spec['trace']} does not say when requests arrive: "
            "name it under `lengths`, with `arrivals`"
        )
    return replace(
        stream, arrival_s=stream.arrival_s - stream.arrival_s[0], end_s=stream.end_s - stream.arrival_s[0]
    )


def _class_ids(stream: Stream, named: Any, where: str, classes: dict[str, Slo]) -> NDArray[np.int64]:
    """The class of each request: the one that the stream is given, else the trace's own, with its limits."""
    n = len(stream.arrival_s)
    if named is not None or stream.classes is None:
        if named not in classes:
            raise WorkloadError(f"{where}.class: need one of {', '.join(classes) or 'none'}, got {named!r}")
        return np.full(n, list(classes).index(named), np.int64)
    ids, places = [], {name: place for place, name in enumerate(classes)}
    for i, (name, limits) in enumerate(zip(stream.classes, stream.limits or [None] * n, strict=True)):
        if limits is None and name not in classes:
            raise WorkloadError(
                f"{where}.trace: request {i}: class {name!r} is not one of {', '.join(classes)}"
            )
        if limits is not None:
            name = _class_of(str(name), limits, classes)
            places.setdefault(name, len(places))
        ids.append(places[str(name)])
    return np.array(ids, np.int64)


def _class_of(name: str, limits: Slo, classes: dict[str, Slo]) -> str:
    """The name under which these limits go: `name`, or with a number if others of that name have other limits."""
    number, found = 1, name
    while found in classes and replace(classes[found], slo_class=name) != replace(limits, slo_class=name):
        number += 1
        found = f"{name}-{number}"
    classes.setdefault(found, replace(limits, slo_class=found))
    return found


def _shaped(stream: Stream, spec: dict[str, Any], where: str) -> Stream:
    tokens = stream.input_tokens
    if "input_scale" in spec:
        tokens = np.maximum((tokens * number(spec, "input_scale", where)).astype(np.int64), 1)
    if "clip_input_tokens" in spec:
        tokens = np.minimum(tokens, int(number(spec, "clip_input_tokens", where, whole=True)))
    stream = replace(stream, input_tokens=tokens)
    if "drop_input_over" in spec:
        stream = stream.pick(tokens <= int(number(spec, "drop_input_over", where, whole=True)))
    return stream
