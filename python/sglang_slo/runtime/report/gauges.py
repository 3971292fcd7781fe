"""Reads the scheduler's state of the moment into `Gauges`: queues, budget, KV, latency model, headroom.

Called about once a second, between iterations, on the scheduler's own thread; changes nothing. Headroom of a
class is net: what an iteration within its gap limit has room for beside those who decode, per second of such
iterations, less the prefill that came in lately and that waits now; and the KV left below the forecast peak, the
reserve and what waits. Both times the share of the class that attained lately, and nothing below one half: a
replica that does not keep its promises has no room, whatever its model says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sglang_slo.core.attainment import gap_limit_s
from sglang_slo.core.latency import decode_shape
from sglang_slo.core.slo import DEFAULT_CLASS, SloClass
from sglang_slo.observe.gauges import Gauges, Headroom
from sglang_slo.observe.window import ALL_CLASSES

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.runtime.ports import Ports


class KvReport(Protocol):
    """What there is to tell of preemption."""

    counts: Counter[str]
    swap_ins: int

    def figures(self) -> dict[str, float]:
        """Host KV used and there, and from which context on swapping pays; tokens."""


class PoolReport(Protocol):
    """What planning makes of the pool."""

    reserve: Any
    arrivals: Any

    @property
    def pinned_tokens(self) -> int:
        """Cached KV kept for those next in line."""

    def ledger(self, decoding: np.ndarray, free_tokens: int) -> Any:
        """The ledger of who decodes now."""


LEAST_ATTAINMENT = 0.5  # a class that attains less lately has no headroom
BACKLOG_S = 1.0  # what waits is to be prefilled within so long


class GaugeReader:
    """Reads the gauges of one scheduler. `lately` tells of each class what finished in the last minute."""

    def __init__(
        self,
        ports: Ports,
        preempt: KvReport,
        pool: PoolReport,
        latency: Callable[[], dict[str, Any]],
        lengths: Any,
        lately: Callable[[float], dict[str, dict[str, Any]]],
    ) -> None:
        self._ports, self._preempt, self._pool = ports, preempt, pool
        self._latency, self._lengths, self._lately = latency, lengths, lately

    def __call__(self) -> Gauges:
        """The state of the moment."""
        p, plan = self._ports, self._ports.iteration.plan
        waiting = [req for req in p.waiting.reqs if getattr(req, "slo_row", -1) >= 0]
        decoding = self.decoding_rows()
        kv = self.kv_tokens(decoding)
        rows, now_s = p.rows(waiting), p.agreed.now_s
        since_s = float(p.requests.table.since_s[rows].min(initial=now_s))
        return Gauges(
            running=len(decoding),
            queued=Counter(req.slo.slo_class for req in waiting),
            backlog_tokens=self.backlog_tokens(rows),
            oldest_waiting_s=now_s - since_s,
            parked=sum(getattr(req, "slo_parked", 0) > 0 for req in waiting),
            preempted=sum(req.retraction_count > 0 for req in waiting),
            given_up=plan.infeasible if plan else 0,
            budget_s=plan.budget_s if plan and 0 < plan.budget_s < math.inf else None,
            chunk_tokens=sum(tokens for _, tokens in plan.prefill) if plan else 0,
            plan_s=p.iteration.plan_s,
            kv=kv,
            preemptions=dict(self._preempt.counts),
            swap_ins=self._preempt.swap_ins,
            swap=self._preempt.figures(),
            latency=self._latency(),
            lengths=length_figures(self._lengths),
            headroom=self.headroom(decoding, kv, rows),
        )

    def backlog_tokens(self, waiting: np.ndarray) -> int:
        """Prefill that is still to be done of those who wait, and of the request whose prompt is half computed."""
        table, cut = self._ports.requests.table, self._ports.waiting.cut
        if cut is not None and cut.slo_row >= 0 and cut.slo_row not in waiting:
            waiting = np.append(waiting, cut.slo_row)
        return int(table.prefill_tokens(waiting).sum())

    def decoding_rows(self) -> np.ndarray:
        """Rows of all requests that decode, int[n], a part that was launched alone included."""
        reqs: list[Req] = list(self._ports.batches.running())
        if self._ports.iteration.split is not None:
            reqs += self._ports.iteration.split.reqs
        live = {req.slo_row: req for req in reqs if getattr(req, "slo_row", -1) >= 0}
        return np.fromiter(live, np.int64, len(live))

    def kv_tokens(self, decoding: np.ndarray) -> dict[str, float]:
        """The pool and the ledger's view of it, tokens."""
        kv = self._ports.kv
        evictable = kv.tree.evictable_size()
        free = kv.unheld_tokens() - evictable
        held = kv.capacity_tokens - free - evictable
        return {
            "capacity": kv.capacity_tokens,
            "free": free,
            "evictable": evictable,
            "held": held,
            "forecast_peak": getattr(self._pool.ledger(decoding, free + evictable), "peak", held),
            "reserve": self._pool.reserve.tokens,
            "arrival_reserve": self._pool.arrivals.tokens(self._ports.agreed.now_s),
            "pinned": self._pool.pinned_tokens,
        }

    def headroom(
        self, decoding: np.ndarray, kv: dict[str, float], waiting: np.ndarray
    ) -> dict[str, Headroom]:
        """By class: those that the server declares, and its default for requests without one."""
        config, table, agreed = self._ports.settings, self._ports.requests.table, self._ports.agreed
        classes = {DEFAULT_CLASS: SloClass(config.ttft_ms, config.tbt_ms), **config.classes}
        lately = self._lately(agreed.now_s)
        coming = lately[ALL_CLASSES]["prefill_tokens_per_s"]
        backlog = int(table.prefill_tokens(waiting).sum())
        busy_tokens_per_s = coming + self.backlog_tokens(waiting) / BACKLOG_S
        # the half-prefilled one's KV is in the forecast
        spare_kv = max(kv["capacity"] - kv["reserve"] - kv["forecast_peak"] - backlog, 0)
        base = decode_shape(len(decoding), int(table.context_tokens(decoding).sum()), beside_prefill=True)
        found = {}
        for name, declared in classes.items():
            limit_s = float(gap_limit_s(declared.slo(name)))
            time_s = min(limit_s * (1 - config.margin), config.idle_cap_ms / 1e3)
            gross = agreed.model.largest_chunk(base, 0, time_s) / time_s
            kept = discount(lately.get(name, {}).get("attainment"))
            found[name] = Headroom(max(gross - busy_tokens_per_s, 0.0) * kept, int(spare_kv * kept))
        return found


def length_figures(lengths: Any) -> dict[str, Any]:
    """What the predictor of output lengths says of itself, on the rank that has one; a coverage not yet known is left out."""
    service = lengths.service if lengths is not None else None
    if service is None or not hasattr(service, "metrics"):
        return {}
    return {
        name: figure
        for name, figure in service.metrics().items()
        if not (name.startswith("coverage") and not isinstance(figure, str) and figure < 0)
    }


def discount(attainment: float | None) -> float:
    """What headroom is worth where this share of a class attained lately; None: nobody finished."""
    if attainment is None:
        return 1.0
    return attainment if attainment >= LEAST_ATTAINMENT else 0.0
