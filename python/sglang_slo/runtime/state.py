"""Reads the scheduler's state of the moment into `Gauges`: queues, budget, KV, latency model, headroom.

Called about once a second, between iterations, on the scheduler's own thread; changes nothing. Headroom of
a bucket: with everyone decoding now, the longest prefill chunk that an iteration within the bucket's limit
still has room for, per second of such iterations; and the KV left below the forecast peak and reserve.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from sglang_slo.core.latency import decode_shape
from sglang_slo.core.slo import BEST_EFFORT_BUCKET, BUCKET_RATIO, TIGHTEST_BUCKET_S, bucket, limit_s
from sglang_slo.observe.gauges import Gauges, Headroom

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.runtime.scheduler import SloScheduler


def gauges(scheduler: SloScheduler) -> Gauges:
    """The state of a scheduler that schedules by deadlines (`slo_on`)."""
    table, plan = scheduler.slo_book.table, scheduler.slo_plan
    waiting = [req for req in scheduler.waiting_queue if getattr(req, "slo_row", -1) >= 0]
    decoding = decoding_rows(scheduler)
    kv = kv_tokens(scheduler, decoding)
    queued = Counter(table.bucket[scheduler.slo_book.rows(waiting)].tolist())
    return Gauges(
        running=len(decoding),
        queued=queued,
        parked=sum(getattr(req, "slo_parked", 0) > 0 for req in waiting),
        preempted=sum(req.retraction_count > 0 for req in waiting),
        lost=plan.infeasible if plan else 0,
        budget_s=plan.budget_s if plan and 0 < plan.budget_s < math.inf else None,
        chunk_tokens=sum(tokens for _, tokens in plan.prefill) if plan else 0,
        plan_s=scheduler.slo_plan_s,
        kv=kv,
        ways_out=dict(scheduler.slo_preempt.counts),
        swap=scheduler.slo_preempt.swap_figures(),
        latency=scheduler.slo_fit.metrics(),
        headroom=headroom(scheduler, decoding, kv, set(queued)),
    )


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
    scheduler: SloScheduler, decoding: np.ndarray, kv: dict[str, float], queued: set[int]
) -> dict[int, Headroom]:
    """By bucket, for those of the declared classes, of what waits, and for best effort."""
    config, table = scheduler.slo_config, scheduler.slo_book.table
    declared = {bucket(limit_s(c.tbt_ms)) for c in config.classes.values()}
    running = set(table.bucket[decoding].tolist())
    spare_kv = int(max(kv["capacity"] - kv["reserve"] - kv["forecast_peak"], 0))
    context = int(table.context_tokens(decoding).sum())
    base = decode_shape(len(decoding), context, beside_prefill=True)
    found = {}
    for index in sorted(declared | running | queued | {BEST_EFFORT_BUCKET}):
        limit = TIGHTEST_BUCKET_S * BUCKET_RATIO**index
        time_s = min(limit * (1 - config.margin), config.idle_cap_ms / 1e3)
        chunk = scheduler.slo_model.largest_chunk(base, 0, time_s)
        found[index] = Headroom(chunk / time_s, spare_kv)
    return found
