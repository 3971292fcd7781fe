"""Carries a plan out with SGLang's own code: prefill batches, parking, shedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_slo import clock
from sglang_slo.runtime import batches
from sglang_slo.runtime.admission import PlannedAdder

if TYPE_CHECKING:
    from sglang_slo.core.plan import IterationPlan
    from sglang_slo.runtime.scheduler import SloScheduler


class Applier:
    """Applies plans to one scheduler."""

    def __init__(self, scheduler: SloScheduler) -> None:
        self._scheduler = scheduler

    def prefill(
        self, plan: IterationPlan, planned: dict[Req, int], running_batch: ScheduleBatch
    ) -> NextBatchPlan:
        """SGLang's own code builds the planned prefill batch; `planned`: the plan's requests and their tokens."""
        s = self._scheduler
        if s.chunked_req is not None and s.chunked_req not in planned:
            if not s.slo_config.park:
                return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
            self.park(s.chunked_req)
        aside = None
        if plan.mixed and plan.decode is not None:
            running_batch, aside = batches.split(running_batch, plan.decode), running_batch
        s.is_mixed_chunk = plan.mixed
        running_batch.batch_is_full = False
        with self._only(planned):
            batch, running_batch = s._get_new_batch_prefill_raw(None, running_batch)
        if aside is not None:
            running_batch = batches.merge(aside, running_batch)
            # the places that the plan names are not theirs any more: without prefill, everyone decodes
            s.slo_plan = replace(plan, decode=None)
        return NextBatchPlan(batch_to_run=batch, running_batch=running_batch)

    @contextlib.contextmanager
    def _only(self, planned: dict[Req, int]) -> Iterator[None]:
        """While SGLang's prefill code runs: the queue is the plan, in its order, and nobody reorders it."""
        s = self._scheduler
        everyone, policy, adder = s.waiting_queue, s.policy, stock.PrefillAdder
        s.waiting_queue = offered = [r for r in planned if r is not s.chunked_req]
        s.policy = _KeepOrder
        stock.PrefillAdder = partial(PlannedAdder, planned=planned)
        try:
            yield
        finally:
            stock.PrefillAdder, s.policy = adder, policy
            left = set(s.waiting_queue)
            for req in offered:
                if req not in left:
                    everyone.remove(req)
            # whatever SGLang's code put into the queue meanwhile (a grammar that became ready) stays in it
            everyone.extend(req for req in s.waiting_queue if req not in planned)
            s.waiting_queue = everyone

    def park(self, req: Req) -> None:
        """Set the half-prefilled request aside: its KV stays in the radix tree, where its next turn finds it."""
        s = self._scheduler
        req.slo_computed_tokens = req.kv_committed_len
        release_kv_cache(req, s.tree_cache, is_insert=True)
        req.reset_for_retract()
        req.retraction_count -= 1  # nothing was taken from it
        req.slo_parked = getattr(req, "slo_parked", 0) + 1
        s.chunked_req = None
        s.slo_viewer.look_up_prefix(req)
        s.waiting_queue.append(req)

    def shed(self, rows: list[int]) -> None:
        """Refuse requests that would wait longer than the queue limit: HTTP 503, which names a time to retry."""
        s = self._scheduler
        limit_s = s.slo_config.queue_limit_s
        message = f"the queue is longer than {limit_s:g} s (--slo-queue-limit-s): try again later"
        reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
        for req in [s.slo_book.reqs[row] for row in rows]:
            s.waiting_queue.remove(req)
            s.ipc_channels.send_to_tokenizer.send_output(AbortReq(finished_reason=reason, rid=req.rid), req)
            req.time_stats.trace_ctx.abort(abort_info={"reason": message})
            s.slo_book.close(req)
            s.slo_gone(req)
            if s.slo_reporter is not None:
                s.slo_reporter.ended(req, clock.now(), "shed")


class _KeepOrder:
    """In the place of SGLang's queue policy while a plan is applied."""

    @staticmethod
    def calc_priority(waiting_queue: list[Req], running_batch: ScheduleBatch) -> bool:
        return False
