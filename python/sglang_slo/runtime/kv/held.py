"""Half-prefilled requests that are set aside where no prefix tree could keep their KV for them: each keeps its own row.

What they hold counts as free (`KvPool.free_tokens`), like what a tree could evict, and is taken from them when it is
needed: from the one set aside longest ago first, which then starts again. So planning sees the same with a tree and without.
Always: nobody lets go but whoever waits in the queue: a batch needs what the others have.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from sglang_slo.runtime.sglang import kv, tree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.core.table import RequestTable
    from sglang_slo.runtime.ports import KvPool, Waiting


class HeldPrefills:
    """Those of one scheduler. The list itself is `pool.held`, in the order in which they were set aside."""

    def __init__(self, pool: KvPool, table: RequestTable, waiting: Waiting) -> None:
        self._pool, self._table, self._waiting = pool, table, waiting

    def waiting(self) -> list[Req]:
        """Those who are in the queue; one in a batch may stay in the list for a while (`entered`)."""
        if not self._pool.held:
            return []
        queue = set(self._waiting.reqs)
        return [req for req in self._pool.held if req in queue]

    def hold(self, req: Req) -> None:
        """`req`, which is half prefilled, waits from now on, and keeps what it has computed."""
        req.slo_parked = getattr(req, "slo_parked", 0) + 1
        self._pool.held[req] = None

    def make_room(self, tokens: int, rows: int = 0, spared: Collection[Req] = ()) -> None:
        """Take KV from those set aside, but for the `spared`, until so many tokens and request rows are free."""
        pool = self._pool
        for req in self.waiting():
            if pool.unheld_tokens() >= tokens and pool.rows.available_size() >= rows:
                return
            if req not in spared:
                self._let_go(req)

    def release(self) -> None:
        """Let go of all: they give back what they hold and compute it again."""
        for req in self.waiting():
            self._let_go(req)

    def over(self, req: Req) -> None:
        """A request is nowhere any more: what it held, if it did, is given back."""
        if req in self._pool.held and kv.row_of(req) is not None:
            self._let_go(req)
        self._pool.held.pop(req, None)

    def entered(self) -> None:
        """Those who are in the queue no more are in a batch: what they hold is not to be counted as free."""
        for req in set(self._pool.held).difference(self._waiting.reqs):
            del self._pool.held[req]

    def _let_go(self, req: Req) -> None:
        del self._pool.held[req]
        req.slo_computed_tokens = kv.committed_tokens(req)
        tree.release(self._pool.tree, req, keep=False)
        req.reset_for_retract()
        req.retraction_count -= 1  # nothing of its output was taken from it
        self._table.history_tokens[req.slo_row] = 0
