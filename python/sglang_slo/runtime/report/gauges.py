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
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_slo.core.attainment import gap_limit_s
from sglang_slo.core.latency import decode_shape
from sglang_slo.core.slo import DEFAULT_CLASS, SloClass
from sglang_slo.observe.gauges import Gauges, Headroom
from sglang_slo.observe.window import ALL_CLASSES

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.runtime.scheduler.scheduler import SloScheduler

LEAST_ATTAINMENT = 0.5  # a class that attains less lately has no headroom
BACKLOG_S = 1.0  # what waits is to be prefilled within so long


def gauges(scheduler: SloScheduler) -> Gauges:
    """The state of a scheduler that schedules by deadlines (`slo_on`)."""
    plan, preempt = scheduler.slo_plan, scheduler.slo_preempt
    waiting = [req for req in scheduler.waiting_queue if getattr(req, "slo_row", -1) >= 0]
    decoding = decoding_rows(scheduler)
    kv = kv_tokens(scheduler, decoding)
    return Gauges(
        running=len(decoding),
        queued=Counter(req.slo.slo_class for req in waiting),
        parked=sum(getattr(req, "slo_parked", 0) > 0 for req in waiting),
        preempted=sum(req.retraction_count > 0 for req in waiting),
        given_up=plan.infeasible if plan else 0,
        budget_s=plan.budget_s if plan and 0 < plan.budget_s < math.inf else None,
        chunk_tokens=sum(tokens for _, tokens in plan.prefill) if plan else 0,
        plan_s=scheduler.slo_plan_s,
        kv=kv,
        preemptions=dict(preempt.counts),
        swap_ins=preempt.swap_ins,
        swap=preempt.swap_figures(),
        latency=scheduler.slo_fit.metrics(),
        lengths=length_figures(scheduler),
        headroom=headroom(scheduler, decoding, kv, scheduler.slo_book.rows(waiting)),
    )


def length_figures(scheduler: SloScheduler) -> dict[str, Any]:
    """What the predictor of output lengths says of itself, on the rank that has one; a coverage not yet known is left out."""
    service = scheduler.slo_lengths.service if scheduler.slo_lengths is not None else None
    if service is None or not hasattr(service, "metrics"):
        return {}
    return {
        name: figure
        for name, figure in service.metrics().items()
        if not (name.startswith("coverage") and not isinstance(figure, str) and figure < 0)
    }


def decoding_rows(scheduler: SloScheduler) -> np.ndarray:
    """Rows of all requests that decode, int[n], a part that was launched alone included."""
    reqs: list[Req] = list(scheduler.running_batch.reqs)
    if scheduler.slo_split is not None:
        reqs += scheduler.slo_split.reqs
    live = {req.slo_row: req for req in reqs if getattr(req, "slo_row", -1) >= 0}
    return np.fromiter(live, np.int64, len(live))


def kv_tokens(scheduler: SloScheduler, decoding: np.ndarray) -> dict[str, float]:
    """The pool and the ledger's view of it, tokens."""
    capacity = scheduler.max_total_num_tokens
    free = scheduler.token_to_kv_pool_allocator.available_size()
    evictable = scheduler.tree_cache.evictable_size()
    ledger = scheduler.slo_viewer.ledger(decoding, free + evictable)
    held = capacity - free - evictable
    peak = getattr(ledger, "peak", held)
    return {
        "capacity": capacity,
        "free": free,
        "evictable": evictable,
        "held": held,
        "forecast_peak": peak,
        "reserve": scheduler.slo_viewer.reserve.tokens,
        "arrival_reserve": scheduler.slo_viewer.arrivals.tokens(scheduler.slo_tick.now_s),
        "pinned": scheduler.slo_pins.tokens,
    }


def headroom(
    scheduler: SloScheduler, decoding: np.ndarray, kv: dict[str, float], waiting: np.ndarray
) -> dict[str, Headroom]:
    """By class: those that the server declares, and its default for requests without one."""
    config, table = scheduler.slo_config, scheduler.slo_book.table
    classes = {DEFAULT_CLASS: SloClass(config.ttft_ms, config.tbt_ms), **config.classes}
    lately = scheduler.slo_observer.lately(scheduler.slo_tick.now_s)
    coming = lately[ALL_CLASSES]["prefill_tokens_per_s"]
    backlog = int(table.prefill_tokens(waiting).sum())
    busy_tokens_per_s = coming + backlog / BACKLOG_S
    spare_kv = max(kv["capacity"] - kv["reserve"] - kv["forecast_peak"] - backlog, 0)
    base = decode_shape(len(decoding), int(table.context_tokens(decoding).sum()), beside_prefill=True)
    found = {}
    for name, declared in classes.items():
        limit_s = float(gap_limit_s(declared.slo(name)))
        time_s = min(limit_s * (1 - config.margin), config.idle_cap_ms / 1e3)
        gross = scheduler.slo_model.largest_chunk(base, 0, time_s) / time_s
        kept = discount(lately.get(name, {}).get("attainment"))
        found[name] = Headroom(max(gross - busy_tokens_per_s, 0.0) * kept, int(spare_kv * kept))
    return found


def discount(attainment: float | None) -> float:
    """What headroom is worth where this share of a class attained lately; None: nobody finished."""
    if attainment is None:
        return 1.0
    return attainment if attainment >= LEAST_ATTAINMENT else 0.0
