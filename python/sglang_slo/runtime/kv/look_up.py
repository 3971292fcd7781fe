"""How much of a waiting request is in the prefix tree, and how much of that is held by others anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.core.table import RequestTable
    from sglang_slo.runtime.ports import KvPool


class PrefixLookUp:
    """Looks requests up in one tree, and writes what it finds into the table."""

    def __init__(self, kv: KvPool, table: RequestTable) -> None:
        self._tree, self._table = kv.tree, table

    def cached_tokens(self, req: Req) -> int:
        """How much of a request that has just come is in the radix cache."""
        req.init_next_round_input(self._tree)
        return len(req.prefix_indices)

    def look_up(self, req: Req) -> None:
        """Bring the row of a waiting request up to date."""
        req.init_next_round_input(self._tree)
        node, pinned = req.last_node, len(req.prefix_indices)
        if not self._tree.is_tree_cache():
            node = None
        while node is not None and node.lock_ref == 0 and node is not self._tree.root_node:
            pinned -= len(node.key)
            node = node.parent
        self._table.history_tokens[req.slo_row] = len(req.prefix_indices)
        self._table.shared_tokens[req.slo_row] = max(pinned, 0)
