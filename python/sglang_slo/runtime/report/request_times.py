"""Tells the observer what became of SGLang's requests: when tokens came out, how each ended.

Hooked in where SGLang hands tokens on (`JudgingStreamer`), so that a time is taken when the token leaves
the scheduler, and the verdict is known before the last piece of an answer is sent. Only the rank that streams
reports; nothing in here influences a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from http import HTTPStatus
from typing import Any

import numpy as np
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_slo import clock
from sglang_slo.core.deliveries import DeliveryTable
from sglang_slo.observe.answers import attach
from sglang_slo.observe.judge import COMPLETE, Finish, RequestRecord, answer
from sglang_slo.observe.observer import Observer
from sglang_slo.runtime.requests.lengths import delivered_tokens

Req.slo_slot = -1  # nothing is reported of a request that was never opened

HEALTH_CHECK = "HEALTH_CHECK"  # SGLang's own probes begin with it: nobody waits for them
MESSAGE_CHARACTERS = 200  # of what a client was told, kept in the log
ENDS: dict[Any, Finish] = {
    HTTPStatus.BAD_REQUEST: "rejected",
    HTTPStatus.SERVICE_UNAVAILABLE: "shed",
    HTTPStatus.INTERNAL_SERVER_ERROR: "error",
}


class Reporter:
    """Streams of live requests, by slot (the row they were given), and their records when they end.

    The slot is written on the request (`req.slo_slot`) and taken off when it ends: a request ends once.
    """

    def __init__(self, observer: Observer, keep_text: bool = False) -> None:
        self._observer, self._keep_text = observer, keep_text
        self._out = DeliveryTable(slots=1024)
        self._arrival_s = np.zeros(1024)
        self._batch: list[Req] = []
        self._slots = np.zeros(0, np.int64)

    def opened(self, req: Req, arrival_s: float, now_s: float) -> None:
        """A request was given its row `req.slo_row`; `arrival_s`: when it reached the server."""
        if nobodys(req):
            return
        req.slo_slot = row = req.slo_row
        while row >= len(self._arrival_s):
            self._arrival_s = np.concatenate((self._arrival_s, np.zeros_like(self._arrival_s)))
        declared = req.sampling_params.max_new_tokens
        self._out.open(row, req.slo, 2**20 if declared is None else declared)
        self._arrival_s[row] = arrival_s
        self._observer.arrived(req.slo, now_s)

    def streamed(self, reqs: Iterable[Req]) -> None:
        """Results of `reqs` are about to leave: time new tokens, judge what ended. Never raises."""
        now_s = clock.now()
        try:
            live = [req for req in reqs if req.slo_slot >= 0]
            self._tokens_out(live, now_s)
            for req in [req for req in live if req.finished_reason is not None]:
                self.ended(req, now_s)
        except Exception as error:
            self._observer.trouble.happened("reporting tokens failed", now_s, error)

    def _tokens_out(self, live: list[Req], now_s: float) -> None:
        if live != self._batch:  # a batch that decodes stays the same for many iterations
            self._batch, self._slots = live, np.fromiter((req.slo_slot for req in live), np.int64, len(live))
        slots = self._slots
        new = np.fromiter(map(delivered_tokens, live), np.int64, len(live)) - self._out.tokens(slots)
        got = new > 0
        if got.all():
            self._out.add(slots, now_s, new)
        else:
            self._out.add(slots[got], now_s, new[got])

    def refused(self, req: Any, reason: dict[str, Any] | None) -> None:
        """The scheduler tells the client that `req` (a request of ours, or anything) is over. Never raises.

        `reason`: SGLang's finish reason as it goes to the client; None: the client asked for it.
        """
        now_s = clock.now()
        try:
            if getattr(req, "slo_slot", -1) >= 0:
                status, message = (reason or {}).get("status_code"), (reason or {}).get("message")
                self.ended(req, now_s, ENDS.get(status, "abort"), str(message or ""))
        except Exception as error:
            self._observer.trouble.happened("reporting a refusal failed", now_s, error)

    def ended(self, req: Req, now_s: float, finish: Finish | None = None, message: str = "") -> None:
        """A request ends, by its finish reason or as `finish`; nothing if it had ended before.

        Its client is told if an answer is still to go, that is, if there is a finish reason.
        """
        slot, req.slo_slot = req.slo_slot, -1
        if slot < 0:
            return
        message = message or str(getattr(req.finished_reason, "message", None) or "")
        record = self._record(req, slot, now_s, finish or finish_of(req.finished_reason))
        record.message = message[:MESSAGE_CHARACTERS] if record.finish not in COMPLETE else ""
        verdict = self._observer.finished(record, now_s)
        if verdict is not None and req.finished_reason is not None:
            attach(req, answer(record, verdict))

    def _record(self, req: Req, row: int, now_s: float, finish: Finish) -> RequestRecord:
        whole = finish in COMPLETE and self._out.tokens(np.array([row]))[0] > 0
        return RequestRecord(
            rid=req.rid,
            slo=req.slo,
            arrival_s=float(self._arrival_s[row]),
            finished_s=now_s,
            out=self._out.close(row, None if whole else now_s),
            prompt_tokens=len(req.origin_input_ids),
            cached_tokens=req.cached_tokens,
            output_tokens=len(req.output_ids_through_stop),
            finish=finish,
            parked=getattr(req, "slo_parked", 0),
            preempted=req.retraction_count,
            swapped=getattr(req, "slo_swapped", 0),
            recomputed_tokens=getattr(req, "slo_recomputed_tokens", 0),
            unattainable=getattr(req, "slo_unattainable", False),
            predicted_tokens=getattr(req, "slo_predicted_tokens", None),
            bound_tokens=getattr(req, "slo_bound_tokens", None),
            features=getattr(req, "slo_features", {}),
            text=req.origin_input_text if self._keep_text else None,
        )


def nobodys(req: Req) -> bool:
    """SGLang's own requests: its health checks, and what warms the prefix cache before n > 1 answers.

    The latter carries the client's sampling parameters with no token to generate.
    """
    params = req.sampling_params
    return req.rid.startswith(HEALTH_CHECK) or (params.max_new_tokens == 0 and (params.n or 1) > 1)


def finish_of(reason: Any) -> Finish:
    """Why a request ended, from SGLang's finish reason; None: it was taken out without one."""
    if isinstance(reason, FINISH_LENGTH):
        return "length"
    if reason is None or isinstance(reason, FINISH_ABORT):
        return ENDS.get(getattr(reason, "status_code", None), "abort")
    return "stop"


@dataclass(kw_only=True, slots=True)
class JudgingStreamer(SchedulerOutputStreamer):
    """SGLang's output streamer that shows its requests to `before` first."""

    before: Callable[[Iterable[Req]], None]

    @classmethod
    def wrapping(
        cls, streamer: SchedulerOutputStreamer, before: Callable[[Iterable[Req]], None]
    ) -> JudgingStreamer:
        """The same streamer, with `before` called on the requests of each batch."""
        kept = {f.name: getattr(streamer, f.name) for f in fields(SchedulerOutputStreamer)}
        return cls(**kept, before=before)

    def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
        """SGLang's, after `before`."""
        self.before([req for req in reqs if req is not skip_req])
        SchedulerOutputStreamer.stream_output(self, reqs, return_logprob, skip_req)


class HearingSender:
    """SGLang's sender to the tokenizer that tells `refused` of requests the scheduler ends on paths of its own:
    queue full, waiting timeout, a priority that displaces, a client's abort of what waits.
    """

    def __init__(self, sender: Any, refused: Callable[[Any, dict[str, Any] | None], None]) -> None:
        self._sender, self._refused = sender, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)

    def send_output(self, output: Any, recv_obj: Any = None) -> Any:
        """SGLang's, after `refused`; the answer goes out whatever becomes of that."""
        if isinstance(output, AbortReq):
            with suppress(Exception):
                self._refused(recv_obj, output.finished_reason)
        return self._sender.send_output(output, recv_obj)


def hearing(channels: Any, refused: Callable[[Any, dict[str, Any] | None], None]) -> Any:
    """SGLang's channels, with `refused` told of requests that the scheduler ends on paths of its own."""
    return replace(channels, send_to_tokenizer=HearingSender(channels.send_to_tokenizer, refused))


def metric_labels(scheduler: Any) -> dict[str, Any] | None:
    """The labels of SGLang's own scheduler metrics, None when metrics are off or another rank reports."""
    context = scheduler.metrics_collector_context
    if context.collector is None or not context.current_scheduler_metrics_enabled:
        return None
    return {name: value for name, value in context.collector.labels.items() if name != "priority"}
