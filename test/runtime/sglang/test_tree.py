"""What asks the tree how much a lock keeps leaves the locks as they were, whatever the tree does meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo.runtime.sglang import tree


class Tree:
    """Counts locks; its second look at what is evictable fails if it is told so."""

    def __init__(self, fails: bool) -> None:
        self.locks, self.fails, self.looks = 1, fails, 0  # the request's own

    def inc_lock_ref(self, node: object) -> None:
        self.locks += 1

    def dec_lock_ref(self, node: object) -> None:
        self.locks -= 1

    def lock(self, node: object) -> object:
        self.locks += 1
        return node

    def unlock(self, held: object) -> None:
        self.locks -= 1

    def evictable_size(self) -> int:
        self.looks += 1
        if self.fails and self.looks == 2:
            raise RuntimeError("broken")
        return 100 - 10 * self.locks


def test_a_new_lock_is_given_back_if_the_tree_fails() -> None:
    cache: Any = Tree(fails=True)
    with pytest.raises(RuntimeError, match="broken"):
        tree.kept_by(cache, "node")
    assert cache.locks == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_requests_own_lock_is_there_again(fails: bool) -> None:
    cache: Any = Tree(fails)
    req: Any = SimpleNamespace(last_node="node", lock="node")
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            tree.kept_alone(cache, req)
    else:
        assert tree.kept_alone(cache, req) == 10
    assert cache.locks == 1


@pytest.mark.skipif(not tree.RECEIPTS, reason="no part of a lock is given back before the rest there")
def test_a_window_that_was_given_back_is_not_locked_again() -> None:
    cache: Any = Tree(fails=False)
    skipped: list[Any] = []
    cache.lock = lambda node, skip_lock_components=(): skipped.extend(skip_lock_components)
    for released in (False, True):
        skipped.clear()
        tree.kept_alone(cache, SimpleNamespace(last_node="node", lock=SimpleNamespace(swa_released=released)))
        assert bool(skipped) == released


@pytest.mark.skipif(not tree.RECEIPTS, reason="recurrent states run on stock scheduling there")
def test_who_only_waits_is_given_no_state() -> None:
    seen: list[dict[str, Any]] = []
    req: Any = SimpleNamespace(init_next_round_input=lambda cache, **how: seen.append(how))
    for states in (True, False):
        tree.find_prefix(SimpleNamespace(supports_mamba=lambda states=states: states), req)  # type: ignore[arg-type]
    assert seen == [{"cow_mamba": False}, {}]


@pytest.mark.skipif(not tree.RECEIPTS, reason="recurrent states run on stock scheduling there")
def test_states_of_offers_that_were_broken_off_are_free_again() -> None:
    from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator

    states = MambaSlotAllocator(size=8, device="cpu")
    states.alloc_group_begin(4)
    given = SimpleNamespace(
        mamba_pool_idx=states.alloc(1)[0], holds_mamba=True, mamba_cow_src_index=1, mamba_needs_clear=False
    )
    none = SimpleNamespace(holds_mamba=False)
    cache: Any = SimpleNamespace(
        supports_mamba=lambda: True, req_to_token_pool=SimpleNamespace(mamba_allocator=states)
    )
    waiting: list[Any] = [SimpleNamespace(kv=held, session=None) for held in (given, none)]
    tree.forget_offers(cache, waiting)
    assert states.available_size() == 8
    assert given.mamba_pool_idx is None and given.mamba_cow_src_index is None
