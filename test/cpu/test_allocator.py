"""The CPU platform's paged allocator: each token in its place, each page somebody's once, nothing taken in vain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from sglang_slo.cpu.allocator import allocator


def made(tokens: int, page: int) -> object:
    return allocator(tokens, page_size=page, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False)


class Rows:
    """Requests as rows of slots, which ask an allocator as SGLang does."""

    def __init__(self, tokens: int, page: int) -> None:
        self.pool, self.page, self.size = made(tokens, page), page, tokens
        self.rows: list[list[int]] = []

    def extend(self, which: list[int], more: list[int]) -> bool:
        before = torch.tensor([len(self.rows[i]) for i in which])
        after = before + torch.tensor(more)
        last = torch.tensor([self.rows[i][-1] if self.rows[i] else -1 for i in which])
        free = self.pool.available_size()
        slots = self.pool.alloc_extend(before, before, after, after, last, sum(more))
        return self._written(slots, which, more, free)

    def decode(self, which: list[int]) -> bool:
        after = torch.tensor([len(self.rows[i]) + 1 for i in which])
        last = torch.tensor([self.rows[i][-1] for i in which], dtype=torch.int32)
        free = self.pool.available_size()
        return self._written(self.pool.alloc_decode(after, after, last), which, [1] * len(which), free)

    def _written(self, slots: torch.Tensor | None, which: list[int], more: list[int], free: int) -> bool:
        lengths = [(len(self.rows[i]), n) for i, n in zip(which, more, strict=True)]
        need = sum(self.pages(before + n) - self.pages(before) for before, n in lengths)
        assert (slots is None) == (need * self.page > free)
        if slots is None:
            assert self.pool.available_size() == free
            return False
        flat = slots.tolist()
        assert len(flat) == sum(more)
        for i, n in zip(which, more, strict=True):
            self.rows[i] += flat[:n]
            flat = flat[n:]
        return True

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def check(self) -> None:
        for row in self.rows:
            assert all(slot % self.page == place % self.page for place, slot in enumerate(row))
            assert all(row[p] // self.page == row[p - p % self.page] // self.page for p in range(len(row)))
        owned = [slot // self.page for row in self.rows for slot in row[:: self.page]]
        assert len(set(owned)) == len(owned) and 0 not in owned
        assert self.pool.available_size() == self.size - len(owned) * self.page


@settings(deadline=None, max_examples=60)
@given(data=st.data(), page=st.sampled_from([2, 16, 64]))
def test_every_token_has_its_place_and_every_page_one_owner(data: st.DataObject, page: int) -> None:
    rows = Rows(20 * page, page)
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["new", "longer", "decode", "free"]))
        there = [i for i, row in enumerate(rows.rows) if row]
        if step == "new":
            lengths = data.draw(st.lists(st.integers(1, 4 * page), min_size=1, max_size=3))
            first = len(rows.rows)
            rows.rows += [[] for _ in lengths]
            rows.extend(list(range(first, len(rows.rows))), lengths)
        elif not there:
            continue
        elif step == "longer":
            rows.extend(there, [data.draw(st.integers(1, 2 * page)) for _ in there])
        elif step == "decode":
            rows.decode(there)
        else:
            gone = data.draw(st.sampled_from(there))
            rows.pool.free_segment(torch.tensor(rows.rows[gone]), start_pos=0)
            rows.rows[gone] = []
        rows.check()


def test_at_page_size_one_it_is_sglangs_own() -> None:
    assert type(made(10, 1)) is TokenToKVPoolAllocator


@pytest.mark.parametrize("page", [16, 64])
def test_a_pool_to_the_last_page_is_given_out_and_not_one_more(page: int) -> None:
    rows = Rows(4 * page, page)
    rows.rows = [[], []]
    assert rows.extend([0, 1], [2 * page, 2 * page])
    assert not rows.decode([0])
    assert rows.pool.available_size() == 0
