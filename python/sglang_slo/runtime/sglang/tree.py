"""The prefix tree: locks on it, what they keep from being evicted, and giving a request's KV back to it.

Newer releases hand out a receipt for each lock, which a request keeps of its own (`req.lock`); in older ones the node is
enough. Nodes are opaque in both: how much a lock alone keeps is told by what is evictable before and after.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_slo.runtime.sglang.kv import (
    PREFIX_BY_LENGTH,
    commit_allocated,
    holds_slots,
    prefix_tokens,
    row_of,
)

RECEIPTS = hasattr(BasePrefixCache, "unlock")  # the tree gives a receipt for a lock, and wants it back

# Caches whose bookkeeping is known; a subclass may free KV inside a request, so exact names count.
KNOWN_CACHES = ("UnifiedRadixCache",) if RECEIPTS else ("RadixCache", "ChunkCache")


def shares_prefixes(tree: BasePrefixCache) -> bool:
    """Whether what a request has computed stays for others, and for itself after a pause."""
    return bool(tree.supports_prefix_sharing() if RECEIPTS else tree.is_tree_cache())


def lock(tree: BasePrefixCache, node: Any) -> Any:
    """Keep the prefix that ends at `node` from being evicted; `unlock` takes what this returns."""
    if RECEIPTS:
        return tree.lock(node)
    tree.inc_lock_ref(node)
    return node


def unlock(tree: BasePrefixCache, held: Any) -> None:
    """Undo one `lock`."""
    if RECEIPTS:
        tree.unlock(held)
    else:
        tree.dec_lock_ref(held)


def lock_for(tree: BasePrefixCache, req: Req) -> None:
    """The lock that a request holds on its prefix from admission until its KV is released."""
    held = lock(tree, req.last_node)
    if RECEIPTS:
        req.lock = held


def lock_of(req: Req) -> Any:
    """That lock, as `unlock` takes it."""
    return req.lock if RECEIPTS else req.last_node


def unlock_of(tree: BasePrefixCache, req: Req) -> None:
    """Give that lock back."""
    unlock(tree, lock_of(req))
    if RECEIPTS:
        req.lock = None


def kept_by(tree: BasePrefixCache, node: Any) -> tuple[Any, int]:
    """A new lock on `node`, and how many tokens it keeps that could be evicted without it."""
    before = tree.evictable_size()
    held = lock(tree, node)
    try:
        return held, int(before - tree.evictable_size())
    except BaseException:
        unlock(tree, held)
        raise


def kept_alone(tree: BasePrefixCache, req: Req) -> int:
    """Tokens of the tree that nobody but this request keeps from being evicted."""
    before = tree.evictable_size()
    unlock_of(tree, req)
    try:
        return int(tree.evictable_size() - before)
    finally:
        lock_for(tree, req)


def prefix_slots(tree: BasePrefixCache, req: Req) -> torch.Tensor:
    """Slots of the prefix that was found for the request, int64[prefix_tokens]."""
    if not PREFIX_BY_LENGTH:
        return req.prefix_indices
    if prefix_tokens(req) == 0:
        return torch.empty(0, dtype=torch.int64)
    return tree.prefix_device_indices(req)


def release(tree: BasePrefixCache, req: Req, keep: bool) -> None:
    """Take row, slots and lock from the request; with `keep`, what it has computed stays in the tree."""
    release_kv_cache(req, tree, **{"checkpoint" if RECEIPTS else "is_insert": keep})


def release_half_built(tree: BasePrefixCache, rows: Any, req: Req) -> None:
    """Take from the request what a batch that was never launched had been given for it: lock, row, and slots if any."""
    if holds_slots(req):
        commit_allocated(req)
        release(tree, req, keep=False)
        return
    unlock_of(tree, req)
    if row_of(req) is not None:
        rows.free(req)
