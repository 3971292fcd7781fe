"""Has SGLang's own code build the planned prefill batch, and refuses whom a plan sheds."""

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

from sglang_slo import clock
from sglang_slo.runtime.kv.preempt import release_parked
from sglang_slo.runtime.requests import batches
from sglang_slo.runtime.scheduler.planned_adder import PlannedAdder
from sglang_slo.server.refusals import HOPELESS, QUEUE, message

if TYPE_CHECKING:
    from sglang_slo.core.plan import IterationPlan
    from sglang_slo.runtime.scheduler.scheduler import SloScheduler


class Applier:
    """Applies plans to one scheduler."""

    def __init__(self, scheduler: SloScheduler) -> None:
        self._scheduler = scheduler

    def prefill(
        self, plan: IterationPlan, planned: dict[Req, int], running_batch: ScheduleBatch
    ) -> NextBatchPlan:
        """SGLang's own code builds the planned prefill batch; `planned`: the plan's requests and their tokens.

        Raises only with every request where it was.
        """
        s = self._scheduler
        decoding, aside = running_batch, None
        if plan.mixed and plan.decode is not None:
            decoding, aside = batches.divide(running_batch, plan.decode)
        if s.chunked_req is not None and s.chunked_req not in planned:
            if not s.slo_config.park:
                return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
            self.park(s.chunked_req)
        s.is_mixed_chunk = plan.mixed
        decoding.batch_is_full = running_batch.batch_is_full = False
        with self._only(planned):
            batch, decoding = s._get_new_batch_prefill_raw(None, decoding)
        if aside is None:
            s.slo_step = NextBatchPlan(batch_to_run=batch, running_batch=decoding)
        elif batch is not None and decoding.is_empty():  # those who decode are in the batch
            s.slo_step = NextBatchPlan(batch_to_run=batch, running_batch=aside)
        else:  # the places that the plan names are not theirs any more: without prefill, everyone decodes
            s.slo_step = NextBatchPlan(batch_to_run=batch, running_batch=running_batch)
            s.slo_plan = replace(plan, decode=None)
        return s.slo_step

    @contextlib.contextmanager
    def _only(self, planned: dict[Req, int]) -> Iterator[None]:
        """While SGLang's prefill code runs: the queue is the plan, in its order, and nobody reorders it.

        If that code raises, those it had admitted give back their locks: they are in the queue as before.
        """
        s = self._scheduler
        everyone, policy, adder, cut = s.waiting_queue, s.policy, stock.PrefillAdder, s.chunked_req
        s.waiting_queue = offered = [r for r in planned if r is not cut]
        s.policy = _KeepOrder
        admitted: list[Req] = []
        stock.PrefillAdder = partial(PlannedAdder, planned=planned, admitted=admitted)
        try:
            yield
        except BaseException:
            s.chunked_req = cut
            if s.waiting_queue is offered:  # else they are in a batch already
                for req in admitted:
                    s.tree_cache.dec_lock_ref(req.last_node)
            raise
        finally:
            stock.PrefillAdder, s.policy = adder, policy
            left = set(s.waiting_queue)
            gone = {req for req in offered if req not in left}
            queue = [req for req in everyone if req not in gone] if gone else everyone
            # whatever SGLang's code put into the queue meanwhile (a grammar that became ready) stays in it
            queue.extend(req for req in s.waiting_queue if req not in planned)
            s.waiting_queue = queue

    def park(self, req: Req) -> None:
        """Set the half-prefilled request aside: its KV stays in the radix tree, where its next turn finds it."""
        s = self._scheduler
        release_parked(s, req)
        s.waiting_queue.append(req)
        s.slo_viewer.look_up_prefix(req)

    def refuse(self, shed: list[int], hopeless: list[int]) -> None:
        """Turn requests away, each with the reason and an answer: too long a queue (503), or no chance left (429)."""
        limit_s = self._scheduler.slo_config.queue_limit_s
        queue = f"the queue is longer than {limit_s or 0.0:g} s (--slo-queue-limit-s): try again later"
        late = (
            "its limits cannot be met any more (--slo-refuse hopeless): try again later, or with looser ones"
        )
        self._turn_away(shed, message(QUEUE, queue))
        self._turn_away([row for row in hopeless if row not in set(shed)], message(HOPELESS, late))

    def _turn_away(self, rows: list[int], told: str) -> None:
        s = self._scheduler
        reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": told}
        refused = {s.slo_book.reqs[row]: None for row in rows if row in s.slo_book.reqs}
        if not refused:
            return
        s.waiting_queue = [req for req in s.waiting_queue if req not in refused]
        for req in refused:
            s.ipc_channels.send_to_tokenizer.send_output(AbortReq(finished_reason=reason, rid=req.rid), req)
            req.time_stats.trace_ctx.abort(abort_info={"reason": told})
            s.slo_book.close(req)
            s.slo_gone(req)
            if s.slo_reporter is not None:
                s.slo_reporter.ended(req, clock.now(), "shed")


class _KeepOrder:
    """In the place of SGLang's queue policy while a plan is applied."""

    @staticmethod
    def calc_priority(waiting_queue: list[Req], running_batch: ScheduleBatch) -> bool:
        return False
