"""The prefix tree: locks on it, what they keep from being evicted, and giving a request's KV back to it.

Newer releases hand out a receipt for each lock, which a request keeps of its own (`req.lock`); in older ones the node is
enough. Nodes are opaque in both: how much a lock alone keeps is told by what is evictable before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, InitLoadBackParams
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
KNOWN_CACHES = ("UnifiedRadixCache",) if RECEIPTS else ("RadixCache", "HiRadixCache", "ChunkCache")


def shares_prefixes(tree: BasePrefixCache) -> bool:
    """Whether what a request has computed stays for others, and for itself after a pause."""
    return bool(tree.supports_prefix_sharing() if RECEIPTS else tree.is_tree_cache())


def keeps_states(tree: BasePrefixCache) -> bool:
    """Whether it keeps recurrent states beside KV."""
    return RECEIPTS and bool(getattr(tree, "supports_mamba", bool)())


def keeps_unfinished(tree: BasePrefixCache) -> bool:
    """Whether a request that has not ended can leave all of its KV there: of a state, only the one it ends with is."""
    return shares_prefixes(tree) and not keeps_states(tree)


def find_prefix(tree: BasePrefixCache, req: Req) -> None:
    """Look up what of the request is cached. Nothing is taken for it: it only waits."""
    if keeps_states(tree):  # else a state would be copied for it at once
        req.init_next_round_input(tree, cow_mamba=False)
    else:
        req.init_next_round_input(tree)


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


def lock_for(tree: BasePrefixCache, req: Req, window: bool = True) -> None:
    """The lock that a request holds on its prefix from admission until its KV is released.

    Without its `window`: the layers that look back over one do not see the prefix any more.
    """
    if not RECEIPTS:
        lock(tree, req.last_node)
    elif window:
        req.lock = tree.lock(req.last_node)
    else:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        req.lock = tree.lock(req.last_node, skip_lock_components=(ComponentType.SWA,))


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


def kept_alone(tree: BasePrefixCache, req: Req, evictable: Callable[[], int] | None = None) -> int:
    """Tokens of the tree that nobody but this request keeps from being evicted; of the pool that `evictable` counts."""
    evictable = evictable or tree.evictable_size
    before, window = evictable(), not getattr(lock_of(req), "swa_released", False)
    unlock_of(tree, req)
    try:
        return int(evictable() - before)
    finally:
        lock_for(tree, req, window)


def prefix_slots(tree: BasePrefixCache, req: Req) -> torch.Tensor:
    """Slots of the prefix that was found for the request, int64[prefix_tokens]."""
    if not PREFIX_BY_LENGTH:
        return req.prefix_indices
    if prefix_tokens(req) == 0:
        return torch.empty(0, dtype=torch.int64)
    return tree.prefix_device_indices(req)


def host_tokens(tree: BasePrefixCache, req: Req) -> int:
    """Tokens behind the prefix that was found for the request whose KV lies in host memory and can be loaded."""
    found = int(req.host_hit_length)
    return found if found >= getattr(tree, "load_back_threshold", 1) else 0


def load_back(tree: BasePrefixCache, req: Req) -> int:
    """Have these loaded with the next batch: they are part of the prefix from now on. Returns how many; 0: none could be."""
    params = InitLoadBackParams(
        best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req
    )
    found = tree.init_load_back(params)
    if PREFIX_BY_LENGTH:
        if found is None:
            return 0
        req.host_loaded_length, req.last_node = found
        req.prefix_len += req.host_loaded_length
        req.kv.cache_protected_len = req.prefix_len
        return int(req.host_loaded_length)
    slots, req.last_node = found
    req.prefix_indices = torch.cat([req.prefix_indices, slots])
    req.cache_protected_len = len(req.prefix_indices)
    return len(slots)


def note_copies(tree: BasePrefixCache) -> None:
    """Unlock what copies to host memory and back were still reading or writing. All ranks do so together, or none does.

    Newer releases begin each iteration with it; older ones come to it only where somebody is to be admitted, and whoever
    waits for what is locked would never be.
    """
    if not RECEIPTS and hasattr(tree, "ongoing_write_through"):
        tree.check_hicache_events()


def has_storage(tree: BasePrefixCache) -> bool:
    """Whether KV may come from storage beyond host memory."""
    return bool(getattr(tree, "enable_storage", False))


def fetching(tree: BasePrefixCache) -> bool:
    """Whether KV of anybody is on its way from storage to host memory."""
    return bool(getattr(tree, "ongoing_prefetch", None))


def fetched(tree: BasePrefixCache, req: Req) -> bool | None:
    """Whether that of `req` has just come, or was given up; None: none was on its way. All ranks ask alike."""
    handle = req.cache_request_handle if RECEIPTS else req.rid
    if handle not in tree.ongoing_prefetch:
        return None
    return bool(tree.check_prefetch_progress(handle))


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
    forget_state(tree, req)
    if row_of(req) is not None:
        rows.free(req)


def forget_state(tree: BasePrefixCache, req: Req) -> None:
    """Take from a request that goes on waiting the state that it was given when it was offered for a batch."""
    if not keeps_states(tree):
        return
    req.kv.mamba_cow_src_index, req.kv.mamba_needs_clear = None, False
    if req.kv.holds_mamba and not req.session:  # else it is the session's
        tree.req_to_token_pool.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
        req.kv.mamba_pool_idx = None


def forget_offers(tree: BasePrefixCache, reqs: list[Req]) -> None:
    """The same for all that were offered, where that was broken off: what was set apart for them is free again, too."""
    if keeps_states(tree):
        tree.req_to_token_pool.mamba_allocator.alloc_group_end()
        for req in reqs:
            forget_state(tree, req)
