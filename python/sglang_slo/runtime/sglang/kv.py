"""What a request holds of SGLang's pools, wherever this SGLang writes it down.

Newer releases keep all of it in one record that is always there (`req.kv`) and of its cached prefix only the length.
Older ones keep the parts on the request, give it a record only while it holds KV, and the prefix as a tensor of slots.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

IN_RECORD = (
    "req_pool_idx" in ReqKvInfo.__dataclass_fields__
)  # the record holds everything, and is always there
PREFIX_BY_LENGTH = hasattr(
    BasePrefixCache, "prefix_device_indices"
)  # the slots of a prefix are read off the tree

_where = "kv.{}" if IN_RECORD else "{}"
row_of: Callable[[Req], int | None] = attrgetter(_where.format("req_pool_idx"))
"""The request's row in the table of slots; None: it holds no KV."""
committed_tokens: Callable[[Req], int] = attrgetter(_where.format("kv_committed_len"))
"""Tokens whose KV is there, or comes with the iteration in flight."""
protected_tokens: Callable[[Req], int] = attrgetter(_where.format("cache_protected_len"))
"""Of those, the first ones: the prefix tree's, not the request's own."""


def allocated_tokens(req: Req) -> int:
    """Tokens that the request has slots for."""
    return 0 if req.kv is None else req.kv.kv_allocated_len


def slot_counts(reqs: list[Req]) -> np.ndarray:
    """Tokens that each request has slots for, int[n]."""
    return np.fromiter(map(allocated_tokens, reqs), np.int64, len(reqs))


def computed_counts(reqs: list[Req]) -> np.ndarray:
    """Tokens of each request whose KV is there, as far as results are known, int[n]."""
    return np.fromiter(map(committed_tokens, reqs), np.int64, len(reqs))


def prefix_tokens(req: Req) -> int:
    """Tokens that need not be computed: found in the prefix tree, or computed by its earlier chunks."""
    return req.prefix_len if PREFIX_BY_LENGTH else len(req.prefix_indices)


def set_extend(req: Req, tokens: int) -> None:
    """The next batch computes this many tokens behind the prefix."""
    start = prefix_tokens(req)
    if PREFIX_BY_LENGTH:
        req.extend_end = start + tokens
    else:
        req.set_extend_range(start, start + tokens)


def prefix_is_own(req: Req, rows: Any) -> None:
    """All that was computed for the request is its prefix, where it lies in the request's own row of `rows`."""
    if PREFIX_BY_LENGTH:
        req.prefix_len = committed_tokens(req)
    else:
        row = rows.req_to_token[row_of(req), : committed_tokens(req)]
        req.prefix_indices = row.to(torch.int64, copy=True)


def hold(req: Req, tokens: int) -> None:
    """Slots and KV of the request's first `tokens` tokens are there, in its row."""
    if not IN_RECORD:
        req.kv = ReqKvInfo(kv_allocated_len=tokens, swa_evicted_seqlen=0)
        req.kv_committed_len = tokens
    else:
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens


def holds_slots(req: Req) -> bool:
    """Whether the request was given slots for KV, computed or not."""
    return bool(req.kv.holds_kv) if IN_RECORD else req.kv is not None


def commit_allocated(req: Req) -> None:
    """Count all of the request's slots as its own, whatever was computed in them: so that they are given back."""
    if IN_RECORD:
        req.kv.kv_committed_len = req.kv.kv_allocated_len
    else:
        req.kv_committed_len = req.kv.kv_allocated_len


def hold_nothing(req: Req) -> None:
    """The request's row, slots and lock are somebody else's business from now on."""
    req.last_node = None
    if not PREFIX_BY_LENGTH:
        req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    else:
        req.prefix_len, req.lock = 0, None
    if not IN_RECORD:
        req.kv, req.kv_committed_len, req.cache_protected_len = None, 0, 0
    else:
        req.kv.mark_kv_released()
        req.kv.kv_committed_len = req.kv.cache_protected_len = req.kv.cache_inserted_len = 0


def have_history(req: Req, tokens: int, scheduler: Any) -> None:
    """Slots for the request's first `tokens` tokens, as if they had been computed; for measuring, on a free pool."""
    slots = _slots(scheduler.token_to_kv_pool_allocator, tokens)
    if not PREFIX_BY_LENGTH:
        req.prefix_indices = slots
        return
    table = scheduler.req_to_token_pool
    table.alloc([req])
    table.write((row_of(req), slice(0, tokens)), slots.to(torch.int32))
    hold(req, tokens)
    req.prefix_len = tokens


def _slots(allocator: Any, tokens: int) -> torch.Tensor:
    """So many slots in whole pages; where a window's pool is beside the other one, of both, int64[tokens]."""
    page = allocator.page_size
    if page == 1 or not hasattr(allocator, "swa_attn_allocator"):
        return allocator.alloc(-(-tokens // page) * page)[:tokens]
    here, there = (torch.tensor([n], dtype=torch.int64) for n in (0, tokens))
    on_device = [t.to(allocator.device) for t in (here, there, here - 1)]
    return allocator.alloc_extend(on_device[0], here, on_device[1], there, on_device[2], tokens)
