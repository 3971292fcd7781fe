"""Takes requests out of the running batch before KV runs short, each by the cheapest way out, and keeps
count.

`relieve` runs at the top of planning, when SGLang's batches are merged and at most one iteration is in
flight. A victim's token in flight is dropped, as in SGLang's own retraction, and computed again; so a victim
may be back at the next planning at the earliest, when that iteration's results are out (`settle`). SGLang's
retraction stays the last resort. All decisions come from the table and the latency model, thus from the tick:
ranks agree.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_slo.core import preemption
from sglang_slo.core.latency import decode_shape
from sglang_slo.core.preemption import WayOut

if TYPE_CHECKING:
    from sglang_slo.runtime.scheduler import SloScheduler

logger = logging.getLogger(__name__)

CRITICAL_SHARE = 0.5  # of its first-token limit, or less, is left to a request that others make room for
MOST_NEEDY = 4  # requests that room is made for in one iteration
MOST_VICTIMS = 4  # requests that leave for one
RELIEF_ITERATIONS = 32  # room that victims make for those who stay: the next pressure is so far away at least


class Preemptor:
    """Applies `core.preemption` to one scheduler."""

    def __init__(self, scheduler: SloScheduler) -> None:
        self.counts: Counter[str] = Counter()  # preemptions by way out; "stock": SGLang's retractions
        self._scheduler = scheduler
        self._leaving: list[Req] = []  # back in the queue as soon as nothing of theirs is in flight

    @property
    def _mode(self) -> str:
        return self._scheduler.slo_config.preempt

    # -- out

    def relieve(self, batch: ScheduleBatch) -> None:
        """Take victims out of the running `batch`, in place, if its decodes are about to run out of KV."""
        if self._mode == "stock" or batch.is_empty():
            return
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows = s.slo_book.rows(batch.reqs)
        remaining = table.remaining_tokens[rows]
        soon = preemption.growth_tokens(remaining, self._lead(rows))
        if self._free_tokens() >= soon:
            return
        s.slo_pins.release_all()
        free = self._free_tokens()
        if free >= soon:
            return
        allowed = np.fromiter((self._may_leave(req) for req in batch.reqs), bool, len(rows))
        chosen = self._choose(batch.reqs, rows, allowed, free)
        self._take_out(batch, chosen)
        if self._free_tokens() < len(batch.reqs) and s.chunked_req is not None:
            s._park(s.chunked_req)

    def make_room(self, batch: ScheduleBatch, refused: list[int]) -> None:
        """Ahead of need: let requests that can spare a long gap leave, in place, for critical ones without room.

        `refused`: rows that the last plan would have admitted but for KV, most urgent first. A request is critical
        when little of its first-token limit is left. Only those leave that miss nothing by it (a spare gap that
        their 99th percentile permits already, or a limit that is lost), and only if they cost less than the
        newcomer takes itself.
        """
        s = self._scheduler
        if self._mode == "stock" or s.slo_config.kv == "stock" or batch.is_empty():
            return
        for row in refused[:MOST_NEEDY]:
            if row in s.slo_book.reqs and self._critical(row):
                self._make_room_for(row, batch)

    def _critical(self, row: int) -> bool:
        s, table = self._scheduler, self._scheduler.slo_book.table
        own_s = s.slo_model.prefill_s(0, int(table.prefill_tokens(np.array([row]))[0]))
        slack_s = float(table.deadline_s[row]) - s.slo_book.base_s(s.slo_tick.now_s) - own_s
        return 0 <= slack_s <= CRITICAL_SHARE * float(table.ttft_s[row])

    def _make_room_for(self, row: int, batch: ScheduleBatch) -> None:
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows = s.slo_book.rows(batch.reqs)
        # counted on what it has written already: a prediction might not come true
        spare = preemption.may_miss(table.gaps[rows], table.missed_gaps[rows], np.zeros(len(rows), np.int64))
        allowed = np.fromiter((self._may_leave(req) for req in batch.reqs), bool, len(rows))
        allowed &= (spare >= 1) | table.late[rows] | ~np.isfinite(table.tbt_s[rows])
        bucket = preemption.protection(table.bucket[rows], ~table.late[rows])
        held = table.held_tokens(rows)
        order = preemption.victim_order(bucket, table.remaining_tokens[rows], held, table.seq[rows], allowed)
        chosen = self._fewest(row, batch, rows, order)
        if chosen is not None:
            self._take_out(batch, chosen)

    def _fewest(
        self, row: int, batch: ScheduleBatch, rows: np.ndarray, order: np.ndarray
    ) -> np.ndarray | None:
        """The first victims of `order` whose leaving lets `row` in; None if no few ones do, or at too high a price."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        charge = int(table.held_tokens(np.array([row]))[0])
        remaining = int(table.bounded_tokens(np.array([row]))[0])
        worth_s = s.slo_model.prefill_s(0, charge) + self._occupation_s(row, rows)
        free, cost_s, stay = self._free_tokens(), 0.0, np.ones(len(rows), bool)
        for count, position in enumerate(order[:MOST_VICTIMS].tolist()):
            if s._ledger(rows[stay], free).admits(charge, remaining):
                return order[:count]
            context = int(table.context_tokens(rows[position : position + 1])[0])
            cost_s += s.slo_model.prefill_s(0, context)
            if cost_s > worth_s:
                return None
            stay[position] = False
            free += freed_tokens(batch.reqs[position])
        fits = s._ledger(rows[stay], free).admits(charge, remaining)
        return order[:MOST_VICTIMS] if fits else None

    def _occupation_s(self, row: int, rows: np.ndarray) -> float:
        """Machine time that a newcomer's decoding takes: its share of the pool, for as long as it is expected to run."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        iteration_s = s.slo_model.iteration_s(decode_shape(len(rows), int(table.context_tokens(rows).sum())))
        expected = float(table.expected_tokens[row])
        held = float(table.prompt_tokens[row]) + expected / 2
        return expected * iteration_s * held / s.max_total_num_tokens

    def _lead(self, rows: np.ndarray) -> int:
        """Iterations ahead to act: a swap needs some to hide its copy."""
        return 1

    def _may_leave(self, req: Req) -> bool:
        """Whether a running request can be a victim now.

        Not one that was preempted often enough. Not one whose first token is in flight: it would lose it.
        SGLang's penalties count the output only while it is decoded, so they would start anew; input
        embeddings would, too.
        """
        table, params = self._scheduler.slo_book.table, req.sampling_params
        penalised = params.frequency_penalty or params.presence_penalty or params.min_new_tokens
        few = table.preemptions[req.slo_row] < self._scheduler.slo_config.max_preemptions
        return bool(few and len(req.output_ids) and not penalised and req.input_embeds is None)

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
        order = preemption.victim_order(bucket, remaining, frees, table.seq[rows], allowed)
        if len(order) == len(rows):
            order = order[:-1]
        need = preemption.growth_tokens(remaining, RELIEF_ITERATIONS) - free
        return preemption.victims(order, frees + np.clip(remaining, 1, RELIEF_ITERATIONS), need)

    def _take_out(self, batch: ScheduleBatch, positions: np.ndarray) -> None:
        if len(positions) == 0:
            return
        leaving = [batch.reqs[i] for i in positions.tolist()]
        stay = np.setdiff1d(np.arange(len(batch.reqs)), positions)
        ways = self._ways_out([batch.reqs[i] for i in stay], leaving)
        batch.filter_batch(keep_indices=stay.tolist())
        batch.batch_is_full = False
        for req, way in zip(leaving, ways, strict=True):
            self._leave(req, way)

    def _ways_out(self, stay: list[Req], leaving: list[Req]) -> list[WayOut]:
        s, ways = self._scheduler, []
        room = self._room_left(stay, leaving)
        for req in leaving:
            context = req.kv_committed_len
            pinned = req.kv.kv_allocated_len - freed_tokens(req)
            costs = preemption.costs(s.slo_model, context, pinned, req.cache_protected_len, room, host_room=0)
            way = preemption.way_out(costs, self._mode)
            room -= context - pinned if way is WayOut.KEEP else 0
            ways.append(way)
        return ways

    def _room_left(self, stay: list[Req], leaving: list[Req]) -> int:
        """KV that stays free or evictable at the forecast peak of those who stay, tokens."""
        s = self._scheduler
        free = self._free_tokens() + sum(freed_tokens(req) for req in leaving)
        ledger = s._ledger(s.slo_book.rows(stay), free)
        return s.max_total_num_tokens - getattr(ledger, "peak", s.max_total_num_tokens)

    def _leave(self, req: Req, way: WayOut) -> None:
        s = self._scheduler
        self.counts[way.value] += 1
        s.slo_book.table.preemptions[req.slo_row] += 1
        release_kv_cache(req, s.tree_cache, is_insert=way is WayOut.KEEP)
        req.reset_for_retract()
        s.slo_book.withdraw(req.slo_row)
        self._set_deadline(req)
        self._leaving.append(req)

    def _free_tokens(self) -> int:
        s = self._scheduler
        return s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()

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

    # -- back

    def settle(self) -> None:
        """Put this iteration's victims into the queue; called when the iteration is planned."""
        s = self._scheduler
        for req in self._leaving:
            s.slo_book.open(req, req.slo, 0.0, s.slo_model)
            s._look_up_prefix(req)
            s.waiting_queue.append(req)
            req.time_stats.set_wait_queue_entry_time()
        self._leaving.clear()

    def retracted(self, req: Req) -> None:
        """SGLang's own retraction took `req` out."""
        self.counts["stock"] += 1
        self._scheduler.slo_book.table.preemptions[req.slo_row] += 1
        self._scheduler.slo_book.withdraw(req.slo_row)
        self._set_deadline(req)

    def alive(self) -> list[Req]:
        """Requests that are nowhere else in the scheduler."""
        return self._leaving


def _expected(tokens: np.ndarray) -> np.ndarray:
    return np.minimum(tokens, 1 << 30).astype(np.int64)


def freed_tokens(req: Req) -> int:
    """KV that becomes free or evictable when `req` leaves: all it holds but what others hold too."""
    node, pinned = req.last_node, req.cache_protected_len
    while node is not None and node.parent is not None and node.lock_ref == 1:
        pinned -= len(node.key)
        node = node.parent
    return req.kv.kv_allocated_len - max(pinned, 0)
