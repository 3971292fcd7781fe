"""Watches a run: what was launched, which tokens came out when, and which request ends with which token.

Everything the result needs is taken from outside the scheduler: from the batches that reach the worker and
from the requests that reach the output. Memory: token times of live requests only, plus one row per
iteration.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_slo.twin.devices.device import Pass
from sglang_slo.twin.engine import VirtualEngine
from sglang_slo.twin.result import Iterations, Requests, empty_requests, gap_figures
from sglang_slo.twin.workload import Workload

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
        self._token_times: dict[str, array[float]] = {}
        self._computed: dict[
            str, int
        ] = {}  # prompt and output tokens whose KV was ever computed, live requests
        self._over: set[str] = set()

    # -- from the worker

    def launched(self, batch: ScheduleBatch, load: Pass) -> list[int]:
        """Take note of a launch; returns the places in the batch whose token is the request's last."""
        start, end = self.engine.launch(load)
        prefills, decodes = len(load.chunks), len(load.contexts)
        rows = self._rows
        rows["start_s"].append(start)
        rows["duration_s"].append(end - start)
        rows["new_tokens"].append(load.new_tokens - decodes)
        rows["prefills"].append(prefills)
        rows["decodes"].append(decodes)
        rows["context_tokens"].append(load.context_tokens)
        rows["stalled"].append(0)
        lengths = batch.seq_lens_cpu.tolist()
        if prefills:
            self._note_prefill(batch, lengths, prefills)
        # A pass over L tokens of a request yields token L + 1 of it; it ends with input + output tokens.
        total = self._true_total
        return [
            place
            for place, (req, length) in enumerate(zip(batch.reqs, lengths, strict=True))
            if length + 1 >= total[int(req.rid[1:])]
        ]

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

    def pool_state(self, kv_used_tokens: int, waiting: int) -> None:
        """Complete the row of the pass just launched."""
        self._rows["kv_used_tokens"].append(kv_used_tokens)
        self._rows["waiting"].append(waiting)

    # -- from the output

    def tokens_out(self, reqs: list[Req]) -> None:
        """Note the tokens that came out now; requests may be mentioned without having a new one."""
        now = self.engine.now_s
        for req in reqs:
            rid = req.rid
            count = len(req.output_ids)
            times = self._token_times.get(rid)
            if times is None:
                if rid in self._over:
                    continue
                times = self._token_times[rid] = array("d")
            if count > len(times):
                times.append(now)
            if req.finished_reason is not None:
                self._end(req)

    def arrived(self, i: int, at_s: float) -> None:
        """Request i of a closed loop was sent."""
        self.requests.arrival_s[i] = at_s

    def refused(self, rid: str) -> None:
        """A request that the scheduler turned away: it never finishes."""
        if rid not in self._over:
            self._over.add(rid)
            self._token_times.pop(rid, None)
            self._computed.pop(rid, None)
            self.ended += 1

    def _end(self, req: Req) -> None:
        times = self._token_times.pop(req.rid)
        self._computed.pop(req.rid, None)
        self._over.add(req.rid)
        self.ended += 1
        i, rows = request_number(req.rid), self.requests
        rows.preemptions[i] = req.retraction_count
        if len(times):
            rows.ttft_s[i] = times[0] - rows.arrival_s[i]
        if len(times) == rows.output_tokens[i]:
            rows.end_s[i] = times[-1]
            rows.tbt_s[i], rows.tpot_s[i], rows.max_gap_s[i] = gap_figures(np.array(times))

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
