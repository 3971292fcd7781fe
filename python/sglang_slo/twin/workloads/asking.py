"""What requests ask for beside lengths: callers, and the features that stand in the way of a scheduler.

`features: {penalty: 0.2, grammar: 0.1, logprobs: 0.2}` gives that share of a stream's requests a frequency penalty, a
regular expression, or log probabilities. `callers: N` spreads a drawn stream over N callers, some lengthy, some brief.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sglang_slo.twin.workloads.streams import Stream, WorkloadError, number

FEATURES = ("penalty", "grammar", "logprobs")


def asking(stream: Stream, spec: dict[str, Any], where: str, rng: np.random.Generator) -> Stream:
    """The stream with `callers` and `features` as its entry says. Raises WorkloadError."""
    n = len(stream.arrival_s)
    if "callers" in spec:
        count = int(number(spec, "callers", where, whole=True))
        if count < 1:
            raise WorkloadError(f"{where}.callers: need at least 1, got {count}")
        # the longer the outputs, the higher the number, by a rank blurred so that callers overlap
        rank = np.argsort(np.argsort(stream.output_tokens + 0.0)) / max(n, 1)
        caller = np.clip(((rank + rng.normal(0, 0.15, n)) * count).astype(int), 0, count - 1)
        stream = replace(stream, callers=[f"caller{c}" for c in caller.tolist()])
    if "features" in spec:
        stream = replace(stream, features=_drawn(spec["features"], f"{where}.features", n, rng))
    return stream


def _drawn(spec: Any, where: str, n: int, rng: np.random.Generator) -> list[str]:
    if not isinstance(spec, dict) or not spec or not set(spec) <= set(FEATURES):
        raise WorkloadError(f"{where}: need shares of {', '.join(FEATURES)}, got {spec!r}")
    shares = [float(number(spec, name, where)) for name in FEATURES if name in spec]
    if sum(shares) > 1:
        raise WorkloadError(f"{where}: need shares of at most 1 together, got {sum(shares):g}")
    names = [name for name in FEATURES if name in spec]
    return rng.choice([*names, ""], n, p=[*shares, 1 - sum(shares)]).tolist()
