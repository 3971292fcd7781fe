"""What must hold between any two iterations, for SGLang's scheduler and for ours: one checker per invariant.

REQUESTS  every request that arrived is waiting, running, away (on the host, on its way) or over; one of them.
KV        of each pool: free + evictable + protected + held outside the tree = capacity, and each page is somebody's, once.
PAGES     a token lies in its page where it stands in its request, and the tree keeps whole pages.
GIVEN     no request holds KV that it has not been given: committed <= allocated <= what it may ever need.
ROWS      free rows of SGLang's request pool + rows held = its size.
LOCKS     a node of the radix tree is locked as often as somebody holds it.
BOOKS     our table has one row per request it knows, and the request knows its row.
HOST      the host pool holds what the swapped requests have there.
CLOCK     the engine's time never runs backwards.
WORK      with an idle device and requests waiting, something is launched.
No peeking is tested in `test_driver.py`, where hidden lengths change and decisions do not.

`check(scheduler)` runs all of them. Where our scheduler keeps requests beside SGLang's places is said in one place
here, `Ours`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from sglang_slo.core import pages
from sglang_slo.runtime.sglang import kv, pools, speculation, tree


class BrokenError(AssertionError):
    """An invariant does not hold; the message begins with its name."""


def _require(holds: bool, name: str, detail: str) -> None:
    if not holds:
        raise BrokenError(f"{name}: {detail}")


class Ours:
    """Where our scheduler keeps requests, KV and locks beside SGLang's own places."""

    def __init__(self, scheduler: Any) -> None:
        on = getattr(scheduler, "slo_on", False)
        self.preempt = scheduler.slo_preempt if on else None
        self.line = self.preempt.line if self.preempt else None
        self.pins = scheduler.slo_pins if on else None
        self.registry = scheduler.slo_registry if on else None

    def away(self) -> list[Any]:
        """Requests that are in none of SGLang's places."""
        return list(self.preempt.alive()) if self.preempt else []

    def leftovers(self) -> list[Any]:
        """Device KV whose owner has left and whose copy is not over: `.slots`, and `.lock` on the tree."""
        return list(self.line._leftovers) if self.line else []

    def pinned(self) -> list[Any]:
        """Locks on the radix tree for requests that wait."""
        return [held for held, _ in self.pins._locks.values()] if self.pins else []

    def copies(self) -> list[Any]:
        """What lies in host memory."""
        return [w.copy for w in chain(self.line.out, self.line.arriving)] if self.line else []

    def rows(self) -> dict[int, Any]:
        """Our table's rows and whose they are."""
        return self.registry.reqs if self.registry else {}


def places(s: Any) -> Iterator[Any]:
    """Every request in one of SGLang's places, or in a part of a batch that we set aside; may repeat."""
    batches = [s.running_batch, s.last_batch, getattr(s, "slo_split", None)]
    batches += [batch for batch, _ in getattr(s, "result_queue", ())]
    yield from (r for b in batches if b is not None for r in b.reqs)
    if s.chunked_req is not None:
        yield s.chunked_req
    yield from s.waiting_queue
    yield from s.grammar_manager.grammar_queue


def holders(s: Any) -> list[Any]:
    """Every request that may hold something, once."""
    return list({id(req): req for req in chain(places(s), Ours(s).away())}.values())


def alive(s: Any) -> set[str]:
    """Ids of the requests that are not over."""
    return {req.rid for req in holders(s) if not req.finished()}


# -- the checkers


def check_requests(s: Any, arrived: int, over: int) -> None:
    """REQUESTS."""
    waiting = [r.rid for r in s.waiting_queue]
    alone = getattr(s, "slo_split", None)  # a part of the running batch that was launched without the rest
    running = [r.rid for batch in (s.running_batch, alone) if batch is not None for r in batch.reqs]
    away = [r.rid for r in Ours(s).away()]
    for name, rids in (("waits", waiting), ("runs", running), ("is away", away)):
        twice = [rid for rid, n in Counter(rids).items() if n > 1]
        _require(not twice, "REQUESTS", f"{twice[:3]} {name} twice")
    both = set(waiting) & set(away)
    _require(not both, "REQUESTS", f"{sorted(both)[:3]} waits and is away")
    living = len(alive(s))
    _require(living + over == arrived, "REQUESTS", f"{living} alive + {over} over, {arrived} arrived")


def check_given(s: Any) -> None:
    """GIVEN."""
    for req in holders(s):
        if kv.row_of(req) is None:
            continue
        allocated = kv.allocated_tokens(req)
        most = len(req.origin_input_ids) + req.sampling_params.max_new_tokens + 1
        if not s.spec_algorithm.is_none():  # a burst may pass the end, and room is kept for the next step
            most = pages.whole(most + sum(speculation.step(s)), page_tokens(s))
        sizes = (kv.committed_tokens(req), allocated, most)
        _require(sizes[0] <= sizes[1] <= sizes[2], "GIVEN", f"{req.rid}: {sizes}")


def check_kv(s: Any) -> None:
    """KV, by its counts."""
    cache, page, reqs = s.tree_cache, page_tokens(s), _with_rows(s)
    free = pools.free_tokens(s.token_to_kv_pool_allocator, cache)
    outside = sum(pages.whole(kv.allocated_tokens(r), page) - kv.protected_tokens(r) for r in reqs)
    leaving = sum(pages.whole(len(left.slots), page) for left in Ours(s).leftovers())
    _adds_up("", (free, cache.protected_size(), outside, leaving), s.max_total_num_tokens)
    if s.is_hybrid_swa and pools.WINDOWS:
        free = pools.window_free_tokens(s.token_to_kv_pool_allocator, cache)
        own = int(pools.own_window_tokens(reqs, page).sum())
        _adds_up("the window's ", (free, cache.swa_protected_size(), own, 0), window_capacity(s))
    if s.is_hybrid_ssm and pools.WINDOWS:
        rows = s.req_to_token_pool
        free = rows.mamba_allocator.available_size() + cache.mamba_evictable_size()
        own = sum(r.kv.holds_mamba for r in reqs)  # of one that has ended the tree has it
        _adds_up("states ", (free, cache.mamba_protected_size(), own, 0), rows.mamba_pool.size)


def _adds_up(whose: str, parts: tuple[int, ...], capacity: int) -> None:
    told = f"{whose}free or evictable, protected, held, leaving {parts}: {sum(parts)} of {capacity}"
    _require(sum(parts) == capacity and min(parts) >= 0, "KV", told)


def window_capacity(s: Any) -> int:
    """Tokens of the pool of layers that look back over a window."""
    return int(s.token_to_kv_pool_allocator.size_swa)


def check_slots(s: Any) -> None:
    """KV, page by page: each is free, in the tree, held by one request, or on its way to the host."""
    allocator, table, page = s.token_to_kv_pool_allocator, s.req_to_token_pool.req_to_token, page_tokens(s)
    runs = [_tree_slots(s.tree_cache), *(left.slots for left in Ours(s).leftovers())]
    runs += [table[kv.row_of(r), kv.protected_tokens(r) : kv.allocated_tokens(r)] for r in _with_rows(s)]
    # all of them begin with a page (PAGES): each page has a first slot in them
    whole = getattr(allocator, "full_attn_allocator", allocator)
    _once([_free_pages(whole), *(run[::page] // page for run in runs)], whole.size // page)
    if whole is not allocator:  # who holds a slot of the one pool holds at most one of the window's
        window, held = allocator.swa_attn_allocator, torch.cat([run.to(torch.int64) for run in runs])
        mapped = allocator.full_to_swa_index_mapping[held]
        mapped = mapped[mapped > 0]  # the others' were given back
        _once([_free_pages(window), torch.unique(mapped // page)], window.size // page)
        _require(len(torch.unique(mapped)) == len(mapped), "KV", "a slot of the window's is held twice")


def _once(owned: list[Any], most: int) -> None:
    """Whether each of the pages 1 to `most` is in one of these lists, once."""
    numbers = torch.cat([t.to(torch.int64) for t in owned]).numpy()
    times = np.bincount(numbers, minlength=most + 1)[1:]  # page 0 is SGLang's padding
    lost, shared = np.flatnonzero(times == 0) + 1, np.flatnonzero(times > 1) + 1
    _require(not len(lost), "KV", f"pages {lost[:8].tolist()} are nobody's ({len(lost)})")
    _require(not len(shared), "KV", f"pages {shared[:8].tolist()} are owned twice ({len(shared)})")


def check_pages(s: Any) -> None:
    """PAGES."""
    page, table = page_tokens(s), s.req_to_token_pool.req_to_token
    if page == 1:
        return
    _in_order(_tree_slots(s.tree_cache), page, "the tree")
    for left in Ours(s).leftovers():
        _in_order(left.slots, page, "what is copied out")
    for req in _with_rows(s):
        protected = kv.protected_tokens(req)
        _require(protected % page == 0, "PAGES", f"{req.rid}: {protected} tokens of it are the tree's")
        _in_order(table[kv.row_of(req), : kv.allocated_tokens(req)], page, req.rid)


def _in_order(slots: Any, page: int, whose: str) -> None:
    """Whether the slots of a run that begins with a page fill one page after the other."""
    slots = slots.to(torch.int64).numpy()
    first = np.repeat(slots[::page], page)[: len(slots)]
    fits = (slots == first + np.arange(len(slots)) % page) & (first % page == 0)
    _require(bool(fits.all()), "PAGES", f"{whose}: {slots[~fits][:8].tolist()} lie elsewhere in their pages")


def page_tokens(s: Any) -> int:
    """Tokens in a page of KV."""
    return int(s.token_to_kv_pool_allocator.page_size)


def check_rows(s: Any) -> None:
    """ROWS."""
    pool = s.req_to_token_pool
    held = [row for r in holders(s) if (row := kv.row_of(r)) is not None]
    everyone = Counter(chain(held, pool.free_slots))
    twice = [row for row, n in everyone.items() if n > 1]
    _require(not twice, "ROWS", f"{twice[:5]} are owned twice")
    lost = pool.size - len(everyone)
    _require(lost == 0, "ROWS", f"{lost} of {pool.size} are nobody's")


def check_locks(s: Any) -> None:
    """LOCKS."""
    cache, ours = s.tree_cache, Ours(s)
    held = [tree.lock_of(r) for r in _with_rows(s)] + [left.lock for left in ours.leftovers()] + ours.pinned()
    copied = _copied_nodes(cache)
    if tree.RECEIPTS:  # its nodes keep their counts to themselves: what is held is what it protects
        ends = [*(lock.node for lock in held), *copied] if tree.shares_prefixes(cache) else []
        paths = [cache.path_device_indices(end) for end in ends]
        union = len(torch.unique(torch.cat(paths))) if paths else 0
        sums = (union, cache.protected_size())
        _require(sums[0] == sums[1], "LOCKS", f"{sums[0]} tokens are held, {sums[1]} are protected")
        return
    expected: Counter[int] = Counter()
    for end in [*held, *copied]:
        node = end
        while node is not None and node is not getattr(cache, "root_node", None):
            expected[id(node)] += 1
            node = node.parent
    protected = 0
    for node in _nodes(cache):
        protected += len(node.key) if node.lock_ref else 0
        want = expected.pop(id(node), 0)
        _require(node.lock_ref == want, "LOCKS", f"a node is locked {node.lock_ref} times, held {want} times")
    _require(not expected, "LOCKS", "a node that is held is not in the tree any more")
    _require(protected == cache.protected_size(), "LOCKS", f"{protected} tokens, SGLang counts otherwise")


def check_books(s: Any) -> None:
    """BOOKS."""
    rows = Ours(s).rows()
    for req in holders(s):
        row = getattr(req, "slo_row", -1)
        _require(row < 0 or rows.get(row) is req, "BOOKS", f"{req.rid}: row {row} is another's")
    for row, req in rows.items():
        _require(req.slo_row == row, "BOOKS", f"row {row}: {req.rid} believes it has {req.slo_row}")
    registry = Ours(s).registry
    if registry is not None:
        _require(
            len(registry.table) == len(rows), "BOOKS", f"{len(registry.table)} rows for {len(rows)} requests"
        )


def check_host(s: Any) -> None:
    """HOST."""
    line = Ours(s).line
    if line is not None:
        held, used = sum(copy.tokens for copy in Ours(s).copies()), line.pool.used_tokens
        _require(held == used, "HOST", f"the swapped have {held} tokens there, {used} are taken")


def _copied_nodes(cache: Any) -> list[Any]:
    """Nodes that a hierarchical cache keeps locked while their KV is copied to host memory, or back."""
    both = getattr(cache, "ongoing_write_through", {}), getattr(cache, "ongoing_load_back", {})
    return [copy[0] if isinstance(copy, tuple) else copy for copies in both for copy in copies.values()]


def _free_pages(allocator: Any) -> Any:
    if hasattr(allocator, "get_all_free_pages"):
        return allocator.get_all_free_pages()
    return torch.cat([allocator.free_pages, allocator.release_pages])


def _tree_slots(cache: Any) -> Any:
    """The slots of the radix tree, int64[n]."""
    if tree.RECEIPTS:
        return cache.all_values_flatten()
    values = (node.value for node in _nodes(cache))  # of what lies in host memory alone there is none
    return torch.cat([torch.empty(0, dtype=torch.int64), *(v for v in values if v is not None)])


def _nodes(cache: Any) -> Iterator[Any]:
    """The nodes of the radix tree but its root; none where the cache is no tree."""
    stack = list(cache.root_node.children.values()) if hasattr(cache, "root_node") else []
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def _with_rows(s: Any) -> list[Any]:
    return [r for r in holders(s) if kv.row_of(r) is not None]


CHEAP = (check_given, check_kv, check_rows, check_books, check_host)
THOROUGH = (check_locks, check_pages, check_slots)


def check(s: Any, thorough: bool = True) -> None:
    """Every invariant of state. Raises BrokenError."""
    for checker in (*CHEAP, *(THOROUGH if thorough else ())):
        checker(s)


def check_nothing_left(s: Any) -> None:
    """After the last request: everything was given back. Raises BrokenError."""
    check(s)
    slots, cache = s.token_to_kv_pool_allocator, s.tree_cache
    free = pools.free_tokens(slots, cache)
    _require(free == s.max_total_num_tokens, "KV", f"{free} of {s.max_total_num_tokens} at the end")
    if s.is_hybrid_swa and pools.WINDOWS:
        free, most = pools.window_free_tokens(slots, cache), window_capacity(s)
        _require(free == most, "KV", f"{free} of {most} of the window's at the end")
    if s.is_hybrid_ssm and pools.WINDOWS:
        rows = s.req_to_token_pool
        free, most = (
            rows.mamba_allocator.available_size() + cache.mamba_evictable_size(),
            rows.mamba_pool.size,
        )
        _require(free == most, "KV", f"{free} of {most} states at the end")
    rows, size = len(s.req_to_token_pool.free_slots), s.req_to_token_pool.size
    _require(rows == size, "ROWS", f"{rows} of {size} at the end")
    ours = Ours(s)
    _require(not ours.rows(), "BOOKS", f"{len(ours.rows())} rows at the end")
    _require(ours.preempt is None or ours.preempt.idle, "REQUESTS", "somebody is away at the end")
    _require(ours.line is None or ours.line.pool.used_tokens == 0, "HOST", "host memory is taken at the end")


class Watched:
    """Mixed in before a virtual scheduler (`driver.run(..., watcher=Watched)`): checks every iteration."""

    checked = 0  # iterations, over all runs
    thorough_every = 16  # iterations between looks at single slots and locks
    _last_s = 0.0

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        """The start of an iteration: the last one's result has been taken."""
        Watched.checked += 1
        self._clock()
        check(self, thorough=Watched.checked % self.thorough_every == 0)
        super().process_input_requests(recv_reqs)  # type: ignore[misc]
        check_requests(self, self.recv_from_tokenizer._next, self.twin_recorder.ended)

    def get_next_batch_to_run(self: Any, running_batch: Any, last_batch: Any) -> Any:
        """WORK."""
        idle = running_batch.is_empty() and last_batch is None and not getattr(self, "result_queue", ())
        waiting = len(self.waiting_queue)
        step = super().get_next_batch_to_run(running_batch, last_batch)  # type: ignore[misc]
        _require(
            step.batch_to_run is not None or not (idle and waiting),
            "WORK",
            f"idle, and {waiting} requests wait",
        )
        return step

    def _clock(self: Any) -> None:
        now = self.twin_recorder.engine.now_s
        _require(now >= self._last_s, "CLOCK", f"{now} after {self._last_s}")
        self._last_s = now

    def _holders(self: Any) -> list[Any]:
        return holders(self)
