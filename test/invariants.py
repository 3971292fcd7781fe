"""What must hold between any two iterations, for SGLang's scheduler and for ours.

INV-1 conservation of requests: every request that arrived is waiting, running or over, only one of them.
INV-2 conservation of KV: free + evictable + protected + held outside the tree = capacity.
INV-3 monotone clock: time never runs backwards.
INV-4 work conservation: with an idle device and requests waiting, something is launched.
INV-5 no peeking: see `test_driver.py`, where hidden lengths change and decisions do not.
INV-6 no request holds KV that it has not been given: committed <= allocated <= what it may ever need.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Watched:
    """Mixed in before a virtual scheduler (`driver.run(..., watcher=Watched)`): checks every iteration."""

    checked = 0  # iterations, over all runs
    _last_s = 0.0

    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        """The start of an iteration: the last one's result has been taken."""
        Watched.checked += 1
        self._clock()
        self._kv()
        super().process_input_requests(recv_reqs)  # type: ignore[misc]
        self._requests()

    def get_next_batch_to_run(self: Any, running_batch: Any, last_batch: Any) -> Any:
        """INV-4."""
        idle = running_batch.is_empty() and last_batch is None and not getattr(self, "result_queue", ())
        waiting = len(self.waiting_queue)
        step = super().get_next_batch_to_run(running_batch, last_batch)  # type: ignore[misc]
        assert step.batch_to_run is not None or not (idle and waiting), "INV-4: idle with requests waiting"
        return step

    def _clock(self: Any) -> None:
        now = self.twin_recorder.engine.now_s
        assert now >= self._last_s, f"INV-3: {now} after {self._last_s}"
        self._last_s = now

    def _kv(self: Any) -> None:
        outside = 0
        for req in self._holders():
            if req.kv is None or req.req_pool_idx is None:
                continue
            allocated = req.kv.kv_allocated_len
            most = len(req.origin_input_ids) + req.sampling_params.max_new_tokens + 1
            assert req.kv_committed_len <= allocated <= most, f"INV-6: {req.rid}"
            outside += allocated - req.cache_protected_len
        free, tree = self.token_to_kv_pool_allocator.available_size(), self.tree_cache
        swapping = (
            self.slo_preempt.line.leaving_tokens
            if getattr(self, "slo_on", False) and self.slo_preempt.line
            else 0
        )
        parts = (free, tree.evictable_size(), tree.protected_size(), outside, swapping)
        assert sum(parts) == self.max_total_num_tokens, f"INV-2: {parts} do not sum to capacity"

    def _requests(self: Any) -> None:
        waiting = [r.rid for r in self.waiting_queue]
        assert len(set(waiting)) == len(waiting), "INV-1: a request waits twice"
        alive = {r.rid for r in self._holders() if not r.finished()} | set(waiting)
        arrived = self.recv_from_tokenizer._next
        over = self.twin_recorder.ended
        assert len(alive) + over == arrived, f"INV-1: {len(alive)} alive + {over} over, {arrived} arrived"

    def _holders(self: Any) -> Iterator[Any]:
        seen: set[str] = set()
        batches = [self.running_batch, self.last_batch, getattr(self, "slo_split", None)]
        batches += [batch for batch, _ in getattr(self, "result_queue", ())]
        reqs = [r for b in batches if b is not None for r in b.reqs]
        preempted = self.slo_preempt.alive() if getattr(self, "slo_on", False) else []
        for req in [
            *reqs,
            *preempted,
            *([self.chunked_req] if self.chunked_req else []),
            *self.waiting_queue,
        ]:
            if req.rid not in seen:
                seen.add(req.rid)
                yield req
