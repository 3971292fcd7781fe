"""What one run was: plain arrays per request and per iteration, and the measures derived from them.

`RunResult` is filled by the twin's driver and by the harness that replays a workload against a live server,
so that both are scored by the same code. Times are seconds since the start of the run. Everything but
`wall_s` is a function of workload, scheduler, settings and seed; `to_json(wall=False)` leaves that one out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.attainment import Reason, misses, p99_s
from sglang_slo.twin.result.requests import Floats, Ints, Requests

_SHOWN = (50, 90, 99)
GAP_REASONS: tuple[Reason, ...] = ("gap", "pause", "pace", "tpot")  # the reasons that lie between tokens


@dataclass
class Iterations:
    """One row per forward pass, in order; every field has shape [m]."""

    start_s: Floats  # when its computation began
    duration_s: Floats  # how long it computed
    new_tokens: Ints  # prompt tokens computed in it
    prefills: Ints  # requests that had prompt tokens in it
    decodes: Ints  # requests that got a token by decoding in it
    context_tokens: Ints  # KV tokens read by its decodes
    kv_used_tokens: Ints  # KV held by unfinished requests (evictable cache not counted)
    waiting: Ints  # requests queued when it was launched
    stalled: Ints  # requests between their first and last token that had no part in it


@dataclass
class RunResult:
    """One scheduler on one workload."""

    workload: str
    scheduler: str  # a short name: "slo", "stock lpm mixed 512"
    settings: dict[str, Any]  # flags that differ from the scheduler's defaults
    profile: str
    seed: int
    load: float
    class_names: list[str]
    kv_capacity_tokens: int
    requests: Requests
    iterations: Iterations
    retractions: int = 0
    recompute_tokens: int = 0  # tokens prefilled again after a preemption
    prefill_tokens: int = 0  # all tokens prefilled, the recomputed ones included
    swapped_tokens: int = 0  # tokens of KV that were moved to the host
    fallbacks: int = 0  # iterations that stock scheduling took because planning failed
    wall_s: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)  # counters of the scheduler's own

    @property
    def virtual_s(self) -> float:
        """First arrival to the end of the last iteration or token, whichever is later."""
        ends = self.requests.end_s[self.requests.finished]
        last = max(
            ends.max(initial=0.0), (self.iterations.start_s + self.iterations.duration_s).max(initial=0.0)
        )
        return (
            float(last - self.requests.arrival_s.min(initial=math.inf))
            if len(self.requests.arrival_s)
            else 0.0
        )

    @property
    def attainment(self) -> float:
        """Share of requests attained."""
        return _share(self.requests.attained)

    @property
    def goodput_rps(self) -> float:
        """Attained requests per second of the run."""
        return _per(float(self.requests.attained.sum()), self.virtual_s)

    def measures(self) -> dict[str, Any]:
        """Every measure, for the whole run and per class, without the time it took on the wall."""
        its = self.iterations
        return {
            "workload": self.workload,
            "scheduler": self.scheduler,
            "settings": self.settings,
            "profile": self.profile,
            "seed": self.seed,
            "load": self.load,
            **self._of(np.ones(len(self.requests.arrival_s), bool)),
            "classes": {
                name: self._of(self.requests.class_id == i) for i, name in enumerate(self.class_names)
            },
            "retractions": self.retractions,
            "recompute_tokens": self.recompute_tokens,
            "recompute_tax": _per(self.recompute_tokens, self.prefill_tokens),
            "swapped_tokens": self.swapped_tokens,
            "fallbacks": self.fallbacks,
            "stalled_iterations": int((its.stalled > 0).sum()),
            "stall_share": _share(its.stalled > 0),
            "kv_use": {
                "mean": _per(float((its.kv_used_tokens * its.duration_s).sum()), float(its.duration_s.sum()))
                / max(self.kv_capacity_tokens, 1),
                "max": int(its.kv_used_tokens.max(initial=0)) / max(self.kv_capacity_tokens, 1),
            },
            "iterations": len(its.start_s),
            "iteration_s": _spread(its.duration_s),
            "busy_share": _per(float(its.duration_s.sum()), self.virtual_s),
            "virtual_s": self.virtual_s,
            "notes": self.notes,
        }

    def to_json(self, wall: bool = True) -> str:
        """One line with every measure; without `wall` the same bytes for the same run on any day."""
        measures = self.measures()
        if wall:
            measures["wall_s"] = round(self.wall_s, 3)
        return json.dumps(_rounded(measures), allow_nan=False)

    def _of(self, pick: NDArray[np.bool_]) -> dict[str, Any]:
        rows, span = self.requests, self.virtual_s
        attained, finished = rows.attained & pick, rows.finished & pick
        late = misses(rows.limits, rows.figures)  # what never came was late
        pauses = rows.max_gap_s[finished]
        return {
            "requests": int(pick.sum()),
            "finished": int(finished.sum()),
            "attainment": _share(rows.attained[pick]),
            "attainment_by_rule": {rule: _share(kept[pick]) for rule, kept in rows.attained_by_rule.items()},
            "misses": {reason: int(missed[pick].sum()) for reason, missed in rows.misses.items()},
            "longest_pause_s": {"p99": p99_s(pauses), "max": float(pauses.max(initial=0.0))},
            "ttft_attainment": _share(~late["ttft"][pick]),
            "gap_attainment": _share(~np.logical_or.reduce([late[r] for r in GAP_REASONS])[pick]),
            "goodput_rps": _per(float(attained.sum()), span),
            "token_goodput_tps": _per(float(rows.output_tokens[attained].sum()), span),
            "throughput_tps": _per(float(rows.output_tokens[finished].sum()), span),
            "ttft_s": _spread(rows.ttft_s[pick]),
            "tbt_s": _spread(rows.tbt_s[pick]),
            "tpot_s": _spread(rows.tpot_s[pick]),
            "input_tokens": int(rows.input_tokens[pick].sum()),
            "output_tokens": int(rows.output_tokens[pick].sum()),
            "cached_tokens": int(rows.cached_tokens[pick].sum()),
            "preemptions": int(rows.preemptions[pick].sum()),
        }

    def write(self, path: Path) -> None:
        """Write to `path` (.npz); `read` reads it back unchanged."""
        head = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("requests", "iterations")
        }
        arrays = {
            f"{part}.{f.name}": getattr(getattr(self, part), f.name)
            for part in ("requests", "iterations")
            for f in dataclasses.fields(getattr(self, part))
        }
        with path.open("wb") as out:
            np.savez_compressed(out, head=np.array(json.dumps(head)), **arrays)

    @staticmethod
    def read(path: Path) -> RunResult:
        """Inverse of `write`. Raises OSError, KeyError or ValueError if the file is not one."""
        with np.load(path) as z:
            parts: dict[str, dict[str, Any]] = {"requests": {}, "iterations": {}}
            for key in z.files:
                part, _, name = key.partition(".")
                if name:
                    parts[part][name] = z[key]
            head = json.loads(str(z["head"]))
        return RunResult(
            **head, requests=Requests(**parts["requests"]), iterations=Iterations(**parts["iterations"])
        )


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else 0.0


def _per(amount: float, base: float) -> float:
    return amount / base if base > 0 else 0.0


def _spread(values: Floats) -> dict[str, float]:
    """Mean and percentiles; unfinished requests (inf) count as worse than all others, null in JSON."""
    if not len(values):
        return {}
    picked = np.percentile(values, _SHOWN, method="nearest")
    return {
        "mean": float(values.mean()),
        **{f"p{p}": float(v) for p, v in zip(_SHOWN, picked, strict=True)},
        "max": float(values.max()),
    }


def _rounded(value: Any) -> Any:
    """Floats to 9 significant digits (below any effect, above any noise in summing); inf to null."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
