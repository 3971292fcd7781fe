"""The requests whose KV lies in host memory: how each leaves the device, waits, comes back, or ends there.

    running ──take──▶ out ──bring_back──▶ arriving ──ready, landed──▶ running
                       │  ▲                  │
              abort, forget (recompute)      └─cancel─▶ out

Device slots of a request that left stay taken until its copy is predicted to be over (`release_due`), those of one
that comes back are filled before it decodes: transfers hide behind iterations. How many iterations is counted, not
timed, so that all ranks do the same. A copy that turns out to have failed, on any rank, means recompute; ranks tell each
other before anyone decodes with it, at a point that all of them pass (`vote`), never while planning.
Whatever raises in between leaves slots, rows and locks as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocation import alloc_token_slots

from sglang_slo.core import pages
from sglang_slo.core.kv import preemption
from sglang_slo.runtime.kv.host_pool import HostCopy, HostPool
from sglang_slo.runtime.sglang import kv as held
from sglang_slo.runtime.sglang import tree

if TYPE_CHECKING:
    from sglang_slo.runtime.ports import Ports

logger = logging.getLogger(__name__)

MOST_TRIES = 3  # to bring one back before it is computed again


@dataclass(slots=True, eq=False)
class Swapped:
    """A request whose KV is on the host. `since`, `ready`: plannings, counted."""

    req: Req
    copy: HostCopy
    since: int
    ready: int = 0  # when its KV is predicted to be back on the device
    loaded: bool = False  # whether the copy back was started without an error on this rank
    agreed: bool = False  # whether it was on all ranks
    tries: int = 0


@dataclass(slots=True, eq=False)
class Leftover:
    """Device KV that is still being copied out: own slots, and the lock on the prefix tree that is held."""

    due: int
    slots: torch.Tensor
    lock: Any
    copy: HostCopy


class SwapLine:
    """All swapped requests of one scheduler."""

    def __init__(self, ports: Ports, pool: HostPool, recompute: Callable[[Req], None]) -> None:
        self.pool = pool
        self.out: list[Swapped] = []
        self.arriving: list[Swapped] = []
        self.failed = 0  # copies that could not be used
        self._ports, self._kv = ports, ports.kv
        self._queue_again = recompute  # told of those whose copy is gone: they are computed again
        self._leftovers: list[Leftover] = []
        self._unclaimed: list[HostCopy] = []  # copies of requests that have not left yet
        self._planning = 0

    # -- out

    def save(self, req: Req) -> HostCopy:
        """Start to copy the KV of a running request to the host. What is in flight for it is dropped with its token."""
        row = self._kv.rows.req_to_token[held.row_of(req)]
        copy = self.pool.save(row[: req.seqlen - 1].to(torch.int64, copy=True))
        self._unclaimed.append(copy)
        return copy

    def drop_unclaimed(self) -> None:
        """Give back the host memory of copies whose request has not left after all."""
        while self._unclaimed:
            copy = self._unclaimed.pop()
            self.pool.fence(copy)
            self.pool.drop(copy)

    def take(self, req: Req, copy: HostCopy, iteration_s: float) -> None:
        """A running request is on the host from now on; its device KV is free when `copy` is over."""
        kv = self._kv
        row = kv.rows.req_to_token[held.row_of(req)]
        own = row[held.protected_tokens(req) : held.allocated_tokens(req)].to(torch.int64, copy=True)
        due = self._planning + self._hidden(copy.tokens, iteration_s)
        left, swapped = Leftover(due, own, tree.lock_of(req), copy), Swapped(req, copy, self._planning)
        # from here on nothing can fail
        kv.rows.free(req)
        held.hold_nothing(req)
        req.is_retracted = True
        req.retraction_count += 1
        req.slo_swapped = getattr(req, "slo_swapped", 0) + 1
        self._unclaimed.remove(copy)
        self._leftovers.append(left)
        self.out.append(swapped)

    def _hidden(self, tokens: int, iteration_s: float) -> int:
        """Iterations that a transfer is given to hide behind."""
        if not self.pool.hides:
            return 0
        return math.ceil(preemption.swap_s(self._ports.agreed.model, tokens) / 2 / max(iteration_s, 1e-6))

    def release_due(self, now: bool = False) -> None:
        """Give back device KV whose copy should be over; with `now`, all of it: the device then waits for the rest."""
        kv = self._kv
        for left in [left for left in self._leftovers if now or left.due <= self._planning]:
            self.pool.fence(left.copy)
            self._leftovers.remove(left)
            kv.allocator.free_segment(left.slots, start_pos=0)  # they begin with a page
            tree.unlock(kv.tree, left.lock)

    # -- back

    def next_planning(self, idle: bool) -> None:
        """Once an iteration, before anything else. `idle`: no batch runs that transfers could hide behind."""
        self._planning += 1
        self.release_due(now=idle or not self.pool.hides)

    def may_return(self) -> list[Swapped]:
        """Those on the host whose last iteration is over."""
        return [w for w in self.out if w.since < self._planning]

    def bring_back(self, row: int, iteration_s: float) -> bool:
        """Start to load the KV of one that is out into new slots; whether it is on its way. If not, it is computed again.

        What the radix tree still has of it is used from there. The plan has seen to the room.
        """
        w = next((w for w in self.out if w.req.slo_row == row), None)
        if w is None:
            return False
        try:
            self._load(w, iteration_s)
        except RuntimeError as error:  # no room after all, or the device refused
            logger.warning("sglang-slo: request %s could not be brought back: %s", w.req.rid, error)
            w.tries += 1
        else:
            w.agreed = self._ports.ranks.size == 1
            self.out.remove(w)
            self.arriving.append(w)
            if w.loaded or not w.agreed:
                return True
            self._unusable(w)
            return False
        if w.tries >= MOST_TRIES:
            self.failed += 1
            self.out.remove(w)
            self._recompute(w)
        return False

    def _load(self, w: Swapped, iteration_s: float) -> None:
        """Slots in whole pages, a row and a lock for `w`, and the copy into them begun; all given back if that raises."""
        kv, req, tokens = self._kv, w.req, w.copy.tokens
        req.init_next_round_input(kv.tree)
        prefix = held.prefix_tokens(req)
        w.ready = self._planning + self._hidden(tokens - prefix, iteration_s)
        slots = torch.empty(0, dtype=torch.int64, device=kv.rows.device)
        tree.lock_for(kv.tree, req)
        try:
            if tokens > prefix:
                slots = alloc_token_slots(kv.tree, pages.whole(tokens - prefix, kv.page_tokens))
            if kv.rows.alloc([req]) is None:
                raise RuntimeError("no free request slot")
            row, cached = held.row_of(req), tree.prefix_slots(kv.tree, req)
            kv.rows.write((row, slice(0, prefix)), cached.to(torch.int32))
            # what is left of its last page is there for what it writes next
            kv.rows.write((row, slice(prefix, tokens)), slots[: tokens - prefix].to(torch.int32))
            w.loaded = self._copied_back(w.copy, prefix, slots[: tokens - prefix])
            held.hold(req, tokens)
        except BaseException:
            if len(slots):
                kv.allocator.free_segment(slots, start_pos=0)
            if held.row_of(req) is not None:
                kv.rows.free(req)
            tree.unlock_of(kv.tree, req)
            held.hold_nothing(req)
            raise

    def _copied_back(self, copy: HostCopy, prefix: int, slots: torch.Tensor) -> bool:
        if not copy.ok:
            return False
        try:
            if len(slots):
                self.pool.load(copy, prefix, slots)
        except RuntimeError as error:
            logger.warning("sglang-slo: copying %d tokens back failed: %s", len(slots), error)
            return False
        return True

    def votes(self) -> bool:
        """Whether some on their way back are not known to have come well on all ranks."""
        return any(not w.agreed for w in self.arriving)

    def vote(self) -> None:
        """Ask all tensor-parallel ranks, who are all here now, whether their copies back are fine."""
        pending = [w for w in self.arriving if not w.agreed]
        fine = torch.tensor([int(all(w.loaded for w in pending))])
        torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, group=self._ports.ranks.group)
        for w in pending:
            w.agreed, w.loaded = True, bool(fine.item())
            if not w.loaded:
                self._unusable(w)

    def _unusable(self, w: Swapped) -> None:
        """An arriving request whose copy failed: it is computed again."""
        self.failed += 1
        logger.warning("sglang-slo: the copy of request %s cannot be used: recompute", w.req.rid)
        self.pool.fence(w.copy)
        self.arriving.remove(w)
        tree.release(self._kv.tree, w.req, keep=False)
        self._recompute(w)

    def ready(self, now: bool) -> list[Swapped]:
        """Those whose KV should be back; with `now`, all: the device waits for the rest."""
        return [w for w in self.arriving if w.agreed and (now or w.ready <= self._planning)]

    def landed(self, back: list[Swapped]) -> None:
        """They are in the running batch; device work from now on waits for their copies."""
        self.arriving = [w for w in self.arriving if w not in back]
        for w in back:
            w.req.is_retracted = False
        for w in back:
            self.pool.fence(w.copy)
            self.pool.drop(w.copy)

    # -- ends

    def cancel_arrivals(self) -> None:
        """Those on their way back stay on the host: their device KV is free again."""
        for w in list(self.arriving):
            self._withdraw(w)
            self.arriving.remove(w)
            self.out.append(w)

    def forget(self) -> None:
        """The copies are worth nothing any more (new weights): everyone is computed again."""
        self.cancel_arrivals()
        while self.out:
            self._recompute(self.out.pop())

    def abort(self, rid: str, everyone: bool) -> None:
        """End the requests whose id begins with `rid`; host and device memory are given back."""
        for w in [*self.out, *self.arriving]:
            if not (everyone or w.req.rid.startswith(rid)):
                continue
            if w in self.arriving:
                self._withdraw(w)
                self.arriving.remove(w)
            else:
                self.out.remove(w)
            self.pool.drop(w.copy)
            self._ports.tell(AbortReq(rid=w.req.rid), w.req)

    def _withdraw(self, w: Swapped) -> None:
        self.pool.fence(w.copy)
        tree.release(self._kv.tree, w.req, keep=False)
        held.hold_nothing(w.req)

    def _recompute(self, w: Swapped) -> None:
        """Into the queue, as if its KV had been thrown away when it was preempted."""
        w.req.reset_for_retract()
        w.req.retraction_count -= 1  # counted when it left
        self._queue_again(w.req)
        self.pool.drop(w.copy)

    # -- state

    def __iter__(self) -> Iterator[Req]:
        for w in [*self.out, *self.arriving]:
            yield w.req

    @property
    def leaving_tokens(self) -> int:
        """Device KV that is free once its copy is over."""
        return sum(pages.whole(len(left.slots), self._kv.page_tokens) for left in self._leftovers)

    @property
    def empty(self) -> bool:
        """Nobody is swapped, and no device KV is still held."""
        return not (self.out or self.arriving or self._leftovers)
