"""What planning looks at, put together from SGLang's batches, queue, pool and tree: the `View`, and the KV ledger."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sglang_slo.core.arrival_reserve import ArrivalReserve
from sglang_slo.core.reservation import (
    ForecastLedger,
    FullLedger,
    GuardedLedger,
    LateLedger,
    Ledger,
    StockLedger,
)
from sglang_slo.core.reserve import Reserve
from sglang_slo.core.view import View
from sglang_slo.runtime import batches

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_slo.runtime.scheduler import SloScheduler

NEAR_ITERATIONS = 32  # of growth that the critical leave to those that run: victims make room for as many
BOUND_EVERY = 16  # iterations between refreshes of what running requests may still write


class Viewer:
    """Looks at one scheduler; keeps the table's columns that are read off the tree and the batches up to date."""

    def __init__(self, scheduler: SloScheduler) -> None:
        config, capacity = scheduler.slo_config, scheduler.max_total_num_tokens
        self.reserve = Reserve(capacity, config.reserve_floor, config.reserve_ceiling)
        # SGLang's rule of admission knows of no lost ones
        self.arrivals = ArrivalReserve(0 if config.kv == "stock" else int(config.arrival_reserve * capacity))
        self._scheduler = scheduler
        self._bound_next = 0  # iteration of the next refresh of length bounds

    def view(self, running_batch: ScheduleBatch) -> View:
        """What the next plan is made from. SGLang has merged its batches; at most one iteration is in flight."""
        s = self._scheduler
        book, table = s.slo_book, s.slo_book.table
        if s.slo_config.order == "stock":
            s.policy.calc_priority(s.waiting_queue, running_batch)
        cut = s.chunked_req
        if cut is not None:
            table.history_tokens[cut.slo_row] = len(cut.prefix_indices)
        waiting = self._waiting_rows()
        decoding = book.rows(running_batch.reqs)
        if s.forward_ct >= self._bound_next and len(decoding):
            self._bound_next = s.forward_ct + BOUND_EVERY
            table.bound_lengths(decoding, s.slo_tick.confidence)
            held, left = table.held_tokens(decoding), table.remaining_tokens[decoding]
            self.reserve.look(s.forward_ct, table.seq[decoding], held, left)
        free = s.token_to_kv_pool_allocator.available_size() + s.tree_cache.evictable_size()
        may_split = running_batch.is_empty() or batches.can_split(running_batch)
        return View(
            table=table,
            decoding=decoding,
            waiting=waiting,
            chunked=-1 if cut is None else cut.slo_row,
            may_sit_out=may_split,
            base_s=book.base_s(s.slo_tick.now_s),
            model=s.slo_model,
            ledger=LateLedger(partial(self.ledger, decoding, free)),
            critical_tokens=self.critical_tokens(decoding),
            free_tokens=free,
            arrival_reserve_tokens=self.arrivals.tokens(s.slo_tick.now_s),
            capacity_tokens=s.max_total_num_tokens,
            request_slots=s.get_num_allocatable_reqs(len(running_batch.reqs)),
            most_chunk_tokens=s.chunked_prefill_size or 1 << 30,
            tightest_ttft_s=book.tightest_ttft_s,
        )

    def _waiting_rows(self) -> np.ndarray:
        """Rows of all that have prefill to do, int[n]: by deadline, or in SGLang's order of the queue."""
        s = self._scheduler
        book, queue, cut = s.slo_book, s.waiting_queue, s.chunked_req
        by_deadline = s.slo_config.order != "stock"
        rows = book.waiting_rows(queue) if by_deadline else book.rows(queue)
        if len(rows) and rows.min() < 0:  # one came in on a path of SGLang's own
            for req in queue:
                if req.slo_row < 0:
                    s.slo_open(req)
            rows = book.waiting_rows(queue) if by_deadline else book.rows(queue)
        return rows if cut is None else np.concatenate(([cut.slo_row], rows))

    def critical_tokens(self, decoding: np.ndarray) -> int:
        """KV beyond the ledger's limit that critical requests may have.

        The reserve, and what those that decode may grow by only later than victims need to be found.
        """
        s, table = self._scheduler, self._scheduler.slo_book.table
        if s.slo_config.kv != "forecast" or not table.looks_ahead:
            return 0 if s.slo_config.kv == "stock" else self.reserve.tokens
        growth = table.bounded_tokens(decoding)
        return self.reserve.tokens + int(np.maximum(growth - NEAR_ITERATIONS, 0).sum())

    def ledger(self, decoding: np.ndarray, free: int, next_back: bool = True) -> Ledger:
        """The ledger of who holds KV now; with `next_back`, the next to return from the host has its room."""
        s = self._scheduler
        table, cut = s.slo_book.table, s.chunked_req
        if s.slo_config.kv == "stock":
            left = table.declared_tokens[decoding] - table.output_tokens[decoding]
            return StockLedger(free, left, s.new_token_ratio_tracker.current)
        capacity = s.max_total_num_tokens
        rows = np.append(decoding, s.slo_preempt.arriving_rows())
        now = int(table.held_tokens(rows).sum())
        if cut is not None:
            rows = np.append(rows, cut.slo_row)
            now += int(table.history_tokens[cut.slo_row] - table.shared_tokens[cut.slo_row])
        if next_back:
            rows = np.append(rows, s.slo_preempt.next_back_rows())
        shared = max(capacity - free - now, 0)
        reserve = self.reserve.tokens
        held, remaining = table.held_tokens(rows), table.bounded_tokens(rows)
        if s.slo_config.kv == "full":
            return FullLedger(held, remaining, shared, capacity, reserve)
        everyone = ForecastLedger(held, remaining, shared, capacity, reserve)
        final = table.final(rows)
        stay = ForecastLedger(held[final], table.final_tokens(rows[final]), shared, capacity, 0)
        return GuardedLedger(everyone, stay, everyone.peak)

    def arrived(self, req: Req) -> None:
        """Count a request that has just come: what comes with a deadline lets others expect more of it."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows = np.array([req.slo_row])
        if np.isfinite(table.deadline_s[rows[0]]):
            tokens = int(table.held_tokens(rows)[0] + table.bounded_tokens(rows)[0])
            self.arrivals.arrived(s.slo_tick.now_s, tokens)

    def look_up_prefix(self, req: Req) -> None:
        """How much of a waiting request is in the radix cache, and how much of that is held by others anyway."""
        s = self._scheduler
        req.init_next_round_input(s.tree_cache)
        node, pinned = req.last_node, len(req.prefix_indices)
        if not s.tree_cache.is_tree_cache():
            node = None
        while node is not None and node.lock_ref == 0 and node is not s.tree_cache.root_node:
            pinned -= len(node.key)
            node = node.parent
        table, row = s.slo_book.table, req.slo_row
        table.history_tokens[row] = len(req.prefix_indices)
        table.shared_tokens[row] = max(pinned, 0)
