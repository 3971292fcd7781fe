"""The CPU platform's KV allocators: SGLang's own, with plain torch where SGLang has GPU kernels.

At page size 1 slots are given one by one; above that, in pages, of which each belongs to one request. Free pages, giving
back and counting stay SGLang's; which slots a batch gets is all that is worked out here.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator


def allocator(size: int, page_size: int = 1, *args: Any, **kwargs: Any) -> Any:
    """The allocator for `page_size`, made as SGLang makes one of an out-of-tree platform."""
    if page_size == 1:
        return TokenToKVPoolAllocator(size, *args, **kwargs)
    return PagedAllocator(size, page_size, *args, **kwargs)


class PagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's allocator of whole pages. A request's token at place p lies at p % page_size of one of its pages."""

    free_pages: torch.Tensor  # int64[n], page numbers

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens of each request from its prefix to its length, one request after the other; None, and
        nothing is taken, if there are too few pages. `last_loc`: the slot of each prefix's last token.
        """
        begun = (prefix_lens + self.page_size - 1) // self.page_size  # pages that each has already
        new = (seq_lens + self.page_size - 1) // self.page_size - begun
        taken = self._take(int(new.sum()))
        if taken is None:
            return None
        lengths = seq_lens - prefix_lens
        of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        behind = torch.arange(len(of)) - (torch.cumsum(lengths, 0) - lengths)[of]
        place = prefix_lens[of] + behind
        slots = last_loc[of].to(torch.int64) + 1 + behind  # in the page where the prefix ends
        fresh = place >= begun[of] * self.page_size
        page = (torch.cumsum(new, 0) - new - begun)[of] + place // self.page_size
        slots[fresh] = taken[page[fresh]] * self.page_size + place[fresh] % self.page_size
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """The slot of each request's last token, which brings it to `seq_lens`; None, and nothing is taken, if there are
        too few pages. `last_loc`: the slot of the token before.
        """
        fresh = (seq_lens - 1) % self.page_size == 0
        taken = self._take(int(fresh.sum()))
        if taken is None:
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[fresh] = taken * self.page_size
        return slots

    def _take(self, pages: int) -> torch.Tensor | None:
        if pages > len(self.free_pages):
            self.merge_and_sort_free()
        if pages > len(self.free_pages):
            return None
        taken = self.free_pages[:pages]
        self.free_pages = self.free_pages[pages:]
        return taken
