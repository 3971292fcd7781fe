"""The requests whose KV lies in host memory: how each leaves the device, waits, comes back, or ends there.

    running ──take──▶ out ──bring_back──▶ arriving ──ready──▶ running
                       │  ▲                  │
              abort, forget (recompute)      └─cancel─▶ out

Device slots of a request that left stay taken until its copy is predicted to be over (`release_due`), those of one
that comes back are filled before it decodes: transfers hide behind iterations. How many iterations is counted, not
timed, so that all ranks do the same. A copy that turns out to have failed, on any rank, means recompute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch
from sglang.srt.mem_cache.allocation import alloc_token_slots
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_slo.core import preemption
from sglang_slo.core.latency import decode_shape
from sglang_slo.runtime.swap import HostCopy, HostPool

if TYPE_CHECKING:
    from sglang_slo.runtime.scheduler import SloScheduler

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Swapped:
    """A request whose KV is on the host. `since`, `ready`: plannings, counted."""

    req: Req
    copy: HostCopy
    since: int
    ready: int = 0  # when its KV is predicted to be back on the device


@dataclass(slots=True, eq=False)
class Leftover:
    """Device KV that is still being copied out: own slots, and the node of the radix tree that is held."""

    due: int
    slots: torch.Tensor
    node: Any
    copy: HostCopy


class SwapLine:
    """All swapped requests of one scheduler."""

    def __init__(self, scheduler: SloScheduler, pool: HostPool) -> None:
        self.pool = pool
        self.out: list[Swapped] = []
        self.arriving: list[Swapped] = []
        self.failed = 0  # copies that could not be used
        self._scheduler = scheduler
        self._leftovers: list[Leftover] = []
        self._planning = 0

    # -- out

    def take(self, req: Req, iteration_s: float) -> None:
        """Move the KV of a running request to the host; it is in no batch any more when this is called.

        What is in flight for it is dropped with its token, so only the KV before that counts.
        """
        s = self._scheduler
        tokens = req.seqlen - 1
        row = s.req_to_token_pool.req_to_token[req.req_pool_idx]
        slots = row[:tokens].to(torch.int64, copy=True)
        own = row[req.cache_protected_len : req.kv.kv_allocated_len].to(torch.int64, copy=True)
        copy = self.pool.save(slots)
        due = self._planning + self._hidden(tokens, iteration_s)
        self._leftovers.append(Leftover(due, own, req.last_node, copy))
        s.req_to_token_pool.free(req)
        _forget_device(req)
        req.is_retracted = True
        req.retraction_count += 1
        self.out.append(Swapped(req, copy, self._planning))
        if due <= self._planning:
            self.release_due()

    def _hidden(self, tokens: int, iteration_s: float) -> int:
        """Iterations that a transfer is given to hide behind."""
        if not self.pool.hides:
            return 0
        return math.ceil(preemption.swap_s(self._scheduler.slo_model, tokens) / 2 / max(iteration_s, 1e-6))

    def release_due(self, now: bool = False) -> None:
        """Give back device KV whose copy should be over; with `now`, all of it: the device then waits for the rest."""
        s, kept = self._scheduler, []
        for left in self._leftovers:
            if not now and left.due > self._planning:
                kept.append(left)
                continue
            self.pool.fence(left.copy)
            s.token_to_kv_pool_allocator.free(left.slots)
            s.tree_cache.dec_lock_ref(left.node)
        self._leftovers = kept

    # -- back

    def next_planning(self, idle: bool) -> None:
        """Once an iteration, before anything else. `idle`: no batch runs that transfers could hide behind."""
        self._planning += 1
        self.release_due(now=idle)

    def head(self) -> Swapped | None:
        """The one to come back next: nearest deadline that can be kept, then arrival. Not one that just left."""
        book = self._scheduler.slo_book
        table, start_s = book.table, book.base_s(self._scheduler.slo_tick.now_s)

        def urgency(w: Swapped) -> tuple[float, int]:
            deadline_s = float(table.deadline_s[w.req.slo_row])
            return deadline_s if deadline_s >= start_s else math.inf, int(table.seq[w.req.slo_row])

        return min((w for w in self.out if w.since < self._planning), key=urgency, default=None)

    def bring_back(self, waiting: Swapped, iteration_s: float) -> bool:
        """Start to load a request's KV into new slots; False: it has to be computed again, and is in the queue.

        What the radix tree still has of it is used from there. The caller has seen to the room.
        """
        s, req, tokens = self._scheduler, waiting.req, waiting.copy.tokens
        self.out.remove(waiting)
        req.init_next_round_input(s.tree_cache)
        prefix = len(req.prefix_indices)
        s.tree_cache.inc_lock_ref(req.last_node)
        slots = self._allot(req, prefix, tokens)
        if not self._agreed(self._loaded(waiting.copy, prefix, slots)):
            self.failed += 1
            logger.warning("sglang-slo: the copy of request %s cannot be used: recompute", req.rid)
            self.pool.fence(waiting.copy)
            release_kv_cache(req, s.tree_cache, is_insert=False)
            self._recompute(waiting)
            return False
        waiting.ready = self._planning + self._hidden(tokens - prefix, iteration_s)
        self.arriving.append(waiting)
        return True

    def _allot(self, req: Req, prefix: int, tokens: int) -> torch.Tensor:
        s = self._scheduler
        slots = torch.empty(0, dtype=torch.int64, device=s.req_to_token_pool.device)
        if tokens > prefix:
            slots = alloc_token_slots(s.tree_cache, tokens - prefix)
        s.req_to_token_pool.alloc([req])
        row = req.req_pool_idx
        s.req_to_token_pool.write((row, slice(0, prefix)), req.prefix_indices.to(torch.int32))
        s.req_to_token_pool.write((row, slice(prefix, tokens)), slots.to(torch.int32))
        req.kv = ReqKvInfo(kv_allocated_len=tokens, swa_evicted_seqlen=0)
        req.kv_committed_len = tokens
        return slots

    def _loaded(self, copy: HostCopy, prefix: int, slots: torch.Tensor) -> bool:
        if not copy.ok:
            return False
        try:
            if len(slots):
                self.pool.load(copy, prefix, slots)
        except RuntimeError as error:
            logger.warning("sglang-slo: copying %d tokens back failed: %s", len(slots), error)
            return False
        return True

    def _agreed(self, fine: bool) -> bool:
        """Whether it is fine on all tensor-parallel ranks, which are all here now."""
        s = self._scheduler
        if s.ps.tp_size == 1:
            return fine
        vote = torch.tensor([int(fine)])
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=s.tp_cpu_group)
        return bool(vote.item())

    def ready(self, now: bool) -> ScheduleBatch | None:
        """Those whose KV should be back, as a batch to decode; with `now`, all: the device waits for the rest."""
        back = [w for w in self.arriving if now or w.ready <= self._planning]
        if not back:
            return None
        self.arriving = [w for w in self.arriving if w not in back]
        for w in back:
            self.pool.fence(w.copy)
            self.pool.drop(w.copy)
            w.req.is_retracted = False
        return decode_batch(self._scheduler, [w.req for w in back])

    # -- ends

    def cancel_arrivals(self) -> None:
        """Those on their way back stay on the host: their device KV is free again."""
        for w in self.arriving:
            self._withdraw(w)
            self.out.append(w)
        self.arriving = []

    def forget(self) -> None:
        """The copies are worth nothing any more (new weights): everyone is computed again."""
        self.cancel_arrivals()
        while self.out:
            self._recompute(self.out.pop())

    def abort(self, rid: str, everyone: bool) -> None:
        """End the requests whose id begins with `rid`; host and device memory are given back."""
        gone = [w for w in [*self.out, *self.arriving] if everyone or w.req.rid.startswith(rid)]
        for w in gone:
            if w in self.arriving:
                self._withdraw(w)
                self.arriving.remove(w)
            else:
                self.out.remove(w)
            self.pool.drop(w.copy)
            self._scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=w.req.rid), w.req)

    def _withdraw(self, w: Swapped) -> None:
        self.pool.fence(w.copy)
        release_kv_cache(w.req, self._scheduler.tree_cache, is_insert=False)
        _forget_device(w.req)

    def _recompute(self, w: Swapped) -> None:
        """Into the queue, as if its KV had been thrown away when it was preempted."""
        self.pool.drop(w.copy)
        w.req.reset_for_retract()
        w.req.retraction_count -= 1  # counted when it left
        self._scheduler.slo_preempt.requeue(w.req)

    # -- state

    def __iter__(self) -> Iterator[Req]:
        for w in [*self.out, *self.arriving]:
            yield w.req

    @property
    def leaving_tokens(self) -> int:
        """Device KV that is free once its copy is over."""
        return sum(len(left.slots) for left in self._leftovers)

    @property
    def empty(self) -> bool:
        """Nobody is swapped, and no device KV is still held."""
        return not (self.out or self.arriving or self._leftovers)


def _forget_device(req: Req) -> None:
    """A request that holds nothing on the device."""
    req.kv, req.kv_committed_len = None, 0
    req.last_node, req.cache_protected_len = None, 0
    req.prefix_indices = torch.empty((0,), dtype=torch.int64)


def decode_batch(scheduler: SloScheduler, reqs: list[Req]) -> ScheduleBatch:
    """A batch of requests whose KV is on the device up to their last token, ready to decode."""
    batch = scheduler._build_hisparse_decode_batch(reqs)
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    return batch


def iteration_s(scheduler: SloScheduler, reqs: list[Req]) -> float:
    """Predicted seconds of an iteration that decodes `reqs`."""
    return scheduler.slo_model.iteration_s(decode_shape(len(reqs), sum(req.seqlen for req in reqs)))
