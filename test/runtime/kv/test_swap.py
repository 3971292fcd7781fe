"""Host memory for KV: every byte comes back, to whatever slots, and memory is neither lost nor shared."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.runtime.kv import host_pool
from sglang_slo.runtime.kv.host_pool import ArenaHostPool, Extents, SwapMeter, make_host_pool, row_bytes
from sglang_slo.runtime.kv.swap_cost import SwapCost

relaxed = settings(deadline=None, max_examples=50)


class MHATokenToKVPool:
    """Looks like SGLang's, with numbers for KV that tell where they belong."""

    def __init__(self, slots: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32) -> None:
        shape = (slots, 2, 4)
        make = lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)  # noqa: E731
        self.k_buffer = [make(i) for i in range(layers)]
        self.v_buffer = [make(100 + i) for i in range(layers)]

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [*self.k_buffer, *self.v_buffer]


def pool_of(kv: MHATokenToKVPool, tokens: int = 64) -> ArenaHostPool:
    return ArenaHostPool(kv.buffers, tokens)


def rows(kv: MHATokenToKVPool, slots: torch.Tensor) -> list[torch.Tensor]:
    return [buffer[slots].clone() for buffer in kv.buffers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@relaxed
@given(data=st.data())
def test_what_was_saved_comes_back_to_any_slots(dtype: torch.dtype, data: st.DataObject) -> None:
    kv = MHATokenToKVPool(dtype=torch.float32 if dtype is torch.uint8 else dtype)
    pool = pool_of(kv)
    order = data.draw(st.permutations(range(64)))
    count = data.draw(st.integers(1, 30))
    start = data.draw(st.integers(0, count - 1))
    source, target = torch.tensor(order[:count]), torch.tensor(order[count : 2 * count])
    before = rows(kv, source)
    copy = pool.save(source)
    for buffer in kv.buffers:
        buffer[source] = 0
    pool.load(copy, start, target[start:])
    for was, buffer in zip(before, kv.buffers, strict=True):
        assert torch.equal(buffer[target[start:]], was[start:])
    pool.drop(copy)
    assert pool.used_tokens == 0


def test_copies_do_not_touch_each_other() -> None:
    kv = MHATokenToKVPool()
    pool = pool_of(kv)
    places = [torch.arange(0, 10), torch.arange(10, 25), torch.arange(25, 31)]
    before = [rows(kv, p) for p in places]
    copies = [pool.save(p) for p in places]
    pool.drop(copies.pop(1))
    copies.insert(1, pool.save(places[1]))
    for buffer in kv.buffers:
        buffer.zero_()
    for place, copy in zip(places, copies, strict=True):
        pool.load(copy, 0, place)
    for was, place in zip(before, places, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, rows(kv, place), strict=True))


def test_a_failed_save_takes_room_until_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(ArenaHostPool, "_save_buffer", staticmethod(broken))
    pool = pool_of(MHATokenToKVPool())
    copy = pool.save(torch.arange(10))
    assert not copy.ok and pool.used_tokens == 10
    pool.drop(copy)
    assert pool.used_tokens == 0 and pool.largest_room() >= 64


@relaxed
@given(st.integers(1, 100), st.integers(0, 2**32))
def test_extents_never_overlap_and_all_come_back(size: int, seed: int) -> None:
    extents, rng = Extents(size), random.Random(seed)
    held: list[tuple[int, int]] = []
    for _ in range(200):
        length = rng.randint(1, max(size // 3, 1))
        if rng.random() < 0.6 and extents.largest() >= length:
            held.append((extents.take(length), length))
        elif held:
            extents.give(*held.pop(rng.randrange(len(held))))
        taken = [token for start, length in held for token in range(start, start + length)]
        assert len(set(taken)) == len(taken) and all(0 <= t < size for t in taken)
    for run in held:
        extents.give(*run)
    assert extents.largest() == size


def test_no_run_is_longer_than_what_is_free_in_one_piece() -> None:
    extents = Extents(30)
    starts = [extents.take(10) for _ in range(3)]
    extents.give(starts[0], 10)
    extents.give(starts[2], 10)
    assert extents.largest() == 10
    with pytest.raises(MemoryError):
        extents.take(11)


def test_a_pool_has_the_asked_size_on_every_rank() -> None:
    kv = MHATokenToKVPool()
    per_token = sum(row_bytes(b) for b in kv.buffers)
    pool = make_host_pool(kv, 64 * per_token / 1e9, ranks=2)
    assert pool is not None and pool.capacity_tokens == 32 and pool.used_tokens == 0
    assert make_host_pool(kv, 0.0, ranks=1) is None


def test_an_unknown_layout_is_not_swapped() -> None:
    assert make_host_pool(object(), 1.0, ranks=1) is None


def test_measuring_leaves_the_kv_as_it_was() -> None:
    kv = MHATokenToKVPool()
    before = rows(kv, torch.arange(64))
    pool = pool_of(kv, 40)
    host_pool.measure(pool, 40)
    assert pool.used_tokens == 0 and pool.largest_room() >= 40
    assert all(torch.equal(a, b) for a, b in zip(before, rows(kv, torch.arange(64)), strict=True))


@relaxed
@given(st.floats(1e-6, 1e-2), st.floats(1e8, 1e11))
def test_the_meter_finds_the_line_through_its_transfers(overhead: float, rate: float) -> None:
    meter = SwapMeter()
    for size in (1e6, 4e6, 1e9, 2e9):
        meter.saw(size, overhead + size / rate)
    found = meter.fit()
    assert found is not None
    assert found[1] == pytest.approx(rate, rel=0.05)
    assert found[0] + 1e6 / found[1] == pytest.approx(overhead + 1e6 / rate, rel=0.3, abs=2e-6)


def test_one_outlier_does_not_move_the_line_far() -> None:
    meter = SwapMeter()
    for i in range(20):
        size = 1e6 if i % 2 else 1e9
        meter.saw(size, 1e-3 + size / 1e10)
    meter.saw(1e9, 30.0)
    found = meter.fit()
    assert found is not None and found[1] == pytest.approx(1e10, rel=0.05)


def test_a_meter_without_two_sizes_says_nothing() -> None:
    meter = SwapMeter()
    assert meter.fit() is None
    for _ in range(20):
        meter.saw(1e6, 1.0)
    assert meter.fit() is None


@pytest.mark.parametrize("overhead_s", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("rate", [0.0, -1e9, math.nan, math.inf])
def test_a_price_that_cannot_be_changes_nothing(overhead_s: float, rate: float) -> None:
    model = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
    link: Any = SimpleNamespace(meter=None, bytes_per_token=1000.0)
    cost = SwapCost(None, link)
    before = cost.priced(model, (2e-3, 1e9))
    assert before.swap_bytes_per_s == 1e9
    assert cost.priced(model, (1e-3, rate)) == before
    assert cost.priced(model, (overhead_s, 1e9)) == before
