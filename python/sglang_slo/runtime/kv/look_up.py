"""How much of a waiting request is in the prefix tree, and how much of that is held by others anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_batch import Req

from sglang_slo.runtime.sglang import kv, tree

if TYPE_CHECKING:
    from sglang_slo.core.table import RequestTable
    from sglang_slo.runtime.ports import KvPool

Req.slo_settled = False  # whether it was looked up since SGLang began to fetch for it


class PrefixLookUp:
    """Looks requests up in one tree, and writes what it finds into the table."""

    def __init__(self, pool: KvPool, table: RequestTable) -> None:
        self._tree, self._table = pool.tree, table

    def cached_tokens(self, req: Req) -> int:
        """How much of a request that has just come is in the radix cache."""
        tree.find_prefix(self._tree, req)
        return kv.prefix_tokens(req) + tree.host_tokens(self._tree, req)

    def look_up(self, req: Req) -> None:
        """Bring the row of a waiting request up to date.

        One that holds KV keeps it: SGLang would take what is found in the cache for what the request holds there. It was set
        aside half-prefilled, or stock scheduling has admitted it.
        """
        if kv.row_of(req) is not None:
            self._table.history_tokens[req.slo_row] = kv.committed_tokens(req)
            return
        tree.find_prefix(self._tree, req)
        history, host, alone = kv.prefix_tokens(req), tree.host_tokens(self._tree, req), 0
        if history:
            lock, alone = tree.kept_by(self._tree, req.last_node)
            tree.unlock(self._tree, lock)
        self._table.history_tokens[req.slo_row] = history + host
        self._table.host_tokens[req.slo_row] = host
        self._table.shared_tokens[req.slo_row] = max(history - alone, 0)

    def ready(self, req: Req) -> bool:
        """Whether a waiting request can be planned: not while its KV is on its way from storage to host memory."""
        fetched = tree.fetched(self._tree, req)
        if fetched is False:
            return False
        if fetched or not req.slo_settled:  # it may have come before anybody asked
            self.look_up(req)
            req.slo_settled = True
        return True
