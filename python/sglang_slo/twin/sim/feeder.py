"""In the place of the socket that requests come from: hands over those that have arrived by now.

In a closed loop each client sends its next request as the one before ends. When nothing is in flight, time jumps to
the next arrival. The request carries what its client declared and the limits of its class, never its true length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_slo.core.slo import Slo
from sglang_slo.server.limits import to_wire
from sglang_slo.twin.sim.recorder import Recorder, request_id
from sglang_slo.twin.sim.tokens import prompt
from sglang_slo.twin.workloads.workload import Workload

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

IDLE_STEP_S = 1e-3  # how far time moves when the scheduler holds everything back and no one is to arrive
MAX_IDLE_STEPS = 600_000  # ten virtual minutes of that is a scheduler that hangs


class StuckError(RuntimeError):
    """The scheduler has requests, an idle device, and does nothing."""


class Feeder:
    """Feeds one workload to one scheduler."""

    def __init__(self, scheduler: Scheduler, workload: Workload, recorder: Recorder) -> None:
        self._scheduler = scheduler
        self._workload = workload
        self._recorder = recorder
        self._arrivals = (
            workload.arrival_s.tolist() if workload.clients is None else [math.inf] * len(workload)
        )
        self._next = 0
        self._idle_steps = 0
        self._priority = _priorities(workload.limits)

    def pull(self) -> list[TokenizedGenerateReqInput]:
        """Requests that have arrived; stops the event loop after the last one has ended."""
        engine = self._recorder.engine
        if self._workload.clients is not None:
            self._send_in_turn()
        if self._in_flight():
            self._idle_steps = 0
        elif self._recorder.finite():
            self._scheduler.gracefully_exit = True
            return []
        elif self._next < len(self._arrivals):
            engine.wait_until(min(self._arrivals[self._next], self._held_until()))
        else:
            self._idle_steps += 1
            if self._idle_steps > MAX_IDLE_STEPS:
                raise StuckError(f"{len(self._scheduler.waiting_queue)} requests wait and nothing runs")
            engine.wait_until(engine.now_s + IDLE_STEP_S)
        fresh = []
        while self._next < len(self._arrivals) and self._arrivals[self._next] <= engine.now_s:
            fresh.append(self._request(self._next))
            self._next += 1
        return fresh

    def _send_in_turn(self) -> None:
        """Give an arrival to the requests whose client is free now."""
        sent, recorder, clients = self._next, self._recorder, self._workload.clients or 0
        while sent < len(self._arrivals) and sent - recorder.ended < clients:
            self._arrivals[sent] = recorder.engine.now_s
            recorder.arrived(sent, recorder.engine.now_s)
            sent += 1

    def _in_flight(self) -> bool:
        return bool(getattr(self._scheduler, "result_queue", ())) or self._scheduler.last_batch is not None

    def _held_until(self) -> float:
        # A scheduler may hold requests back until a time of its own: let it look again soon.
        preempt = getattr(self._scheduler, "slo_preempt", None)
        held = bool(self._scheduler.waiting_queue) or (preempt is not None and not preempt.idle)
        if held or not self._scheduler.running_batch.is_empty():
            return self._recorder.engine.now_s + IDLE_STEP_S
        return math.inf

    def _request(self, i: int) -> TokenizedGenerateReqInput:
        workload = self._workload
        limits = workload.limits[int(workload.class_id[i])]
        feature = workload.features[i] if workload.features else ""
        params = SamplingParams(
            max_new_tokens=workload.declared(i),
            temperature=0.0,
            frequency_penalty=0.5 if feature == "penalty" else 0.0,
            regex=r"(.|\n)*" if feature == "grammar" else None,
            custom_params={"slo": to_wire(limits, self._arrivals[i])},
        )
        params.normalize(None)
        priority = None
        if self._scheduler.enable_priority_scheduling:
            priority = self._priority[int(workload.class_id[i])]
        return TokenizedGenerateReqInput(
            rid=request_id(i),
            input_text=workload.texts[i] if workload.texts else None,
            input_ids=prompt(workload, i),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=feature == "logprobs",
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=True,
            priority=priority,
            routing_key=(workload.callers[i] or None) if workload.callers else None,
            time_stats=APIServerReqTimeStats(),
        )


def _priorities(limits: list[Slo]) -> list[int]:
    """What a careful operator of stock SGLang would set: the shorter the first-token limit, the higher."""
    order = sorted({s.ttft_s for s in limits}, reverse=True)
    return [order.index(s.ttft_s) for s in limits]
