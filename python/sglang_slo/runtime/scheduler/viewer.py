"""What planning looks at, put together from SGLang's batches, queue, pool and tree: the `View`, with the KV `Pool`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sglang_slo.core.kv.arrival_reserve import ArrivalReserve
from sglang_slo.core.kv.ledger import UNBOUNDED, Ledger
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.kv.reserve import Reserve
from sglang_slo.core.view import View
from sglang_slo.runtime.requests import batches

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_slo.runtime.scheduler.scheduler import SloScheduler

BOUND_EVERY = 16  # iterations between refreshes of what running requests may still write


class Viewer:
    """Looks at one scheduler; keeps the table's columns that are read off the tree and the batches up to date."""

    def __init__(self, scheduler: SloScheduler) -> None:
        config, capacity = scheduler.slo_config, scheduler.max_total_num_tokens
        self.reserve = Reserve(capacity, config.reserve_floor, config.reserve_ceiling)
        # SGLang's rule of admission knows of no infeasible ones
        self.arrivals = ArrivalReserve(0 if config.kv == "stock" else int(config.arrival_reserve * capacity))
        self._scheduler = scheduler
        self._bound_next = 0  # iteration of the next refresh of length bounds
        preempts = config.preempt != "stock" and config.max_preemptions > 0
        self._near = config.lookahead_tokens if preempts else UNBOUNDED
        self._far = max(config.return_lookahead_tokens, self._near) if preempts else UNBOUNDED

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
        self._bound_lengths(decoding)
        may_split = running_batch.is_empty() or batches.can_split(running_batch)
        return View(
            table=table,
            waiting=waiting,
            may_sit_out=may_split,
            base_s=book.base_s(s.slo_tick.now_s),
            model=s.slo_model,
            pool=self.pool(running_batch, decoding, waiting),
            request_slots=s.get_num_allocatable_reqs(len(running_batch.reqs)),
            most_chunk_tokens=s.chunked_prefill_size or 1 << 30,
            tightest_ttft_s=book.recent_ttft.tightest_s(s.slo_tick.now_s),
            lengths_trusted=s.slo_tick.lengths_trusted,
        )

    def pool(self, running_batch: ScheduleBatch, decoding: np.ndarray, waiting: np.ndarray) -> Pool:
        """The device's KV as planning sees it."""
        s, preempt = self._scheduler, self._scheduler.slo_preempt
        free = preempt.free_tokens()
        if len(s.slo_pins) and free < len(decoding) * 8:
            s.slo_pins.release_all()  # a pin may save work, it may not make anybody leave
            free = preempt.free_tokens()
        cut = s.chunked_req
        return Pool(
            table=s.slo_book.table,
            decoding=decoding,
            capacity_tokens=s.max_total_num_tokens,
            free_tokens=free,
            leaving_tokens=preempt.leaving_tokens,
            reserve_tokens=self.reserve.tokens,
            arrival_reserve_tokens=self.arrivals.tokens(s.slo_tick.now_s),
            waiting=waiting,
            arriving=preempt.arriving_rows(),
            chunked=-1 if cut is None else cut.slo_row,
            rule=s.slo_config.kv,
            near=self._near,
            far=self._far,
            stock_ratio=s.new_token_ratio_tracker.current,
            look_up_leavers=partial(preempt.leavers, running_batch),
            host=preempt.host(),
        )

    def ledger(self, decoding: np.ndarray, free_tokens: int) -> Ledger:
        """The ledger of who decodes now, for reports."""
        s = self._scheduler
        cut = s.chunked_req
        return Pool(
            table=s.slo_book.table,
            decoding=decoding,
            capacity_tokens=s.max_total_num_tokens,
            free_tokens=free_tokens,
            reserve_tokens=self.reserve.tokens,
            arriving=s.slo_preempt.arriving_rows(),
            chunked=-1 if cut is None else cut.slo_row,
            rule=s.slo_config.kv,
            near=self._near,
            far=self._far,
            stock_ratio=s.new_token_ratio_tracker.current,
        ).ledger()

    def _bound_lengths(self, decoding: np.ndarray) -> None:
        """Every so often, bound anew what the running requests may still write, and let the reserve learn from it."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        if s.forward_ct < self._bound_next or not len(decoding):
            return
        self._bound_next = s.forward_ct + BOUND_EVERY
        table.bound_lengths(decoding, s.slo_tick.confidence)
        held, left = table.held_tokens(decoding), table.remaining_tokens[decoding]
        self.reserve.look(s.forward_ct, table.seq[decoding], held, left)

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

    def arrived(self, req: Req) -> None:
        """Count a request that has just come: what comes with a deadline lets others expect more of it."""
        s, table = self._scheduler, self._scheduler.slo_book.table
        rows = np.array([req.slo_row])
        if np.isfinite(table.deadline_s[rows[0]]):
            bounded = np.minimum(table.remaining_tokens[rows], self._near)
            self.arrivals.arrived(s.slo_tick.now_s, int(table.held_tokens(rows)[0] + bounded[0]))

    def cached_tokens(self, req: Req) -> int:
        """How much of a request that has just come is in the radix cache."""
        req.init_next_round_input(self._scheduler.tree_cache)
        return len(req.prefix_indices)

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
