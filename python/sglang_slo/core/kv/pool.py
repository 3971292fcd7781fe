"""The KV pool of one iteration as plain data: what is free, who holds what, who could leave, who is on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from sglang_slo.core import pages
from sglang_slo.core.kv.ledger import ForecastLedger, FullLedger, Ledger, Need, StockLedger
from sglang_slo.core.kv.window import BothLedgers, WindowLedger, WindowPool
from sglang_slo.core.table import RequestTable

NOBODY = np.zeros(0, np.int64)
RELIEF_ITERATIONS = 32  # room that victims make for those who stay: the next pressure is so far away at least


def _nobody() -> np.ndarray:
    return NOBODY


@dataclass(frozen=True)
class Leavers:
    """What preemption could do with each decoding request; arrays of n, in the order of the running batch. Tokens."""

    allowed: np.ndarray  # bool: may leave at all now
    freed_tokens: np.ndarray  # int: KV that is free or evictable once it has left
    kv_tokens: np.ndarray  # int: KV computed for it
    shared_tokens: np.ndarray  # int: of that, leading tokens that others hold too and that stay
    cached_tokens: np.ndarray  # int: of that, leading tokens that are in the radix tree already
    may_keep: np.ndarray  # bool: its KV may go into the radix tree
    may_swap: np.ndarray  # bool: its KV may go to the host
    may_recompute: np.ndarray  # bool: its KV may be thrown away
    window_tokens: np.ndarray | None = None  # int: of the window's pool, what is free there once it has left

    def without(self, positions: np.ndarray) -> Leavers:
        """Those who are left once the ones at `positions` are gone."""
        window = None if self.window_tokens is None else np.delete(self.window_tokens, positions)
        names = [name for name in self.__dataclass_fields__ if name != "window_tokens"]
        columns = {name: np.delete(getattr(self, name), positions) for name in names}
        return Leavers(**columns, window_tokens=window)


@dataclass(frozen=True)
class HostKv:
    """KV in host memory. `rows` int[k] are out there, `tokens` int[k] each; those that left just now are not among them."""

    rows: np.ndarray = field(default_factory=_nobody)
    tokens: np.ndarray = field(default_factory=_nobody)
    room_tokens: int = 0  # the largest copy that could be saved now
    hides: bool = False  # whether copies move beside compute
    on: bool = False


@dataclass(frozen=True)
class Pool:
    """The device's pool. `rule`: forecast, full or stock (`--slo-kv`); `near`, `far`: iterations of look-ahead."""

    table: RequestTable
    decoding: np.ndarray  # int[n] rows of the running batch, in its order
    capacity_tokens: int
    free_tokens: int  # free and evictable
    leaving_tokens: int = 0  # free as soon as they are copied out
    reserve_tokens: int = 0
    arrival_reserve_tokens: int = 0  # left by the infeasible for arrivals that can be kept
    waiting: np.ndarray = field(default_factory=_nobody)  # int[m] rows that still have prefill to do
    arriving: np.ndarray = field(default_factory=_nobody)  # rows that hold KV for their return from the host
    chunked: int = -1  # the row whose prefill was cut last iteration
    # rows that there is no KV to keep a promise to, for now
    given_up: np.ndarray = field(default_factory=_nobody)
    rule: str = "forecast"
    near: int = 100
    far: int = 1000
    stock_ratio: float = 1.0
    look_up_leavers: Callable[[], Leavers] | None = None
    host: HostKv = field(default_factory=HostKv)
    slots: np.ndarray | None = None  # int[n] tokens that each of `decoding` has slots for; None: its context
    window: WindowPool | None = None  # the pool of layers that look back over a window, where there are any
    computed: np.ndarray | None = (
        None  # int[n] tokens whose KV is known to be there; None: all but the last one's
    )

    @property
    def decoding_slots(self) -> np.ndarray:
        """Tokens that each decoding request has slots for, those of iterations in flight among them; int[n]."""
        return self.table.context_tokens(self.decoding) if self.slots is None else self.slots

    @cached_property
    def next_tokens(self) -> int:
        """KV that the decodes take in one iteration, if all of them take part."""
        return int(self.growth_tokens(1).sum())

    def growth_tokens(self, iterations: int) -> np.ndarray:
        """KV that each decoding request may take within so many iterations; int[n]."""
        table, rows = self.table, self.decoding
        return table.step.growth_tokens(
            self.decoding_slots,
            table.context_tokens(rows) - 1 if self.computed is None else self.computed,
            table.remaining_tokens[rows],
            iterations,
            table.tokens_per_step,
            table.page_tokens,
        )

    def lasts(self, iterations: int) -> bool:
        """Whether every pool has what those who decode take within so many iterations, once copies out are over."""
        growth = self.growth_tokens(iterations)
        if self.free_tokens + self.leaving_tokens < int(growth.sum()):
            return False
        window = self.window
        return window is None or window.free_tokens >= int(window.growth_tokens(growth).sum())

    def all_can_decode(self) -> bool:
        """Whether every pool has what the next decode of everybody takes."""
        if self.free_tokens < self.next_tokens:
            return False
        return self.window is None or self.window.free_tokens >= self.next_tokens

    @property
    def least_free_tokens(self) -> int:
        """What is free in the pool that has least of it."""
        return self.free_tokens if self.window is None else min(self.free_tokens, self.window.free_tokens)

    @cached_property
    def leavers(self) -> Leavers:
        """Looked up only where KV is short: it walks the radix tree."""
        assert self.look_up_leavers is not None
        return self.look_up_leavers()

    def without(self, positions: np.ndarray, copied: np.ndarray | None = None) -> Pool:
        """The pool once the decoding requests at `positions` have left; of these, `copied`, bool[k], go to the host.

        Where copies move beside compute, KV that is copied out is not free yet.
        """
        leavers = self.leavers
        rest = leavers.without(positions)
        freed = leavers.freed_tokens[positions]
        later = int(freed[copied].sum()) if copied is not None and self.host.hides else 0
        window = self.window
        if window is not None and leavers.window_tokens is not None:
            window = window.without(positions, int(leavers.window_tokens[positions].sum()))
        return replace(
            self,
            decoding=np.delete(self.decoding, positions),
            slots=None if self.slots is None else np.delete(self.slots, positions),
            computed=None if self.computed is None else np.delete(self.computed, positions),
            free_tokens=self.free_tokens + int(freed.sum()) - later,
            leaving_tokens=self.leaving_tokens + later,
            look_up_leavers=lambda: rest,
            window=window,
        )

    @cached_property
    def overdraft_tokens(self) -> int:
        """KV beyond the ledger's limit that one whose deadline is near may have: room that can be made by then.

        The reserve, and what those that decode may grow by only after `RELIEF_ITERATIONS`: if KV is short then, victims
        are found then.
        """
        if self.rule == "stock":
            return 0
        if self.rule == "full":
            return self.reserve_tokens
        growth = np.minimum(self.table.remaining_tokens[self.decoding], self.near)
        soon = int(RELIEF_ITERATIONS * self.table.tokens_per_step)
        return self.reserve_tokens + int(np.maximum(growth - soon, 0).sum())

    def need(self, row: int, tokens: int, **how: int) -> Need:
        """What `row` would need if it brought so many tokens at once."""
        table = self.table
        remaining = int(table.remaining_tokens[row])
        context = int(table.prompt_tokens[row] + table.output_tokens[row]) + table.step.spare_tokens
        if self.rule == "stock":
            remaining = int(table.declared_tokens[row] - table.output_tokens[row])
        elif self.rule == "full":
            remaining = pages.growth(context, remaining, table.page_tokens)
        declared = 0
        if table.preemptions[row]:  # else it can be preempted
            rows = np.array([row])
            declared = int(table.declared_remaining(rows)[0]) if table.non_preemptible(rows)[0] else 0
        first = pages.growth(context, 1, table.page_tokens)
        window = 0
        if self.window is not None:
            more = min(int(table.remaining_tokens[row]), self.near)
            window = self.window.need_tokens(context, pages.growth(context, more, table.page_tokens))
        return Need(tokens, remaining, declared, first=first, window=window, **how)  # type: ignore[arg-type]

    def ledger(self) -> Ledger:
        """Admission beside those who hold KV now, of every pool."""
        ledger, window = self._ledger(), self.window
        if window is None:
            return ledger
        held = window.capacity_tokens - window.free_tokens
        later, soon = (
            int(window.growth_tokens(self.growth_tokens(n)).sum()) for n in (self.near, RELIEF_ITERATIONS)
        )
        alone = len(self.decoding) == 0 and self.chunked < 0
        return BothLedgers(ledger, WindowLedger(window.capacity_tokens, held, later, soon, alone))

    def _ledger(self) -> Ledger:
        table, rows = self.table, self.decoding
        if self.rule == "stock":
            left = table.declared_tokens[rows] - table.output_tokens[rows]
            return StockLedger(self.free_tokens, left, self.stock_ratio, table.page_tokens)
        rows = np.append(rows, self.arriving)
        now = int(table.held_tokens(rows).sum())
        if self.chunked >= 0:
            rows = np.append(rows, self.chunked)
            history = pages.whole(int(table.history_tokens[self.chunked]), table.page_tokens)
            now += history - int(table.shared_tokens[self.chunked])
        shared = max(self.capacity_tokens - self.free_tokens - now, 0)
        held, remaining = table.held_tokens(rows), table.remaining_tokens[rows]
        if self.rule == "full":
            context = table.context_tokens(rows) + table.step.spare_tokens
            left = pages.growth(context, remaining, table.page_tokens)
            return FullLedger(held, left, shared, self.capacity_tokens, self.reserve_tokens)
        return ForecastLedger(
            held,
            remaining,
            shared,
            self.capacity_tokens,
            self.reserve_tokens,
            near=self.near,
            far=self.far,
            final=table.non_preemptible(rows),
            declared=table.declared_remaining(rows),
            page_tokens=table.page_tokens,
        )
