"""Carries out what a plan says about KV: victims leave the running batch, others begin to come back from the host.

Each step is atomic. What can fail comes first and changes nothing (the smaller batch is built beside the old one, copies
are started); then a request changes its place in one go. So whatever raises, each request is in exactly one place: in a
batch, in the queue, on the host, or here, `leaving`, until the iteration is planned (`settle`).
A victim's token in flight is dropped, as in SGLang's own retraction, and computed again; so a victim may be back at
the next planning at the earliest, when that iteration's results are out.
SGLang's retraction stays the last resort. All decisions come from the plan: ranks agree.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_slo.core import pages
from sglang_slo.core.kv import preemption
from sglang_slo.core.kv.pool import HostKv, Leavers
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.latency import decode_shape
from sglang_slo.runtime.kv.host_pool import HostCopy, HostLink, HostPool
from sglang_slo.runtime.kv.swap_cost import SwapCost
from sglang_slo.runtime.kv.swap_line import SwapLine
from sglang_slo.runtime.requests import batches, features
from sglang_slo.runtime.sglang import kv, pools, tree

if TYPE_CHECKING:
    from sglang_slo.runtime.kv.held import HeldPrefills
    from sglang_slo.runtime.kv.look_up import PrefixLookUp
    from sglang_slo.runtime.kv.prefix_pins import Pins
    from sglang_slo.runtime.ports import KvPool, Ports


class Preemptor:
    """Applies the KV part of plans to one scheduler."""

    def __init__(
        self,
        ports: Ports,
        pool: HostPool | None,
        prefixes: PrefixLookUp,
        pins: Pins,
        held: HeldPrefills,
        lora: bool = False,
        link: HostLink | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()  # preemptions by mode; "stock": SGLang's retractions
        self.swap_ins = 0
        self.line = SwapLine(ports, pool, self.queue_again) if pool is not None else None
        self.cost = SwapCost(self.line, link)
        self.leaving: list[Req] = []  # back in the queue as soon as nothing of theirs is in flight
        self._ports, self._kv, self._pins, self._lora = ports, ports.kv, pins, lora
        self._look_up, self._held = prefixes.look_up, held

    # -- what planning sees

    def leavers(self, batch: ScheduleBatch) -> Leavers:
        """What preemption could do with each request of the running batch."""
        reqs = batch.reqs
        freed = np.fromiter((freed_tokens(self._kv, req) for req in reqs), np.int64, len(reqs))
        held = pages.whole(kv.slot_counts(reqs), self._kv.page_tokens)
        return Leavers(
            allowed=np.fromiter(map(self.may_leave, reqs), bool, len(reqs)),
            freed_tokens=freed,
            kv_tokens=np.fromiter(map(kv.committed_tokens, reqs), np.int64, len(reqs)),
            shared_tokens=held - freed,
            cached_tokens=np.fromiter(map(kv.protected_tokens, reqs), np.int64, len(reqs)),
            may_keep=np.full(len(reqs), tree.keeps_unfinished(self._kv.tree)),
            may_swap=np.fromiter(map(self._may_swap, reqs), bool, len(reqs)),
            may_recompute=np.ones(len(reqs), bool),
            window_tokens=None if self._kv.window is None else freed_window_tokens(self._kv, reqs),
        )

    def may_leave(self, req: Req) -> bool:
        """Whether a running request can be a victim now.

        Not one that was preempted often enough. Not one whose first token is in flight: it would lose it. Not one
        with a feature that does not survive it (`features`).
        """
        table = self._ports.requests.table
        few = table.preemptions[req.slo_row] < self._ports.settings.max_preemptions
        ending = req.to_finish is not None
        return bool(few and len(req.output_ids) and not ending and features.of(req).leave)

    def _may_swap(self, req: Req) -> bool:
        """Whether SGLang's own state of a request can be put together again for decoding."""
        return self.line is not None and features.of(req).swap and not self._lora

    def host(self) -> HostKv:
        """KV on the host, as planning sees it."""
        line = self.line
        if line is None:
            return HostKv()
        back = line.may_return()
        for swapped in back:
            self._look_up(swapped.req)
        return HostKv(
            rows=self._ports.rows([w.req for w in back]),
            tokens=np.fromiter((w.copy.tokens for w in back), np.int64, len(back)),
            room_tokens=line.pool.largest_room(),
            hides=line.pool.hides,
            on=True,
        )

    @property
    def leaving_tokens(self) -> int:
        """KV that is free as soon as it is copied out."""
        return self.line.leaving_tokens if self.line else 0

    def arriving_rows(self) -> np.ndarray:
        """Rows that hold KV for their return, int[n]."""
        return self._ports.rows([w.req for w in self.line.arriving] if self.line else [])

    # -- victims

    def preempt(self, victims: list[tuple[int, PreemptMode]], batch: ScheduleBatch) -> None:
        """The victims leave `batch`, each in its mode; the running batch is the rest from then on."""
        rows = {req.slo_row: i for i, req in enumerate(batch.reqs)}
        places = [rows[row] for row, _ in victims]
        left = batches.without(batch, np.array(places))
        iteration_s = self._iteration_s(left.reqs)
        for place, (_, mode) in zip(places, victims, strict=True):
            req = batch.reqs[place]
            try:
                copy = self._copy_out(req) if mode is PreemptMode.SWAP else None
                if mode is PreemptMode.SWAP and copy is None:
                    mode = PreemptMode.RECOMPUTE
                self._note(req, mode)
                self._leave(req, mode, copy, iteration_s)
            except Exception as error:
                self._ports.trouble.happened("preempting a request failed", error)
        if self.line is not None:
            self.line.drop_unclaimed()
        # whoever holds nothing on the device has left, whatever was raised
        gone = [place for place in places if kv.row_of(batch.reqs[place]) is None]
        if len(gone) < len(places):
            left = batches.without(batch, np.array(gone, np.int64)) if gone else batch
        left.batch_is_full = False
        self._ports.iteration.running = left
        if self.line is not None and not self.line.pool.hides:
            self.line.release_due()  # the copies are over, and the plan counts on the room

    def _copy_out(self, req: Req) -> HostCopy | None:
        """Start the copy to the host; None if that failed: what then is left is to compute it again."""
        assert self.line is not None
        copy = self.line.save(req)
        if not copy.ok and self._ports.ranks.size == 1:
            self.line.failed += 1  # and is dropped, as nobody claims it
            return None
        return copy

    def _note(self, req: Req, mode: PreemptMode) -> None:
        registry, row = self._ports.requests, req.slo_row
        registry.drop_in_flight(row)
        registry.table.deadline_s[row] = registry.table.back_by_s(row)
        registry.table.preemptions[row] += 1
        self.counts[mode.value] += 1
        req.slo_computed_tokens = req.seqlen - 1

    def _leave(self, req: Req, mode: PreemptMode, copy: HostCopy | None, iteration_s: float) -> None:
        """The one moment at which a victim changes its place; nothing of ours is called in between."""
        if copy is not None and self.line is not None:
            self.line.take(req, copy, iteration_s)
            return
        tree.release(self._kv.tree, req, keep=mode is PreemptMode.KEEP)
        req.reset_for_retract()
        self.queue_again(req)

    def _iteration_s(self, reqs: list[Req]) -> float:
        context, verified = sum(req.seqlen for req in reqs), self._ports.requests.table.step.verified_tokens
        return self._ports.agreed.model.iteration_s(decode_shape(len(reqs), context, verified=verified))

    def park(self) -> None:
        """The half-prefilled request lets go of its KV; it may be back when its chunk in flight is over."""
        req = self._ports.waiting.cut
        if req is not None:
            release_parked(self._ports, req)
            self.queue_again(req)

    # -- back

    def bring_back(self, rows: list[int], batch: ScheduleBatch) -> None:
        """Those of `rows` that are on the host begin to come back; one that cannot stays there, or is computed again."""
        if self.line is None:
            return
        seconds = self._iteration_s(batch.reqs)
        context = self._ports.requests.table.context_tokens(np.array(rows))
        self._held.make_room(int(pages.whole(context, self._kv.page_tokens).sum()), rows=len(rows))
        for row in rows:
            self.swap_ins += self.line.bring_back(row, seconds)

    def arrived(self, batch: ScheduleBatch) -> None:
        """Those whose KV is back on the device join the running batch."""
        if self.line is None:
            return
        self.line.next_planning(idle=batch.is_empty())
        back = self.line.ready(now=batch.is_empty())
        if not back:
            return
        reqs = [w.req for w in back]
        merged = batches.merged(batch, self._ports.batches.decode_batch(reqs))
        merged.batch_is_full = False
        try:
            self.line.landed(back)
        finally:
            if back[0] not in self.line.arriving:
                self._ports.iteration.running = merged
        self._pick_up(reqs)

    def _pick_up(self, reqs: list[Req]) -> None:
        """Their next gap is short again; the long one since their last token counts, but calls for no hurry."""
        table, rows, ready_s = self._ports.requests.table, self._ports.rows(reqs), self._ports.ready_s()
        passed = table.last_token_s[rows] + table.tbt_s[rows] < ready_s
        table.last_token_s[rows[passed]] = ready_s

    def settle(self) -> list[Req]:
        """This iteration's victims, whose place is in the queue from now on."""
        back, self.leaving = self.leaving, []
        return back

    def requeued(self, req: Req) -> None:
        """Bring the row of one that is in the queue again up to date."""
        self._ports.requests.open(req, req.slo, 0.0, self._ports.agreed.model)
        self._look_up(req)
        req.time_stats.set_wait_queue_entry_time()

    def before_decode(self, batch: ScheduleBatch) -> None:
        """What is only kept for later is let go before SGLang looks whether it has to retract."""
        need = batch.new_tokens_required_next_decode()
        self._held.make_room(need)
        if not self._kv.has(need):
            self._pins.release_all()
            if self.line is not None:
                self.line.release_due(now=True)

    def retracted(self, req: Req) -> None:
        """SGLang's own retraction took `req` out."""
        registry, row = self._ports.requests, req.slo_row
        req.slo_computed_tokens = req.seqlen - 1
        self.counts["stock"] += 1
        registry.table.preemptions[row] += 1
        registry.drop_in_flight(row)
        registry.table.deadline_s[row] = registry.table.back_by_s(row)

    # -- for the scheduler

    def figures(self) -> dict[str, float]:
        """Host KV used and there, and from which context on swapping pays; tokens."""
        return self.cost.figures(self._ports.agreed.model)

    def queue_again(self, req: Req) -> None:
        """Back in the queue when this iteration is planned."""
        self.leaving.append(req)

    def alive(self) -> list[Req]:
        """Requests that are nowhere else in the scheduler."""
        return [*self.leaving, *(self.line or ())]

    def at_rest(self, batch: ScheduleBatch) -> bool:
        """Nobody is on the way out or back, and `batch` can decode for a while before KV runs short."""
        step = self._ports.requests.table.step
        most = len(batch.reqs) * preemption.most_growth_tokens(step, self._kv.page_tokens)
        return self.idle and self._kv.has(most)

    @property
    def idle(self) -> bool:
        """No request is anywhere between leaving and being back."""
        return not self.leaving and (self.line is None or self.line.empty)

    def abort(self, rid: str, everyone: bool) -> None:
        """End swapped requests whose id begins with `rid`."""
        if self.line is not None:
            self.line.abort(rid, everyone)

    def release_device(self) -> None:
        """Give back all device KV that is held for swapped requests, and for those set aside half-prefilled."""
        self._held.release()
        if self.line is not None:
            self.line.cancel_arrivals()
            self.line.release_due(now=True)

    def weights_change(self) -> None:
        """What was computed with the old weights is not loaded again."""
        self._held.release()
        if self.line is not None:
            self.line.forget()


def release_parked(ports: Ports, req: Req) -> None:
    """Take the cut request out of its place: its KV stays in the radix tree, where its next turn finds it.

    Or what of it is there already.
    """
    req.slo_computed_tokens = kv.committed_tokens(req)
    req.slo_parked = getattr(req, "slo_parked", 0) + 1
    tree.release(ports.kv.tree, req, keep=tree.keeps_unfinished(ports.kv.tree))
    req.reset_for_retract()
    req.retraction_count -= 1  # nothing was taken from it
    ports.waiting.cut = None


def freed_tokens(pool: KvPool, req: Req) -> int:
    """KV that becomes free or evictable when `req` leaves: all it holds but what others hold too."""
    own = pages.whole(kv.allocated_tokens(req), pool.page_tokens) - kv.protected_tokens(req)
    return own + min(tree.kept_alone(pool.tree, req), kv.protected_tokens(req))


def freed_window_tokens(pool: KvPool, reqs: list[Req]) -> np.ndarray:
    """Of the window's pool, what becomes free or evictable when each request leaves; int[n]."""
    count = pool.tree.swa_evictable_size
    alone = np.fromiter((tree.kept_alone(pool.tree, req, count) for req in reqs), np.int64, len(reqs))
    return pools.own_window_tokens(reqs, pool.page_tokens) + alone
