"""Lets SGLang's own prefill code admit exactly what the plan says.

SGLang builds a prefill batch by offering the waiting requests, in order, to a `PrefillAdder`. Ours answers from the
plan instead of from ratios; everything around it (LoRA, grammars, statistics, mixing) stays SGLang's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from sglang_slo.core import pages
from sglang_slo.runtime.requests import features
from sglang_slo.runtime.sglang import kv, pools, tree


class PlannedAdder(PrefillAdder):
    """Admits planned requests with their planned tokens; only one request of a batch may be cut short."""

    new_chunked_req: Req | None

    def __init__(
        self,
        *args: Any,
        planned: dict[Req, int],
        loads: set[Req],
        admitted: list[Req],
        held: Collection[Req],
        **kwargs: Any,
    ) -> None:
        # the sums over running requests that the base class makes belong to the rule that the plan replaces
        running_batch, args = args[3], (*args[:3], None, *args[4:])
        super().__init__(*args, **kwargs)
        self.running_batch = running_batch
        # KV that those taken so far, and the decodes beside them, take from the pool when the batch is built
        mixed = running_batch is not None and args[7]
        self._spoken_for = running_batch.new_tokens_required_next_decode() if mixed else 0
        self._most_chunk_tokens: int = self.rem_chunk_tokens or 1 << 40  # type: ignore[has-type]
        self.rem_input_tokens = self.rem_chunk_tokens = 1 << 40
        self._planned, self._loads, self._admitted, self._held = planned, loads, admitted, held

    def add_chunked_req(self, req: Req) -> Req | None:
        """The request that was cut last time: its next piece. Returns it if it is cut again."""
        start = kv.prefix_tokens(req)
        rest = len(req.full_untruncated_fill_ids) - start
        room = self._free_tokens() + pages.whole(start, self.page_size) - start
        # it has to move: an unfinished chunk that is left out of the batch would be lost
        tokens = max(min(self._planned.get(req, rest), rest, room), 1)
        self._take(req, tokens)
        if tokens < rest:
            return req
        return None

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """A waiting request: its planned tokens, if the pool has room for them now."""
        planned = self._planned.get(req)
        if planned is None:
            return AddReqResult.OTHER
        if req in self._held:  # SGLang has just looked it up, where there is nothing to be found
            kv.prefix_is_own(req, self.tree_cache.req_to_token_pool)
        with self._lock_node(req.last_node):
            host = tree.host_tokens(self.tree_cache, req) if req in self._loads else 0
            if not host:
                req.host_hit_length = 0  # it is computed, and is not to be told as found
            start = kv.prefix_tokens(req) + host
            tokens, cut = self._piece(req, start, planned)
            # the prefix may have shrunk since it was planned: a second cut in one batch is not possible
            if cut and (has_chunked_req or self.new_chunked_req is not None):
                return AddReqResult.OTHER
            if host + pages.growth(start, tokens, self.page_size) > self._free_tokens():
                return AddReqResult.NO_TOKEN
            if host:  # last, as a load that no batch waits for would keep its KV locked
                req.slo_load_tokens = tree.load_back(self.tree_cache, req)
                if req.slo_load_tokens < host:  # the rest is computed
                    self._loads.discard(req)
                    return self.add_one_req(req, has_chunked_req, truncation_align_size)
            tree.lock_for(self.tree_cache, req)
            self._admitted.append(req)
            self._take(req, tokens)
            if cut:
                self.new_chunked_req = req
        return AddReqResult.CONTINUE

    def _piece(self, req: Req, start: int, planned: int) -> tuple[int, bool]:
        """How many tokens behind `start` are computed now, and whether that leaves some for later."""
        rest = len(req.full_untruncated_fill_ids) - start
        tokens = min(planned, rest)
        if tokens < rest and not features.of(req).cut:  # less is cached than when it was planned
            tokens = min(rest, max(planned, self._most_chunk_tokens))
        cut = tokens < rest
        return (pages.cut(start, tokens, self.page_size) if cut else tokens), cut

    def _free_tokens(self) -> int:
        """KV that is left for those who are not taken yet, of the pool that has least."""
        free = pools.least_free_tokens(self.token_to_kv_pool_allocator, self.tree_cache)
        return free - self._spoken_for

    def _take(self, req: Req, tokens: int) -> None:
        start = kv.prefix_tokens(req)
        kv.set_extend(req, tokens)
        self._spoken_for += pages.growth(start, tokens, self.page_size)
        computed = getattr(req, "slo_computed_tokens", 0)
        again = max(min(computed, start + tokens) - start, 0)
        req.slo_recomputed_tokens = getattr(req, "slo_recomputed_tokens", 0) + again
        self.can_run_list.append(req)
        self._update_prefill_budget(start, tokens, 0, req.retracted_stain)
