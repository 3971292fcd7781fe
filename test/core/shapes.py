"""Iterations like those of mixed traffic, drawn at random, and how long a model says they take with noise."""

from __future__ import annotations

import numpy as np

from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel, decode_shape

H200 = Coefficients(6e-3, 1e-3, 2.7e-5, 1.3e-9, 4e-3, 3.3e-8)


def traffic(n: int, seed: int = 0, decode_share: float = 0.6) -> list[BatchShape]:
    """n shapes: decodes of up to 80 requests, chunks alone, and chunks beside decodes."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        requests = int(rng.integers(1, 80))
        context = int(requests * rng.integers(300, 3000))
        if rng.random() < decode_share:
            out.append(decode_shape(requests, context))
            continue
        beside = (
            BatchShape(True, requests, 0.0, context, requests) if rng.random() < 0.7 else BatchShape(True)
        )
        out.append(beside.with_chunk(int(rng.choice([0, 0, 0, 2000, 8000])), int(rng.lognormal(6, 1)) + 1))
    return out


def timed(
    shapes: list[BatchShape], truth: Coefficients = H200, sigma: float = 0.0, seed: int = 1
) -> list[tuple[BatchShape, float]]:
    """The shapes with seconds: the truth times lognormal noise of mean 1."""
    rng = np.random.default_rng(seed)
    model = LatencyModel(truth)
    noise = rng.lognormal(-(sigma**2) / 2, sigma, len(shapes)) if sigma else np.ones(len(shapes))
    return [(shape, model.iteration_s(shape) * float(x)) for shape, x in zip(shapes, noise, strict=True)]
