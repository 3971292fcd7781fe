"""The latency formula under a device: no pass takes less than it says, and it says as much as that allows.

A measured device is no formula, so a bound on schedules of it needs one from below. With the two sides of the formula's
maximum as two linear functions of the coefficients x, each at most the device's time T_i on every pass i of a grid,

    maximise  sum_i (A_i + B_i) x / T_i    subject to    A_i x <= T_i,  B_i x <= T_i,  x >= 0

is a linear programme: A with the compute of the layers, B with their weights. A measured device is linear between the
sizes of its tables, and these are the grid, up to the tables' end; `SLACK` is for what is not (a pass's tokens are its
chunk's and its decodes').
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from sglang_slo.core.latency import Coefficients
from sglang_slo.twin.devices.device import Device, Pass
from sglang_slo.twin.devices.grid import octaves
from sglang_slo.twin.devices.profiled import ProfiledDevice

SLACK = 0.98  # of the device's time on the grid
DECODES = (0, 1, 2, 4, 8, *octaves(16, 512, 1))
CONTEXTS = (32, 512, 4096, 16_384)
SIZES = (0, 1, 2, 4, 8, *octaves(16, 16_384, 4))  # of a chunk, or of a chunk and the decodes beside it
HISTORIES = (0, 2048, 32_768)
ADDED = 200  # rows of the programme at a time: the ones that are broken worst


def passes(kv_capacity_tokens: int) -> Iterator[Pass]:
    """The grid: decodes of equal context, beside one chunk or none, within the KV capacity."""
    for decodes in DECODES:
        for context in CONTEXTS[: None if decodes else 1]:
            for chunk in sorted({*SIZES, *(size - decodes for size in SIZES if size > decodes)}):
                for history in HISTORIES[: None if chunk else 1]:
                    if decodes + chunk > 0 and decodes * context + history + chunk <= kv_capacity_tokens:
                        yield Pass(((history, chunk),) if chunk else (), (context,) * decodes)


def floor(device: Device) -> Coefficients:
    """Coefficients that are nowhere above the device's times; exactly its own where it is a formula."""
    if isinstance(device, ProfiledDevice):
        return device.profile.coefficients
    grid = list(passes(device.kv_capacity_tokens))
    seconds = SLACK * np.array([device.iteration_s(load) for load in grid])
    shapes = [load.shape for load in grid]
    shared = [(s.extend, not s.extend, 0.0, s.pairs, 0.0, s.context_tokens, s.requests) for s in shapes]
    compute, weights = np.array(shared, float), np.array(shared, float)
    compute[:, 2] = [s.new_tokens for s in shapes]
    weights[:, 4] = 1.0
    rows = np.concatenate((compute, weights)) / np.concatenate((seconds, seconds))[:, None]
    scale = rows.max(axis=0)
    return Coefficients(*(_largest_below(rows / scale) / scale).tolist())


def _largest_below(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 with rows x <= 1 and the largest sum over the rows, whose largest entry in each column is 1 (so x <= 1).

    Only rows that bind are ever handed to the solver.
    """
    aim, taken = -rows.sum(axis=0), np.arange(0, len(rows), max(len(rows) // ADDED, 1))
    while True:
        found = linprog(aim, A_ub=rows[taken], b_ub=np.ones(len(taken)), bounds=(0, 1), method="highs")
        if not found.success:
            raise RuntimeError(f"no formula lies below the device: {found.message}")
        excess = rows @ found.x - 1
        worst = np.argsort(-excess)[:ADDED]
        worst = worst[excess[worst] > 1e-9]
        if not len(worst):
            return np.asarray(found.x)
        taken = np.union1d(taken, worst)
