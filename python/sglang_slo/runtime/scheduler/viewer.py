"""What planning looks at, put together from SGLang's batches, queue, pool and tree: the `View`, with the KV `Pool`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sglang_slo.core.kv.arrival_reserve import ArrivalReserve
from sglang_slo.core.kv.ledger import UNBOUNDED, Ledger
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.kv.preemption import most_growth_tokens
from sglang_slo.core.kv.reserve import Reserve
from sglang_slo.core.kv.window import WindowPool
from sglang_slo.core.ordering import inserted
from sglang_slo.core.view import View
from sglang_slo.runtime.requests import batches
from sglang_slo.runtime.sglang import kv, pools, tree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_slo.runtime.kv.look_up import PrefixLookUp
    from sglang_slo.runtime.kv.preempt import Preemptor
    from sglang_slo.runtime.kv.prefix_pins import Pins
    from sglang_slo.runtime.ports import Ports

BOUND_EVERY = 16  # iterations between refreshes of what running requests may still write


class Viewer:
    """Looks at one scheduler; keeps the table's columns that are read off the tree and the batches up to date."""

    def __init__(
        self,
        ports: Ports,
        preempt: Preemptor,
        pins: Pins,
        look_up: PrefixLookUp,
        open_request: Callable[[Req], None],
        open_begun: Callable[[Req], None],
    ) -> None:
        self._ports, self._preempt, self._pins, self._open = ports, preempt, pins, open_request
        self._look_up, self._open_begun = look_up, open_begun
        config, capacity = ports.settings, ports.kv.capacity_tokens
        self.reserve = Reserve(capacity, config.reserve_floor, config.reserve_ceiling)
        # SGLang's rule of admission knows of no infeasible ones
        self.arrivals = ArrivalReserve(0 if config.kv == "stock" else int(config.arrival_reserve * capacity))
        self._bound_next = 0  # iteration of the next refresh of length bounds
        preempts = config.preempt != "stock" and config.max_preemptions > 0
        self._near = config.lookahead_tokens if preempts else UNBOUNDED
        self._far = max(config.return_lookahead_tokens, self._near) if preempts else UNBOUNDED

    def view(self, running_batch: ScheduleBatch) -> View:
        """What the next plan is made from. SGLang has merged its batches; at most one iteration is in flight."""
        p = self._ports
        registry, table, cut = p.requests, p.requests.table, p.waiting.cut
        if p.settings.order == "stock":
            p.waiting.order(running_batch)
        if cut is not None:
            if cut.slo_row < 0:
                self._open_begun(cut)
            table.history_tokens[cut.slo_row], table.host_tokens[cut.slo_row] = kv.prefix_tokens(cut), 0
        waiting = self._waiting_rows()
        decoding = self._decoding_rows(running_batch.reqs)
        self._bound_lengths(decoding)
        splittable = bool(table.splittable[decoding].all())
        may_split = splittable and (running_batch.is_empty() or batches.can_split(running_batch))
        return View(
            table=table,
            waiting=waiting,
            may_sit_out=may_split,
            ready_s=p.ready_s(),
            model=p.agreed.model,
            pool=self.pool(running_batch, decoding, waiting),
            request_slots=p.batches.request_slots(len(running_batch.reqs)),
            most_chunk_tokens=p.batches.chunk_tokens or 1 << 30,
            tightest_ttft_s=registry.recent_ttft.tightest_s(p.agreed.now_s),
            lengths_trusted=p.agreed.tick.lengths_trusted,
        )

    def pool(self, running_batch: ScheduleBatch, decoding: np.ndarray, waiting: np.ndarray) -> Pool:
        """The device's KV as planning sees it."""
        p, preempt, cut = self._ports, self._preempt, self._ports.waiting.cut
        page_tokens, step = p.kv.page_tokens, p.requests.table.step
        if len(self._pins) and not p.kv.has(len(decoding) * most_growth_tokens(step, page_tokens)):
            self._pins.release_all()  # a pin may save work, it may not make anybody leave
        return Pool(
            table=p.requests.table,
            decoding=decoding,
            capacity_tokens=p.kv.capacity_tokens,
            free_tokens=p.kv.free_tokens(),
            leaving_tokens=preempt.leaving_tokens,
            reserve_tokens=self.reserve.tokens,
            arrival_reserve_tokens=self.arrivals.tokens(p.agreed.now_s),
            waiting=waiting,
            arriving=preempt.arriving_rows(),
            chunked=-1 if cut is None else cut.slo_row,
            rule=p.settings.kv,
            near=self._near,
            far=self._far,
            stock_ratio=p.batches.stock_ratio,
            look_up_leavers=partial(preempt.leavers, running_batch),
            host=preempt.host(),
            slots=kv.slot_counts(running_batch.reqs) if page_tokens > 1 or step.bursts else None,
            computed=kv.computed_counts(running_batch.reqs) if step.bursts else None,
            window=self._window(running_batch.reqs),
        )

    def _window(self, decoding: list[Req]) -> WindowPool | None:
        """The pool of the layers that look back over a window."""
        pool = self._ports.kv
        if pool.window is None:
            return None
        return WindowPool(
            capacity_tokens=pool.window.capacity_tokens,
            free_tokens=pool.window_free_tokens(),
            window_tokens=pool.window.window_tokens,
            late_tokens=pool.window.late_tokens,
            own_tokens=pools.own_window_tokens(decoding, pool.page_tokens),
            page_tokens=pool.page_tokens,
        )

    def ledger(self, decoding: np.ndarray, free_tokens: int) -> Ledger:
        """The ledger of who decodes now, for reports."""
        p, cut = self._ports, self._ports.waiting.cut
        return Pool(
            table=p.requests.table,
            decoding=decoding,
            capacity_tokens=p.kv.capacity_tokens,
            free_tokens=free_tokens,
            reserve_tokens=self.reserve.tokens,
            arriving=self._preempt.arriving_rows(),
            chunked=-1 if cut is None else cut.slo_row,
            rule=p.settings.kv,
            near=self._near,
            far=self._far,
            stock_ratio=p.batches.stock_ratio,
        ).ledger()

    @property
    def pinned_tokens(self) -> int:
        """Cached KV kept for those next in line."""
        return self._pins.tokens

    def _bound_lengths(self, decoding: np.ndarray) -> None:
        """Every so often, bound anew what the running requests may still write, and let the reserve learn from it."""
        p, table = self._ports, self._ports.requests.table
        now = p.batches.iteration_number
        if now < self._bound_next or not len(decoding):
            return
        self._bound_next = now + BOUND_EVERY
        table.bound_lengths(decoding, p.agreed.tick.confidence)
        held, left = table.held_tokens(decoding), table.remaining_tokens[decoding]
        self.reserve.look(now, table.seq[decoding], held, left, table.tokens_per_step)

    def _decoding_rows(self, running: list[Req]) -> np.ndarray:
        """Rows of the running requests, int[n]; those that stock scheduling began without one are given theirs."""
        seen = self._ports.requests.seen(running)
        if seen.whole:
            return seen.rows
        for req in running:
            if req.slo_row < 0:
                self._open_begun(req)
        return self._ports.requests.rows(running)

    def _waiting_rows(self) -> np.ndarray:
        """Rows of all that have prefill to do, int[n]: by deadline, or in SGLang's order of the queue."""
        registry, waiting = self._ports.requests, self._ports.waiting
        queue, cut = waiting.reqs, waiting.cut
        by_deadline = self._ports.settings.order != "stock"
        rows = registry.waiting_rows(queue) if by_deadline else registry.rows(queue)
        if len(rows) and rows.min() < 0:  # one came in on a path of SGLang's own
            for req in queue:
                if req.slo_row < 0:
                    self._open(req)
            rows = registry.waiting_rows(queue) if by_deadline else registry.rows(queue)
        if tree.has_storage(self._ports.kv.tree):
            rows = np.array([row for row in rows if self._look_up.ready(registry.reqs[row])], np.int64)
        if cut is None:
            return rows
        if by_deadline:
            return inserted(rows, cut.slo_row, registry.table.deadline_s, registry.table.seq)
        return np.concatenate(([cut.slo_row], rows))

    def arrived(self, req: Req) -> None:
        """Count a request that has just come: what comes with a deadline lets others expect more of it."""
        table = self._ports.requests.table
        rows = np.array([req.slo_row])
        if np.isfinite(table.deadline_s[rows[0]]):
            bounded = np.minimum(table.remaining_tokens[rows], self._near)
            self.arrivals.arrived(self._ports.agreed.now_s, int(table.held_tokens(rows)[0] + bounded[0]))
