"""Half-prefilled requests that are set aside where no prefix tree could keep their KV for them: each keeps its own row.

What they hold counts as free (`KvPool.free_tokens`), like what a tree could evict, and is taken from them when it is
needed: from the one set aside longest ago first, which then starts again. So planning sees the same with a tree and without.
Always: whoever is in `KvPool.held` waits in the queue with a row of its own, and no batch in flight adds to that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from sglang_slo.runtime.sglang import kv, tree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.core.table import RequestTable
    from sglang_slo.runtime.ports import KvPool


def _everyone(req: Req) -> bool:
    return True


class HeldPrefills:
    """Those of one scheduler. The list itself is `pool.held`, in the order in which they were set aside."""

    def __init__(self, pool: KvPool, table: RequestTable) -> None:
        self._pool, self._table = pool, table

    def hold(self, req: Req) -> None:
        """`req`, which is half prefilled, waits from now on, and keeps what it has computed."""
        req.slo_parked = getattr(req, "slo_parked", 0) + 1
        self._pool.held[req] = None

    def make_room(self, tokens: int, rows: int = 0, spared: Collection[Req] = ()) -> None:
        """Take KV from those set aside, but for the `spared`, until so many tokens and request rows are free."""
        pool = self._pool
        for req in [req for req in pool.held if req not in spared]:
            if pool.unheld_tokens() >= tokens and pool.rows.available_size() >= rows:
                return
            self._let_go(req)

    def release(self, which: Callable[[Req], bool] = _everyone) -> None:
        """Let go of all of them, or of some: they give back what they hold and compute it again."""
        for req in [req for req in self._pool.held if which(req)]:
            self._let_go(req)

    def entered(self, queue: Collection[Req]) -> None:
        """Those who are in the `queue` no more are in a batch: what they hold is nobody's to take."""
        for req in set(self._pool.held).difference(queue):
            del self._pool.held[req]

    def _let_go(self, req: Req) -> None:
        del self._pool.held[req]
        req.slo_computed_tokens = kv.committed_tokens(req)
        tree.release(self._pool.tree, req, keep=False)
        req.reset_for_retract()
        req.retraction_count -= 1  # nothing of its output was taken from it
        self._table.history_tokens[req.slo_row] = 0
