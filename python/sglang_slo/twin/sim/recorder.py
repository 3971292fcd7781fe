"""Watches a run: what was launched, which tokens came out when, and which request ends with which token.

Everything the result needs is taken from outside the scheduler: from the batches that reach the worker and
from the requests that reach the output. Memory: one row per iteration, and of live requests what the judge needs.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_slo.core.attainment import Deliveries
from sglang_slo.core.deliveries import DeliveryTable
from sglang_slo.runtime.requests.lengths import delivered_tokens
from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.result.requests import Requests, empty_requests
from sglang_slo.twin.result.run_result import Iterations
from sglang_slo.twin.sim.engine import VirtualEngine
from sglang_slo.twin.workloads.workload import Workload

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

_COLUMNS = {
    "start_s": "d",
    "duration_s": "d",
    "new_tokens": "q",
    "prefills": "q",
    "decodes": "q",
    "context_tokens": "q",
    "kv_used_tokens": "q",
    "waiting": "q",
    "stalled": "q",
}


def request_id(i: int) -> str:
    """The id under which request i of the workload travels."""
    return f"r{i}"


def request_number(rid: str) -> int:
    """Inverse of `request_id`."""
    return int(rid[1:])


class Recorder:
    """The record of one run."""

    def __init__(self, workload: Workload, engine: VirtualEngine) -> None:
        self.workload = workload
        self.engine = engine
        self.requests: Requests = empty_requests(
            workload.class_id,
            workload.arrival_s.copy(),  # clients in a loop decide as they go
            workload.input_tokens,
            workload.output_tokens,
            workload.limits,
        )
        self.ended = 0  # requests that finished or were refused
        self.prefill_tokens = 0
        self.recompute_tokens = 0
        self._rows: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._true_total = (workload.input_tokens + workload.output_tokens).tolist()
        self._out = DeliveryTable(slots=1024)
        self._slots: dict[str, int] = {}  # of live requests that had a token, or were mentioned
        self._free_slots: list[int] = []
        self._streams: set[str] = set()  # requests whose first token was launched, and the last was not
        self._computed: dict[
            str, int
        ] = {}  # prompt and output tokens whose KV was ever computed, live requests
        self._over: set[str] = set()

    # -- from the worker

    def launched(
        self, batch: ScheduleBatch, load: Pass, lengths: list[int], given: list[int] | None = None
    ) -> dict[int, int]:
        """Take note of a launch; returns the places in the batch that are given their request's last token, and how many
        tokens they are given before it.

        `lengths`: tokens of each request that are there when it ends, but for those it gives; `given`: how many these are,
        None: one each.
        """
        start, end = self.engine.launch(load)
        prefills, decodes = len(load.chunks), len(load.contexts)
        rows = self._rows
        rows["start_s"].append(start)
        rows["duration_s"].append(end - start)
        rows["new_tokens"].append(sum(new for _, new in load.chunks))
        rows["prefills"].append(prefills)
        rows["decodes"].append(decodes)
        rows["context_tokens"].append(load.context_tokens)
        streaming = len(
            self._streams
        )  # all that decode, and what comes back from a preemption, are among them
        back = sum(req.rid in self._streams for req in batch.reqs[:prefills])
        rows["stalled"].append(max(streaming - decodes - back, 0))
        if prefills:
            self._note_prefill(batch, lengths, prefills)
        # A pass over L tokens of a request yields token L + 1 of it, and those behind; it ends with input + output tokens.
        total = self._true_total
        most = given or [1] * len(lengths)
        before = [max(total[int(r.rid[1:])] - n - 1, 0) for r, n in zip(batch.reqs, lengths, strict=True)]
        last = {place: n for place, (n, gets) in enumerate(zip(before, most, strict=True)) if n < gets}
        self._streams.difference_update(batch.reqs[place].rid for place in last)
        return last

    def _note_prefill(self, batch: ScheduleBatch, lengths: list[int], prefills: int) -> None:
        for req, n, length in zip(batch.reqs[:prefills], batch.extend_lens, lengths, strict=False):
            self.prefill_tokens += n
            before = self._computed.get(req.rid)
            if before is None:
                self.requests.cached_tokens[request_number(req.rid)] = length - n
                before = length - n
            if (
                req.output_ids
            ):  # back after a preemption: all but its newest token went through the model before
                before = max(before, len(req.origin_input_ids) + len(req.output_ids) - 1)
            self.recompute_tokens += max(min(before, length) - (length - n), 0)
            self._computed[req.rid] = max(before, length)
            if length >= len(req.origin_input_ids):  # this pass gives a token
                self._streams.add(req.rid)

    def pool_state(self, kv_used_tokens: int, waiting: int) -> None:
        """Complete the row of the pass just launched."""
        self._rows["kv_used_tokens"].append(kv_used_tokens)
        self._rows["waiting"].append(waiting)

    # -- from the output

    def tokens_out(self, reqs: list[Req]) -> None:
        """Note the tokens that came out now; requests may be mentioned without having a new one."""
        live = [req for req in reqs if req.rid not in self._over]
        slots = np.fromiter((self._slot(req.rid) for req in live), np.int64, len(live))
        new = np.fromiter(map(delivered_tokens, live), np.int64, len(live)) - self._out.tokens(slots)
        got = new > 0
        self._out.add(slots[got], self.engine.now_s, new[got])
        for req in live:
            if req.finished_reason is not None:
                self._end(req)

    def _slot(self, rid: str) -> int:
        slot = self._slots.get(rid)
        if slot is None:
            slot = self._slots[rid] = self._free_slots.pop() if self._free_slots else len(self._slots)
            i = request_number(rid)
            limits = self.workload.limits[int(self.workload.class_id[i])]
            self._out.open(slot, limits, int(self.workload.output_tokens[i]))
        return slot

    def arrived(self, i: int, at_s: float) -> None:
        """Request i of a closed loop was sent."""
        self.requests.arrival_s[i] = at_s

    def refused(self, rid: str) -> None:
        """A request that the scheduler turned away: it never finishes."""
        if rid not in self._over:
            self.requests.refused[request_number(rid)] = True
            self._forget(rid)

    def _forget(self, rid: str) -> Deliveries | None:
        self._over.add(rid)
        self._computed.pop(rid, None)
        self._streams.discard(rid)
        self.ended += 1
        slot = self._slots.pop(rid, None)
        if slot is None:
            return None
        self._free_slots.append(slot)
        return self._out.close(slot)

    def _end(self, req: Req) -> None:
        out = self._forget(req.rid)
        i, rows = request_number(req.rid), self.requests
        rows.preemptions[i] = req.retraction_count
        if out is not None and out.tokens:
            rows.take(i, out, whole=out.tokens == rows.output_tokens[i])

    def iterations(self) -> Iterations:
        """The rows so far as arrays."""
        columns: dict[str, Any] = {
            name: np.frombuffer(rows, np.float64 if rows.typecode == "d" else np.int64).copy()
            for name, rows in self._rows.items()
        }
        return Iterations(**columns)

    def finite(self) -> bool:
        """Whether every request has ended."""
        return self.ended == len(self.workload) and math.isfinite(self.engine.now_s)
