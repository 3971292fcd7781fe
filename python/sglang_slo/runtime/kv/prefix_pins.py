"""Keeps the cached prefixes of the requests next in line from being evicted before their turn.

A pin is a lock on a node of the radix tree. Pins never hold more than a share of the pool, and all of them are let
go when the pool runs low: a pin may save work, it may not stand in the way of any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_slo.runtime.sglang import tree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

    from sglang_slo.core.table import RequestTable


class Pins:
    """Pinned prefixes by request row. `most_tokens` bounds what all pins together keep from being evicted.

    `look_up` finds a request's prefix anew: what was found when it arrived may have grown, or be gone.
    """

    def __init__(
        self,
        tree_cache: BasePrefixCache,
        table: RequestTable,
        most_tokens: int,
        look_up: Callable[[Req], None],
    ) -> None:
        self._cache, self._table, self._most = tree_cache, table, most_tokens
        self._look_up = look_up
        self._locks: dict[int, tuple[Any, int]] = {}  # row -> (lock, tokens that it alone keeps)
        self._uncached: set[int] = set()  # rows that were looked up to no avail
        self.tokens = 0

    def keep(self, reqs: list[Req]) -> None:
        """Pin the prefixes of `reqs`, nearest first, and let go of all others.

        One with nothing cached is not looked up again, but when `prefixes` says that there may be something now.
        """
        rows = {req.slo_row for req in reqs}
        for row in [row for row in self._locks if row not in rows]:
            self.release(row)
        self._uncached &= rows
        for req in reqs:
            row = req.slo_row
            if row in self._locks or (row in self._uncached and self._table.history_tokens[row] == 0):
                continue
            self._look_up(req)  # what was found before may have been evicted since
            if self._table.history_tokens[row] == 0:
                self._uncached.add(row)
                continue
            self._uncached.discard(row)
            self._pin(req)

    def _pin(self, req: Req) -> None:
        row = req.slo_row
        if not tree.keeps_unfinished(self._cache):
            return
        held, kept = tree.kept_by(self._cache, req.last_node)
        self._locks[row] = (held, kept)
        self.tokens += kept
        self._table.pinned_tokens[row] = kept
        if self.tokens > self._most:
            self.release(row)

    def release(self, row: int) -> None:
        """Let go of one request's prefix; nothing if it has no pin."""
        if row in self._locks:
            held, kept = self._locks.pop(row)
            tree.unlock(self._cache, held)
            self.tokens -= kept
            self._table.pinned_tokens[row] = 0

    def release_all(self) -> None:
        """Let go of every prefix."""
        for row in list(self._locks):
            self.release(row)

    def __len__(self) -> int:
        return len(self._locks)
