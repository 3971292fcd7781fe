"""Drawn traffic: arrivals with Poisson or gamma gaps; lengths from a file or a distribution; shared prefixes.

The same generator state gives the same requests. With a limit on requests and no horizon, every stream draws that
many, which is enough for the first so many of all streams together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.twin.workloads import read
from sglang_slo.twin.workloads.streams import BLOCK_TOKENS, Stream, WorkloadError, number, resolve


def generate(
    spec: dict[str, Any],
    where: str,
    folders: list[Path],
    rng: np.random.Generator,
    horizon_s: float,
    limit: int | None,
) -> Stream:
    """A stream that a YAML entry describes. Raises WorkloadError naming the field."""
    arrivals = spec.get("arrivals")
    if not isinstance(arrivals, dict) or not ({"poisson_rps", "gamma_rps"} & set(arrivals)):
        raise WorkloadError(
            f"{where}.arrivals: need {{poisson_rps: r}} or {{gamma_rps: r, cv: c}}, got {arrivals!r}"
        )
    rate = number(arrivals, "poisson_rps" if "poisson_rps" in arrivals else "gamma_rps", f"{where}.arrivals")
    cv = number(arrivals, "cv", f"{where}.arrivals", default=1.0) if "gamma_rps" in arrivals else 1.0
    if rate <= 0 or cv <= 0:
        raise WorkloadError(f"{where}.arrivals: rates and cv must be above 0")
    # `limit` arrivals of each stream are enough for the first `limit` of all; else a horizon's worth.
    count = (
        limit if math.isinf(horizon_s) and limit else int(rate * horizon_s * (1.5 + cv) + 20 * cv * cv + 50)
    )
    surge = _surge(arrivals, f"{where}.arrivals")
    if math.isfinite(horizon_s):
        count = int(count * max(surge[2], 1.0))
    # Gamma gaps of mean 1/rate and coefficient of variation cv: shape 1/cv^2, scale cv^2/rate.
    arrival = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    arrival = _surged(arrival, *surge)
    arrival = arrival[arrival <= horizon_s]
    drawn = _lengths(spec.get("lengths"), f"{where}.lengths", folders, rng, len(arrival))
    inputs, blocks = drawn.input_tokens, None
    if "shared_prefixes" in spec:
        blocks = _shared_blocks(spec["shared_prefixes"], f"{where}.shared_prefixes", inputs, rng)
    return replace(drawn, arrival_s=arrival, blocks=blocks, end_s=math.inf, timed=True)


def _surge(arrivals: dict[str, Any], where: str) -> tuple[float, float, float]:
    """(from, to, factor): between these times the rate is multiplied; (0, 0, 1) without one."""
    if "surge" not in arrivals:
        return 0.0, 0.0, 1.0
    spec = arrivals["surge"]
    if not isinstance(spec, dict) or set(spec) != {"from_s", "to_s", "factor"}:
        raise WorkloadError(f"{where}.surge: need {{from_s, to_s, factor}}, got {spec!r}")
    begin, end, factor = (
        float(number(spec, name, f"{where}.surge")) for name in ("from_s", "to_s", "factor")
    )
    if end <= begin or factor <= 0:
        raise WorkloadError(f"{where}.surge: need to_s after from_s and a factor above 0, got {spec!r}")
    return begin, end, factor


def _surged(at_s: NDArray[np.float64], begin: float, end: float, factor: float) -> NDArray[np.float64]:
    """Arrivals at an even rate, moved so that the rate within [begin, end] is `factor` times that outside.

    Time is stretched: by t the even process has come to t outside, and by begin + factor (t - begin) inside.
    """
    inside = begin + factor * (end - begin)
    during = begin + (at_s - begin) / factor
    return np.where(at_s <= begin, at_s, np.where(at_s <= inside, during, at_s - inside + end))


def _shared_blocks(
    spec: Any, where: str, inputs: NDArray[np.int64], rng: np.random.Generator
) -> list[tuple[int, ...] | None]:
    """Block ids such that the first `share` of each prompt is that of its group, and the rest its own."""
    if not isinstance(spec, dict) or set(spec) != {"groups", "share"}:
        raise WorkloadError(f"{where}: need {{groups: k, share: s}}, got {spec!r}")
    groups, share = int(number(spec, "groups", where, whole=True)), number(spec, "share", where)
    if groups < 1 or share > 1:
        raise WorkloadError(f"{where}: need groups of at least 1 and a share in [0, 1], got {spec!r}")
    blocks: list[tuple[int, ...] | None] = []
    for i, (group, tokens) in enumerate(zip(rng.integers(0, groups, len(inputs)), inputs, strict=True)):
        count = math.ceil(tokens / BLOCK_TOKENS)
        shared = int(share * count)
        blocks.append(
            tuple(int(group) * 1000 + k for k in range(shared))
            + tuple(10**9 + i * 1000 + k for k in range(shared, count))
        )
    return blocks


def _lengths(spec: Any, where: str, folders: list[Path], rng: np.random.Generator, n: int) -> Stream:
    """Requests whose arrivals are still to be set."""
    if isinstance(spec, str):
        source = read(resolve(spec, folders, where), rng)
        return source.pick(rng.integers(0, len(source.input_tokens), n))
    if not isinstance(spec, dict):
        raise WorkloadError(f"{where}: need a CSV file or {{input: .., output: ..}}, got {spec!r}")
    return Stream(
        np.zeros(n),
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
