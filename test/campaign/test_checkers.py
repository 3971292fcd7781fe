"""Each checker of `invariants` sees the damage that it is there for, in a scheduler that is in the middle of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from campaign import twin, world
from campaign.wires import Wires
from invariants import BrokenError, Ours, check, check_requests, holders
from sglang_slo.runtime.sglang import kv, tree

Damage = Callable[[Any], Callable[[], None]]  # does it; returns how to undo it


def lose_a_request(s: Any) -> Callable[[], None]:
    req = s.waiting_queue.pop()
    return lambda: s.waiting_queue.append(req)


def queue_one_twice(s: Any) -> Callable[[], None]:
    s.waiting_queue.append(s.waiting_queue[0])
    return lambda: s.waiting_queue.pop()


def leak_a_slot(s: Any) -> Callable[[], None]:
    allocator = s.token_to_kv_pool_allocator
    pages = allocator.free_pages
    allocator.free_pages = pages[1:]
    return lambda: setattr(allocator, "free_pages", pages)


def free_a_page_that_is_held(s: Any) -> Callable[[], None]:
    """As many as before are free, but one of them is in use: no count shows it."""
    allocator = s.token_to_kv_pool_allocator
    pages, req = allocator.free_pages, next(r for r in holders(s) if kv.row_of(r) is not None)
    allocator.free_pages = pages.clone()
    first = int(s.req_to_token_pool.req_to_token[kv.row_of(req), 0])
    allocator.free_pages[0] = first // allocator.page_size
    return lambda: setattr(allocator, "free_pages", pages)


def misplace_a_token(s: Any) -> Callable[[], None]:
    """Two tokens of a request have changed places: each page is somebody's, and the words would be others."""
    req = next(r for r in holders(s) if kv.row_of(r) is not None and kv.allocated_tokens(r) > 2)
    row = s.req_to_token_pool.req_to_token[kv.row_of(req)]
    before = row.clone()
    row[1], row[2] = int(before[2]), int(before[1])
    return lambda: row.copy_(before)


def leak_a_row(s: Any) -> Callable[[], None]:
    row = s.req_to_token_pool.free_slots.pop()
    return lambda: s.req_to_token_pool.free_slots.append(row)


def keep_a_lock(s: Any) -> Callable[[], None]:
    node = next(iter(s.tree_cache.root_node.children.values()))
    s.tree_cache.inc_lock_ref(node)
    return lambda: s.tree_cache.dec_lock_ref(node)


def lose_a_lock(s: Any) -> Callable[[], None]:
    req = next(r for r in holders(s) if kv.row_of(r) is not None and kv.protected_tokens(r))
    tree.unlock(s.tree_cache, tree.lock_of(req))
    return lambda: tree.lock_for(s.tree_cache, req)


def take_too_much(s: Any) -> Callable[[], None]:
    req = next(r for r in holders(s) if kv.row_of(r) is not None)
    record = req.kv if kv.IN_RECORD else req
    record.kv_committed_len += 1000
    return lambda: setattr(record, "kv_committed_len", record.kv_committed_len - 1000)


def mix_up_the_books(s: Any) -> Callable[[], None]:
    req = s.running_batch.reqs[0]
    req.slo_row += 1000
    return lambda: setattr(req, "slo_row", req.slo_row - 1000)


def forget_host_memory(s: Any) -> Callable[[], None]:
    Ours(s).line.pool.used_tokens += 1
    return lambda: setattr(Ours(s).line.pool, "used_tokens", Ours(s).line.pool.used_tokens - 1)


DAMAGES: dict[Damage, str] = {
    lose_a_request: "REQUESTS",
    queue_one_twice: "REQUESTS",
    leak_a_slot: "KV",
    free_a_page_that_is_held: "KV",
    leak_a_row: "ROWS",
    lose_a_lock: "LOCKS",
    **({} if tree.RECEIPTS else {keep_a_lock: "KV|LOCKS"}),  # newer trees show no node that nobody holds
    take_too_much: "GIVEN",
    mix_up_the_books: "BOOKS",
    forget_host_memory: "HOST",
}
IN_PAGES: dict[Damage, str] = {
    **DAMAGES,
    misplace_a_token: "PAGES",
}  # with single slots no place is the wrong one


@contextmanager
def looking(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None]) -> Iterator[None]:
    """Calls `look` once with a scheduler that has somebody running and somebody waiting."""
    there = twin.Guarded.process_input_requests

    def process(self: Any, recv_reqs: list[Any]) -> None:
        there(self, recv_reqs)
        if (
            len(self.running_batch.reqs) > 1
            and len(self.waiting_queue) > 1
            and any(kv.protected_tokens(r) for r in self.running_batch.reqs)
        ):
            monkeypatch.setattr(twin.Guarded, "process_input_requests", there)
            look(self)

    monkeypatch.setattr(twin.Guarded, "process_input_requests", process)
    yield


@pytest.mark.parametrize(("page", "damages"), [(1, DAMAGES), (16, IN_PAGES)])
def test_each_checker_sees_its_damage(
    page: int, damages: dict[Damage, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def look(s: Any) -> None:
        for damage in damages:
            undo = damage(s)
            try:
                check(s)
                check_requests(s, s.recv_from_tokenizer._next, s.twin_recorder.ended)
            except BrokenError as error:
                seen[damage.__name__] = str(error).split(":")[0]
            undo()
            check(s)  # undone: nothing is left for the next one

    also = (*world.CORNERS[0], "--page-size", str(page))
    worlds = (world.draw(seed, 80, features=False, also=also) for seed in range(100))
    tight = next(w for w in worlds if w.workload.profile.kv_capacity_tokens == 160)
    drawn = world.replace(tight, alive=24)
    with looking(monkeypatch, look):
        _, broken = twin.run(drawn, Wires(), [])
    assert broken is None
    wrong = {
        d.__name__: seen.get(d.__name__)
        for d, name in damages.items()
        if seen.get(d.__name__) not in name.split("|")
    }
    assert not wrong


def test_the_clock_that_runs_backwards_is_seen() -> None:
    class Watcher(twin.Guarded):
        twin_recorder = type("R", (), {"engine": type("E", (), {"now_s": 5.0})})

    watcher = Watcher()
    watcher._clock()
    watcher.twin_recorder.engine.now_s = 4.0
    with pytest.raises(BrokenError, match="CLOCK"):
        watcher._clock()
