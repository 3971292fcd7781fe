"""Has SGLang's own code build the planned prefill batch, and refuses whom a plan sheds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, NextBatchPlan, Req, ScheduleBatch

from sglang_slo.runtime.kv.preempt import release_parked
from sglang_slo.runtime.ports import Running, UnbuiltError
from sglang_slo.runtime.requests import batches
from sglang_slo.runtime.sglang import tree
from sglang_slo.server.refusals import HOPELESS, QUEUE, message

if TYPE_CHECKING:
    from sglang_slo.core.iteration_plan import IterationPlan
    from sglang_slo.observe.judge import Finish
    from sglang_slo.runtime.kv.held import HeldPrefills
    from sglang_slo.runtime.kv.look_up import PrefixLookUp
    from sglang_slo.runtime.ports import Ports


class Applier:
    """Applies plans to one scheduler.

    `queue_again` takes a request that may be in the queue from the next iteration on; `ended` is told of each request that
    was refused, and how it ended.
    """

    def __init__(
        self,
        ports: Ports,
        prefixes: PrefixLookUp,
        held: HeldPrefills,
        queue_again: Callable[[Req], None],
        ended: Callable[[Req, Finish], None],
    ) -> None:
        self._ports, self._prefixes, self._held = ports, prefixes, held
        self._queue_again, self._ended = queue_again, ended

    def prefill(
        self, plan: IterationPlan, planned: dict[Req, int], running_batch: ScheduleBatch
    ) -> NextBatchPlan:
        """SGLang's own code builds the planned prefill batch; `planned`: the plan's requests and their tokens.

        Raises only with every request where it was.
        """
        running = Running(running_batch, running_batch, None)
        if plan.mixed and plan.decode is not None:
            running = Running(running_batch, *batches.divide(running_batch, plan.decode))
        cut = self._ports.waiting.cut
        if cut is not None and cut not in planned:
            if not self._ports.settings.park:
                return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
            self.park(cut)
        running.part.batch_is_full = running_batch.batch_is_full = False
        self._make_room(planned, running.part.new_tokens_required_next_decode() if plan.mixed else 0)
        iteration, engine = self._ports.iteration, self._ports.batches
        engine.built = None
        try:
            step = engine.build_prefill(planned, iteration.loads, plan.mixed, running)
        except UnbuiltError as error:
            self._end(error.reqs, HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "error")
            for req in error.reqs:  # what is in flight of it ends in nothing
                req.finished_reason = FINISH_ABORT(str(error))
            raise
        finally:
            # its requests are in it, and nowhere else, whatever raised behind it
            iteration.step = engine.built
            with self._ports.trouble.noting("who is in a batch"):  # which is there, whatever becomes of this
                self._held.entered()
        # without prefill, everyone decodes
        if running.rest is not None and step.running_batch is running_batch:
            iteration.plan = replace(plan, decode=None)
        return step

    def _make_room(self, planned: dict[Req, int], decode_tokens: int) -> None:
        """Take from those set aside what the batch needs: SGLang's adder wants a page beyond each request's last one.

        `decode_tokens`: KV that the decodes beside it take.
        """
        pages = 2 * (len(planned) + 1)
        tokens = sum(planned.values()) + decode_tokens + pages * self._ports.kv.allocator.page_size
        self._held.make_room(tokens, rows=len(planned), spared=planned)

    def park(self, req: Req) -> None:
        """Set the half-prefilled request aside: its KV stays in the radix tree, where its next turn finds it.

        Or in its own row, where there is no tree.
        """
        if tree.shares_prefixes(self._ports.kv.tree):
            release_parked(self._ports, req)
            # not at once: SGLang would take the result of a chunk in flight for that of its next one
            self._queue_again(req)
            return
        self._held.hold(req)
        self._ports.waiting.cut = None
        self._ports.waiting.reqs.append(req)
        self._prefixes.look_up(req)

    def refuse(self, shed: list[int], hopeless: list[int]) -> None:
        """Turn requests away, each with the reason and an answer: too long a queue (503), or no chance left (429)."""
        limit_s = self._ports.settings.queue_limit_s
        queue = f"the queue is longer than {limit_s or 0.0:g} s (--slo-queue-limit-s): try again later"
        late = (
            "its limits cannot be met any more (--slo-refuse hopeless): try again later, or with looser ones"
        )
        self._turn_away(shed, message(QUEUE, queue))
        self._turn_away([row for row in hopeless if row not in set(shed)], message(HOPELESS, late))

    def _turn_away(self, rows: list[int], told: str) -> None:
        registry, waiting = self._ports.requests, self._ports.waiting
        refused = {registry.reqs[row]: None for row in rows if row in registry.reqs}
        if refused:
            waiting.reqs = [req for req in waiting.reqs if req not in refused]
            self._end(refused, HTTPStatus.SERVICE_UNAVAILABLE, told, "shed")

    def _end(self, reqs: Collection[Req], status: HTTPStatus, told: str, finish: Finish) -> None:
        """Answer requests that are in none of SGLang's places any more, and forget them."""
        reason = {"type": "abort", "status_code": status, "message": told}
        for req in reqs:
            self._ports.tell(AbortReq(finished_reason=reason, rid=req.rid), req)
        for req in reqs:  # all are answered: what raises from here on costs nobody anything
            with self._ports.trouble.noting("a refusal"):
                self._ports.requests.close(req)
                self._ended(req, finish)
            with self._ports.trouble.noting("the trace of a refusal"):
                req.time_stats.trace_ctx.abort(abort_info={"reason": told})
