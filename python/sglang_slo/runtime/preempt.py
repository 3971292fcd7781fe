"""Takes requests out of the running batch before KV runs short, each by the cheapest way out, and keeps
count.

`adjust` runs at the top of planning, when SGLang's batches are merged and at most one iteration is in
flight. A victim's token in flight is dropped, as in SGLang's own retraction, and computed again; so a victim
may be back at the next planning at the earliest, when that iteration's results are out (`settle`). SGLang's
retraction stays the last resort. All decisions come from the table and the latency model, thus from the tick:
ranks agree.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_slo.core import preemption
from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.preemption import WayOut
from sglang_slo.runtime.make_room import RoomMaker, freed_tokens
from sglang_slo.runtime.recall import Recall
from sglang_slo.runtime.swap import HostPool
from sglang_slo.runtime.swap_line import SwapLine, iteration_s

if TYPE_CHECKING:
    from sglang_slo.runtime.scheduler import SloScheduler

logger = logging.getLogger(__name__)

RELIEF_ITERATIONS = 32  # room that victims make for those who stay: the next pressure is so far away at least


class Preemptor:
    """Applies `core.preemption` to one scheduler."""

    def __init__(self, scheduler: SloScheduler, pool: HostPool | None) -> None:
        self.counts: Counter[str] = Counter()  # preemptions by way out; "stock": SGLang's retractions
        self.line = SwapLine(scheduler, pool) if pool is not None else None
        self._recall = Recall(scheduler, self.line, self.counts) if self.line is not None else None
        self._scheduler = scheduler
        self._room = RoomMaker(scheduler, self)
        self._swap_cost: tuple[float, float] | None = None
        self._leaving: list[Req] = []  # back in the queue as soon as nothing of theirs is in flight

    @property
    def _mode(self) -> str:
        return self._scheduler.slo_config.preempt

    def adjust(self, batch: ScheduleBatch, refused: list[int]) -> ScheduleBatch:
        """The running batch without the victims of this iteration, and with those who are back from the host.

        `refused`: rows that the last plan would have admitted but for KV, most urgent first.
        """
        if self.line is None or self._recall is None:
            _ = self._relieve(batch) or self._room.make(batch, refused)
            return batch
        self.line.next_planning(idle=batch.is_empty())
        if not self._relieve(batch) and not self._room.make(batch, refused):
            self._recall.begin(batch)
        return self._recall.ended(batch)

    # -- out

    def _relieve(self, batch: ScheduleBatch) -> bool:
        """Take victims out of `batch`, in place, if its decodes are about to run out of KV; True: it was so."""
        if self._mode == "stock" or batch.is_empty():
            return False
        s, table = self._scheduler, self._scheduler.slo_book.table
        if self.free_tokens() >= len(batch.reqs) * preemption.LONGEST_LEAD:
            return False
        rows = s.slo_book.rows(batch.reqs)
        remaining = table.remaining_tokens[rows]
        soon = preemption.growth_tokens(remaining, self._lead(batch.reqs))
        if self.free_tokens() >= soon:
            return False
        s.slo_pins.release_all()
        if self.free_tokens() < len(batch.reqs) and self.line is not None:
            self.line.release_due(now=True)
        free = self.free_tokens()
        if free + self.leaving_tokens >= soon:
            return False
        allowed = np.fromiter((self.may_leave(req) for req in batch.reqs), bool, len(rows))
        self.take_out(batch, self._choose(batch.reqs, rows, allowed, free))
        if self.free_tokens() < len(batch.reqs):
            if self.line is not None:
                self.line.release_due(now=True)
            if self.free_tokens() < len(batch.reqs):
                self._park()
        return True

    def _park(self) -> None:
        """The half-prefilled request lets go of its KV, too; it may be back when its chunk in flight is over."""
        s, req = self._scheduler, self._scheduler.chunked_req
        if req is not None:
            s.slo_applier.park(req)
            s.waiting_queue.remove(req)
            self._leaving.append(req)

    def _lead(self, reqs: list[Req]) -> int:
        """Iterations ahead to act: a swap needs some to hide its copy."""
        if self.line is None or not self.line.pool.hides or self._mode not in ("auto", "swap"):
            return 1
        longest = max(req.seqlen for req in reqs)
        copy_s = preemption.swap_s(self._scheduler.slo_model, longest) / 2
        return preemption.lead_iterations(copy_s, iteration_s(self._scheduler, reqs))

    def may_leave(self, req: Req) -> bool:
        """Whether a running request can be a victim now.

        Not one that was preempted often enough. Not one whose first token is in flight: it would lose it.
        SGLang's penalties count the output only while it is decoded, so they would start anew; input
        embeddings would, too.
        """
        table, params = self._scheduler.slo_book.table, req.sampling_params
        penalised = params.frequency_penalty or params.presence_penalty or params.min_new_tokens
        few = table.preemptions[req.slo_row] < self._scheduler.slo_config.max_preemptions
        ending = req.to_finish is not None
        return bool(few and len(req.output_ids) and not ending and not penalised and req.input_embeds is None)

    def _may_swap(self, req: Req) -> bool:
        """Whether SGLang's own state of a request can be put together again for decoding."""
        plain = req.multimodal_inputs is None and req.session is None
        return self.line is not None and plain and not self._scheduler.enable_lora

    def _choose(self, reqs: list[Req], rows: np.ndarray, allowed: np.ndarray, free: int) -> np.ndarray:
        """Positions of the victims, so that those who stay can grow for `RELIEF_ITERATIONS`; at least one
        stays.
        """
        table = self._scheduler.slo_book.table
        remaining = table.remaining_tokens[rows]
        spare = preemption.may_miss(
            table.gaps[rows], table.missed_gaps[rows], _expected(table.expected_tokens[rows])
        )
        bucket = preemption.protection(table.bucket[rows], (spare >= 0) & ~table.late[rows])
        frees = np.fromiter((freed_tokens(req) for req in reqs), np.int64, len(rows))
        if self._scheduler.slo_config.victims == "latest":
            order = preemption.latest_first(table.seq[rows], allowed)
        else:
            order = preemption.victim_order(bucket, remaining, frees, table.seq[rows], allowed)
        if len(order) == len(rows):
            order = order[:-1]
        need = preemption.growth_tokens(remaining, RELIEF_ITERATIONS) - free
        return preemption.victims(order, frees + np.clip(remaining, 1, RELIEF_ITERATIONS), need)

    def take_out(self, batch: ScheduleBatch, positions: np.ndarray) -> None:
        if len(positions) == 0:
            return
        leaving = [batch.reqs[i] for i in positions.tolist()]
        stay = np.setdiff1d(np.arange(len(batch.reqs)), positions)
        staying = [batch.reqs[i] for i in stay]
        ways = self._ways_out(staying, leaving)
        seconds = iteration_s(self._scheduler, staying)
        batch.filter_batch(keep_indices=stay.tolist())
        batch.batch_is_full = False
        for req, way in zip(leaving, ways, strict=True):
            self._leave(req, way, seconds)

    def _ways_out(self, stay: list[Req], leaving: list[Req]) -> list[WayOut]:
        s, ways = self._scheduler, []
        room = self._room_left(stay, leaving) if s.tree_cache.is_tree_cache() else 0
        swapped = 0
        for req in leaving:
            context = req.kv_committed_len
            pinned = req.kv.kv_allocated_len - freed_tokens(req)
            fits = (
                self._may_swap(req) and self.line is not None and self.line.pool.room_for(swapped + context)
            )
            host_room = context if fits else 0
            costs = preemption.costs(s.slo_model, context, pinned, req.cache_protected_len, room, host_room)
            way = preemption.way_out(costs, self._mode)
            room -= context - pinned if way is WayOut.KEEP else 0
            swapped += context if way is WayOut.SWAP else 0
            ways.append(way)
        return ways

    def _room_left(self, stay: list[Req], leaving: list[Req]) -> int:
        """KV that stays free or evictable at the forecast peak of those who stay, once all who wait are in, tokens.

        A victim comes back behind them: what they take by then is evicted from the tree.
        """
        s = self._scheduler
        free = self.free_tokens() + sum(freed_tokens(req) for req in leaving)
        ledger = s.slo_viewer.ledger(s.slo_book.rows(stay), free)
        peak = getattr(ledger, "peak", s.max_total_num_tokens)
        waiting = s.slo_book.waiting_rows(s.waiting_queue)
        held = s.slo_book.table.held_tokens(waiting[waiting >= 0])
        return s.max_total_num_tokens - peak - int(held.sum())

    def _leave(self, req: Req, way: WayOut, iteration_s: float) -> None:
        s = self._scheduler
        self.counts[way.value] += 1
        s.slo_book.table.preemptions[req.slo_row] += 1
        s.slo_book.withdraw(req.slo_row)
        self._set_deadline(req)
        req.slo_computed_tokens = req.seqlen - 1
        if way is WayOut.SWAP and self.line is not None:
            req.slo_swapped = getattr(req, "slo_swapped", 0) + 1
            self.line.take(req, iteration_s)
            return
        release_kv_cache(req, s.tree_cache, is_insert=way is WayOut.KEEP)
        req.reset_for_retract()
        self._leaving.append(req)

    def free_tokens(self) -> int:
        s = self._scheduler
        return s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()

    @property
    def leaving_tokens(self) -> int:
        """KV that is free as soon as it is copied out."""
        return self.line.leaving_tokens if self.line else 0

    def _set_deadline(self, req: Req) -> None:
        table, row = self._scheduler.slo_book.table, req.slo_row
        if not len(req.output_ids):
            return  # its first token is still to come, by the deadline it came with
        rows = np.array([row])
        spare = preemption.may_miss(
            table.gaps[rows], table.missed_gaps[rows], _expected(table.expected_tokens[rows])
        )
        table.deadline_s[row] = preemption.return_by_s(
            float(table.last_token_s[row]),
            float(table.tbt_s[row]),
            -1 if table.late[row] else int(spare[0]),
        )

    # -- back into the queue

    def settle(self) -> None:
        """Put this iteration's victims into the queue; called when the iteration is planned."""
        for req in self._leaving:
            self.requeue(req)
        self._leaving.clear()

    def requeue(self, req: Req) -> None:
        """Into the queue of those who have prefill to do."""
        s = self._scheduler
        s.slo_book.open(req, req.slo, 0.0, s.slo_model)
        s.slo_viewer.look_up_prefix(req)
        s.waiting_queue.append(req)
        req.time_stats.set_wait_queue_entry_time()

    def before_decode(self, batch: ScheduleBatch) -> None:
        """What is only kept for later is let go before SGLang looks whether it has to retract."""
        if self.free_tokens() < len(batch.reqs):
            self._scheduler.slo_pins.release_all()
            if self.line is not None:
                self.line.release_due(now=True)

    def retracted(self, req: Req) -> None:
        """SGLang's own retraction took `req` out."""
        req.slo_computed_tokens = req.seqlen - 1
        self.counts["stock"] += 1
        self._scheduler.slo_book.table.preemptions[req.slo_row] += 1
        self._scheduler.slo_book.withdraw(req.slo_row)
        self._set_deadline(req)

    # -- what a swap costs

    def swap_figures(self) -> dict[str, float]:
        """Host KV used and there, and the context from which swapping is cheaper than computing again; tokens.

        Empty where nothing can be swapped; the crossing is inf where swapping never pays.
        """
        if self.line is None:
            return {}
        pool, crossing = self.line.pool, preemption.crossing_tokens(self._scheduler.slo_model)
        return {
            "host_used": pool.used_tokens,
            "host_capacity": pool.capacity_tokens,
            "crossing": crossing,
            "failed_copies": self.line.failed,
        }

    def measured(self) -> tuple[float, float] | None:
        """(overhead s, bytes per s) of transfers as this rank sees them, if there is news."""
        meter = self.line.pool.meter if self.line else None
        return meter.fit() if meter is not None and meter.news else None

    def priced(self, model: LatencyModel, swap: tuple[float, float] | None) -> LatencyModel:
        """`model` with what swapping costs: as rank 0 measured it last, `swap` if that is new."""
        self._swap_cost = swap or self._swap_cost
        if self.line is None or self._swap_cost is None:
            return model
        overhead_s, rate = self._swap_cost
        per_token = self.line.pool.bytes_per_token
        return replace(model, swap_overhead_s=overhead_s, swap_bytes_per_s=rate, kv_bytes_per_token=per_token)

    # -- for the scheduler

    def alive(self) -> list[Req]:
        """Requests that are nowhere else in the scheduler."""
        return [*self._leaving, *(self.line or ())]

    def arriving_rows(self) -> np.ndarray:
        """Rows that hold KV for their return, int[n]."""
        return self._scheduler.slo_book.rows([w.req for w in self.line.arriving] if self.line else [])

    def next_back_rows(self) -> np.ndarray:
        """The row that newcomers leave room for, int[0 or 1]: it returns from the host as soon as there is some."""
        head, _ = self._recall.holds_up() if self._recall else (None, False)
        return self._scheduler.slo_book.rows([head.req] if head else [])

    def overdue_row(self) -> int:
        """The row that has waited, or been away, so long that nobody overtakes it any more; -1: there is none."""
        head, overdue = self._recall.holds_up() if self._recall else (None, False)
        return head.req.slo_row if head is not None and overdue else self._scheduler.slo_planner.held_up_by

    def at_rest(self, batch: ScheduleBatch) -> bool:
        """Nobody is on the way out or back, and `batch` can decode for a while before KV runs short."""
        return self.idle and self.free_tokens() >= len(batch.reqs) * preemption.LONGEST_LEAD

    @property
    def idle(self) -> bool:
        """No request is anywhere between leaving and being back."""
        return not self._leaving and (self.line is None or self.line.empty)

    def abort(self, rid: str, everyone: bool) -> None:
        """End swapped requests whose id begins with `rid`."""
        if self.line is not None:
            self.line.abort(rid, everyone)

    def release_device(self) -> None:
        """Give back all device KV that is held for swapped requests."""
        if self.line is not None:
            self.line.cancel_arrivals()
            self.line.release_due(now=True)

    def weights_change(self) -> None:
        """What was computed with the old weights is not loaded again."""
        if self.line is not None:
            self.line.forget()


def _expected(tokens: np.ndarray) -> np.ndarray:
    return np.minimum(tokens, 1 << 30).astype(np.int64)
