"""Tells the observer what became of SGLang's requests: when tokens came out, how each ended.

Hooked in where SGLang hands tokens on (`JudgingStreamer`), so that a time is taken when the token leaves
the scheduler, and the verdict is known before the last piece of an answer is sent. Only the rank that streams
reports; nothing in here influences a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from http import HTTPStatus
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_slo import clock
from sglang_slo.core.attainment import GapTable
from sglang_slo.observe.answers import attach
from sglang_slo.observe.judge import Finish, RequestRecord, answer
from sglang_slo.observe.observer import Observer

Req.slo_slot = -1  # nothing is reported of a request that was never opened

HEALTH_CHECK = "HEALTH_CHECK"  # SGLang's own probes begin with it: nobody waits for them
ENDS: dict[Any, Finish] = {
    HTTPStatus.BAD_REQUEST: "rejected",
    HTTPStatus.SERVICE_UNAVAILABLE: "shed",
    HTTPStatus.INTERNAL_SERVER_ERROR: "error",
}


class Reporter:
    """Times of live requests, by slot (the row they were given), and their records when they end.

    The slot is written on the request (`req.slo_slot`) and taken off when it ends: a request ends once.
    """

    def __init__(self, observer: Observer, keep_text: bool = False) -> None:
        self._observer, self._keep_text = observer, keep_text
        self._gaps = GapTable(slots=1024)
        self._seen = np.zeros(1024, np.int64)  # tokens out so far
        self._arrival_s = np.zeros(1024)
        self._first_s = np.zeros(1024)
        self._last_s = np.zeros(1024)
        self._batch: list[Req] = []
        self._slots = np.zeros(0, np.int64)

    def opened(self, req: Req, arrival_s: float, now_s: float) -> None:
        """A request was given its row `req.slo_row`; `arrival_s`: when it reached the server."""
        req.slo_slot = row = req.slo_row
        while row >= len(self._seen):
            for name in ("_seen", "_arrival_s", "_first_s", "_last_s"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate((column, np.zeros_like(column))))
        declared = req.sampling_params.max_new_tokens
        self._gaps.open(row, 2**20 if declared is None else declared)
        self._seen[row], self._arrival_s[row] = 0, arrival_s
        if not req.rid.startswith(HEALTH_CHECK):
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
        rows = self._slots
        tokens = np.fromiter((len(req.output_ids) for req in live), np.int64, len(live))
        seen = self._seen[rows]
        new, begun = tokens > seen, seen > 0
        if new.all() and begun.all():  # decoding: nothing to tell apart
            self._gaps.add(rows, now_s - self._last_s[rows])
            self._last_s[rows] = now_s
            self._seen[rows] = tokens
            return
        first, next_ = rows[new & ~begun], rows[new & begun]
        self._first_s[first] = now_s
        self._gaps.add(next_, now_s - self._last_s[next_])
        self._last_s[rows[new]] = now_s
        self._seen[rows] = tokens

    def ended(self, req: Req, now_s: float, finish: Finish | None = None) -> None:
        """A request ends, by its finish reason or as `finish`; nothing if it had ended before.

        Its client is told if an answer is still to go, that is, if there is a finish reason.
        """
        slot, req.slo_slot = req.slo_slot, -1
        if slot < 0 or req.rid.startswith(HEALTH_CHECK):
            return
        record = self._record(req, slot, now_s, finish or finish_of(req.finished_reason))
        verdict = self._observer.finished(record, now_s)
        if verdict is not None and req.finished_reason is not None:
            attach(req, answer(record, verdict))

    def _record(self, req: Req, row: int, now_s: float, finish: Finish) -> RequestRecord:
        return RequestRecord(
            rid=req.rid,
            slo=req.slo,
            arrival_s=float(self._arrival_s[row]),
            first_token_s=float(self._first_s[row]) if self._seen[row] else None,
            finished_s=now_s,
            gaps=self._gaps.close(row),
            prompt_tokens=len(req.origin_input_ids),
            cached_tokens=req.cached_tokens,
            output_tokens=len(req.output_ids_through_stop),
            finish=finish,
            parked=getattr(req, "slo_parked", 0),
            preempted=req.retraction_count,
            swapped=getattr(req, "slo_swapped", 0),
            recomputed_tokens=getattr(req, "slo_recomputed_tokens", 0),
            lost=getattr(req, "slo_lost", False),
            unattainable=getattr(req, "slo_unattainable", False),
            predicted_tokens=getattr(req, "slo_predicted_tokens", None),
            bound_tokens=getattr(req, "slo_bound_tokens", None),
            features=getattr(req, "slo_features", {}),
            text=req.origin_input_text if self._keep_text else None,
        )


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


def metric_labels(scheduler: Any) -> dict[str, Any] | None:
    """The labels of SGLang's own scheduler metrics, None when metrics are off or another rank reports."""
    context = scheduler.metrics_collector_context
    if context.collector is None or not context.current_scheduler_metrics_enabled:
        return None
    return {name: value for name, value in context.collector.labels.items() if name != "priority"}
