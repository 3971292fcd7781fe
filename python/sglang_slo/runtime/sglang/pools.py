"""The pools that KV lies in: one, and where some layers look back over a window alone, a second one for these.

SGLang counts both together where nobody says which is meant; here each is counted alone. Layers that keep a state in the
place of KV have a pool of those, whose size follows the requests that may run. Known are pools of a fixed size each,
beside a prefix tree that keeps all parts of a prefix: what shares bytes between them, or keeps a ring for each request,
is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo

from sglang_slo.core import pages

# Newer releases keep one tree for all kinds of caches, whose record of a request says what of its window is given back.
WINDOWS = hasattr(ReqKvInfo, "swa_dead_lo")
# Kinds of (allocator, KV, rows) that are known, exact names: others may give KV back at other times.
WINDOW_POOLS = ("SWATokenToKVPoolAllocator", "SWAKVPool", "ReqToTokenPool")
STATE_POOLS = ("HybridLinearKVPool", "HybridReqToTokenPool")
STATES_OF_ONE = 3  # its own, the one that its prefix was found with, and the one that is kept for others


@dataclass(frozen=True)
class Window:
    """The window's pool of one scheduler. Tokens, see `core.kv.window.WindowPool`."""

    capacity_tokens: int
    window_tokens: int
    late_tokens: int


def free_tokens(allocator: Any, tree: Any) -> int:
    """KV of the pool that keeps all of a context: free and evictable."""
    if hasattr(allocator, "full_available_size"):
        return int(allocator.full_available_size() + tree.full_evictable_size())
    return int(allocator.available_size() + tree.evictable_size())


def window_free_tokens(allocator: Any, tree: Any) -> int:
    """KV of the window's pool: free and evictable."""
    return int(allocator.swa_available_size() + tree.swa_evictable_size())


def least_free_tokens(allocator: Any, tree: Any) -> int:
    """KV of the pool that has least of it: a token needs a slot of each."""
    free = free_tokens(allocator, tree)
    return (
        min(free, window_free_tokens(allocator, tree)) if hasattr(allocator, "swa_available_size") else free
    )


def window_of(scheduler: Any) -> Window | None:
    """The window's pool; None: every layer looks back over all of a context."""
    if not scheduler.is_hybrid_swa:
        return None
    from sglang.srt.environ import envs

    return Window(
        capacity_tokens=int(scheduler.token_to_kv_pool_allocator.size_swa),
        window_tokens=int(scheduler.tree_cache.swa_retain_window),
        late_tokens=max(int(envs.SGLANG_SWA_EVICTION_INTERVAL.get()), 1),
    )


def own_window_tokens(reqs: list[Req], page_tokens: int) -> np.ndarray:
    """Slots of the window's pool that each request holds beside the tree's, int[n]."""
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    def own(req: Req) -> int:
        kv = req.kv
        given_back = max(kv.get_evicted_seqlen(ComponentType.SWA) - kv.swa_dead_lo(page_tokens), 0)
        return int(pages.whole(kv.kv_allocated_len, page_tokens) - kv.cache_protected_len - given_back)

    return np.fromiter(map(own, reqs), np.int64, len(reqs))


def state_room(scheduler: Any) -> int | None:
    """Requests that the pool of states has room for, whatever a prefix tree would keep there; None: there is none."""
    if not scheduler.is_hybrid_ssm:
        return None
    rows = scheduler.req_to_token_pool
    free = rows.mamba_allocator.schedulable_available_size() + scheduler.tree_cache.mamba_evictable_size()
    return int(free // STATES_OF_ONE)


def unknown(scheduler: Any) -> str | None:
    """Why several pools of this scheduler cannot be counted; None: they can, or there is one alone."""
    windows, states = scheduler.is_hybrid_swa, scheduler.is_hybrid_ssm
    if not windows and not states:
        return None
    what = " and ".join(["sliding windows"] * windows + ["recurrent states"] * states)
    if not WINDOWS:
        return f"{what}: in this release they have a prefix tree of their own"
    slots, rows, tree = (
        scheduler.token_to_kv_pool_allocator,
        scheduler.req_to_token_pool,
        scheduler.tree_cache,
    )
    names = type(slots).__name__, type(slots.get_kvcache()).__name__, type(rows).__name__
    if windows:
        known = names == WINDOW_POOLS and not slots.swa_req_ring and not _windows_vary(scheduler)
    else:
        known = names[1:] == STATE_POOLS and "Unified" not in names[0]
    if not known:
        return f"{what} in pools of {', '.join(names)}"
    if states and _states_vary(rows):
        return f"{what} that are noted on the way, replayed or kept in eight bits"
    if not tree.supports_prefix_sharing():
        return f"{what} without a prefix tree"
    if scheduler.enable_hierarchical_cache:
        return f"{what} in host memory"
    if not scheduler.spec_algorithm.is_none():
        return f"{what} with speculative decoding"
    return None


def _windows_vary(scheduler: Any) -> bool:
    """Whether some requests keep more than a window."""
    runner = scheduler.tp_worker.model_runner
    return bool(scheduler.tree_cache.supports_auxiliary_swa() or runner.prefill_aware_swa)


def _states_vary(rows: Any) -> bool:
    """Whether a request may hold more states than `state_room` reckons with, or the tree keeps others than it holds."""
    return bool(
        rows.enable_mamba_extra_buffer
        or rows.mamba_pool.replayssm_write_pos is not None
        or rows.mamba_ckpt_pool is not None
    )
