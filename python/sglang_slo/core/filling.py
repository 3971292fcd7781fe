"""Fills one iteration: who of the line gets how many tokens, until its time, the KV or the request slots are used up."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_slo.core import pages
from sglang_slo.core.chunking import Budget, DecodeLoad
from sglang_slo.core.kv.ledger import UNBOUNDED, LateLedger, Need
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.latency import BatchShape
from sglang_slo.core.view import View

MOST_DECODE_SHARE = 0.9  # of the time, at most, is promised to decodes; what is left is prefill's
LEAST_CHUNK_TOKENS = 32  # a smaller piece at the end of an iteration is not worth its bookkeeping
SHARED_TOKENS = 32  # a cached prefix so long, and there is nothing to wait for
MOST_DEFERRALS = 2  # iterations until what another computes is in the cache, with one in flight
WINDOW_ITERATIONS = 3  # until what a piece of a prompt took beyond a window is given back, with one in flight
MOST_REFUSALS = 16  # requests that KV refuses before the rest of the line is left alone for this iteration


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a newcomer may take KV: see `ledger.Need`. `whole`: if it may not be cut, it may pass the time."""

    far: bool = False
    keep_free: int = 0
    overdraft: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What could be done for a request in an iteration. Tokens."""

    history: int  # KV that is there, or is loaded
    rest: int  # still to be computed behind it
    fits: int  # of these, what there is time for
    loaded: int  # of history, what is loaded from host memory
    shape: BatchShape  # of the iteration, with what is loaded


class Filling:
    """Takes requests in order until the time, the KV or the request slots of one iteration are used up."""

    def __init__(
        self, view: View, budget: Budget, fixed: bool, computing: frozenset[int] = frozenset()
    ) -> None:
        self.prefill: list[tuple[int, int]] = []
        self.shape = budget.base
        self.full = False
        self.loads: list[int] = []  # rows whose KV is loaded from host memory
        self.deferred: list[int] = []  # rows that let another compute their prefix first
        self.computing: set[int] = set()  # groups whose prefix is computed in this iteration
        self._computed_before = computing  # or is being computed in the one in flight
        self._view = view
        self._time_s = budget.time_s
        self._chunk_left = view.most_chunk_tokens
        self._fixed = fixed
        self.slots = view.request_slots
        # what every decode takes in this iteration is theirs
        self.free_tokens = view.pool.free_tokens - view.pool.next_tokens
        self.window_tokens = _window_tokens(view.pool)
        self.ledger = LateLedger(view.pool.ledger)
        self.entered: list[Need] = []  # what newcomers were charged
        self.refused: dict[int, Need] = {}  # rows that KV had no room for, in order, and what they need
        self._refusals = 0
        self.out_of_time = False  # the first one had no time for a single token
        self._decoding: DecodeLoad | None = None  # summed up when the first one asks to enter

    def add(self, row: int, terms: Terms) -> bool:
        """Give `row` what fits; whether it got any. Only the last one taken is cut short; where KV has no room
        for one, the next is looked at.
        """
        view, table = self._view, self._view.table
        context = int(table.prompt_tokens[row] + table.output_tokens[row])
        if self._defers(row, int(table.history_tokens[row]), terms):
            self.deferred.append(row)
            return False
        piece = self._piece(row, context)
        history, rest = piece.history, piece.rest
        tokens = min(rest, piece.fits, max(self._window_room(row, history), LEAST_CHUNK_TOKENS))
        if not table.cuttable[row] and tokens < (all_at_once := min(rest, view.most_chunk_tokens)):
            if self.prefill or not (terms.whole or len(view.decoding) == 0):
                return False  # another iteration's; the time of this one is for others
            tokens = all_at_once
        if tokens < rest:
            tokens = pages.cut(history, tokens, table.page_tokens)
        if tokens <= 0 or (tokens < min(rest, LEAST_CHUNK_TOKENS) and self.prefill):
            self.full = True
            self.out_of_time = not self.prefill
            return False
        if not self._enters(row, context, piece, tokens, terms):
            return self._refuse()
        self.computing.add(int(table.prefix_group[row]))
        self.prefill.append((row, tokens))
        self.loads += [row] if piece.loaded else []
        self.shape = piece.shape.with_chunk(history, tokens)
        self._chunk_left -= tokens
        self.full = tokens < rest
        return True

    def _enters(self, row: int, context: int, piece: Piece, tokens: int, terms: Terms) -> bool:
        """Whether KV, request slots and the decodes' time have room for so much of it; it is charged then."""
        view, table, newcomer = self._view, self._view.table, row != self._view.chunked
        if newcomer and (self.slots <= 0 or not self._in_time(row, context)):
            return False
        whole = max(context, piece.history + piece.rest) + table.step.spare_tokens
        at_once, charge = self._kv(row, piece.history, tokens, whole)
        in_window = self._window_kv(row, piece.history, tokens)
        need = view.pool.need(
            row, charge, far=terms.far, keep_free=terms.keep_free, overdraft=terms.overdraft
        )
        short = at_once > self.free_tokens or in_window > self.window_tokens
        if short or (newcomer and not self.ledger.admits(need)):
            if newcomer:
                self.refused[row] = need
            return False
        if newcomer:
            self.slots -= 1
            self.entered.append(need)
            self._joins(row, context)
        self.free_tokens -= at_once
        self.window_tokens -= in_window
        return True

    def _window_kv(self, row: int, history: int, tokens: int) -> int:
        """What `row` takes of the window's pool for a piece of its prompt; what is cached for it stops being evictable."""
        window, page = self._view.pool.window, self._view.table.page_tokens
        if window is None:
            return 0
        found = window.found_tokens(history) if row != self._view.chunked else 0
        return found + pages.growth(history, tokens, page)

    def _window_room(self, row: int, history: int) -> int:
        """The longest piece that the window's pool has room for."""
        return self.window_tokens - self._window_kv(row, history, 0) - self._view.table.page_tokens + 1

    def _kv(self, row: int, history: int, tokens: int, context: int) -> tuple[int, int]:
        """KV that `row` takes from the pool for a piece of its prompt, and for all of it up to `context`; tokens.

        What is pinned for a newcomer, or held by others, is out of the pool already; what is cached but not held by anyone
        stops being evictable now.
        """
        table = self._view.table
        page = table.page_tokens
        out = pages.whole(history, page)
        if row != self._view.chunked:
            out = int(table.shared_tokens[row] + table.pinned_tokens[row])
        return pages.whole(history + tokens, page) - out, pages.whole(context, page) - out

    def _defers(self, row: int, history: int, terms: Terms) -> bool:
        """Whether another computes this one's prefix just now: in an iteration or two it will be there for nothing.

        SGLang's own queue policies do the same within a batch; here it is bounded, and not for one that is in a hurry.
        """
        table = self._view.table
        group = int(table.prefix_group[row])
        if not group or history >= SHARED_TOKENS or terms.whole or row == self._view.chunked:
            return False
        computed = group in self.computing or group in self._computed_before
        return computed and table.deferrals[row] < MOST_DEFERRALS

    @property
    def rows(self) -> set[int]:
        """Who got something."""
        return {row for row, _ in self.prefill}

    def _refuse(self) -> bool:
        self._refusals += 1
        self.full = self._refusals >= MOST_REFUSALS
        return False

    def _in_time(self, row: int, context: int) -> bool:
        """Whether the decodes would still have time for each other with this one (`chunking.DecodeLoad`)."""
        table = self._view.table
        if self._decoding is None:
            rows = self._view.decoding
            self._decoding = DecodeLoad(
                table.tbt_s[rows], table.context_tokens(rows), self._view.model, MOST_DECODE_SHARE
            )
        return self._decoding.admits(float(table.tbt_s[row]), context)

    def _joins(self, row: int, context: int) -> None:
        assert self._decoding is not None
        self._decoding.add(float(self._view.table.tbt_s[row]), context)

    def _piece(self, row: int, context: int) -> Piece:
        """Its next tokens. KV in host memory is loaded where the time allows it, and computed where it does not.

        Without decodes nobody's gap ends the iteration: the cap on its time gives way to a load.
        """
        table, model = self._view.table, self._view.model
        history, host = int(table.history_tokens[row]), int(table.host_tokens[row])
        if host:
            load_s = model.copy_s(host)
            loading = self.shape.loading(load_s)
            alone = not len(self._view.decoding) and not self.prefill
            time_s = max(self._time_s, 2 * model.safe_iteration_s(loading)) if alone else self._time_s
            fits = self._fits(loading, history, time_s)
            if fits > 0:
                return Piece(history, max(context - history, 1), fits, host, loading)
        history -= host
        fits = self._fits(self.shape, history, self._time_s)
        return Piece(history, max(context - history, 1), fits, 0, self.shape)

    def _fits(self, shape: BatchShape, history: int, time_s: float) -> int:
        if self._fixed:
            return self._chunk_left
        return min(self._chunk_left, self._view.model.largest_safe_chunk(shape, history, time_s))


def _window_tokens(pool: Pool) -> int:
    """What pieces of prompts may take of the window's pool: the decodes take theirs until that is given back."""
    if pool.window is None:
        return UNBOUNDED
    return pool.window.free_tokens - int(
        pool.window.growth_tokens(pool.growth_tokens(WINDOW_ITERATIONS)).sum()
    )
