"""The CPU platform's KV allocator: one slot a token.

SGLang builds the allocator of an out-of-tree platform with a `page_size`, which its own one-slot allocator
does not accept.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator


class TokenAllocator(TokenToKVPoolAllocator):
    """SGLang's allocator at page size 1. Raises ValueError for any other `page_size`."""

    def __init__(self, *args: Any, page_size: int = 1, **kwargs: Any) -> None:
        if page_size != 1:
            raise ValueError(f"page_size: the CPU platform accepts 1 only, got {page_size}")
        super().__init__(*args, **kwargs)
