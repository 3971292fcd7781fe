"""Keeps the table of live requests in step with SGLang's `Req` objects: arrival, launch, result, end.

A request gets its row when it enters the queue and loses it when it has finished, was aborted, or is no longer
anywhere in the scheduler. The row's number is written on the request (`req.slo_row`), so that the rows of a batch
are read in one pass. Everything here is the same on every rank: times come from ticks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from sglang.srt.managers.schedule_batch import Req

from sglang_slo.config import SloConfig
from sglang_slo.core.latency import BatchShape, LatencyModel, decode_shape
from sglang_slo.core.load import RecentLimits
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.core.steps import PLAIN, BurstLength, DecodeStep
from sglang_slo.core.table import RequestTable
from sglang_slo.runtime.requests import features
from sglang_slo.runtime.requests.waiting_rows import WaitingRows

# a request that never passed through the queue has no row
Req.slo_row = -1


@dataclass(slots=True)
class Launch:
    """An iteration on its way. `end_s` is predicted until a tick tells the measured one."""

    iteration: int
    rows: np.ndarray  # of every request that gets a token from it
    seqs: np.ndarray  # their arrival numbers: a row may be another request's by the time the end is known
    shape: BatchShape
    launched_s: float
    predicted_s: float
    end_s: float
    duration_s: float | None = None  # measured
    version: int = -1  # the registry's when it was launched
    idle_s: float = 0.0  # how long the device had been idle when it was launched, as measured


class Seen(NamedTuple):
    """The requests of a batch and where they are in the table; arrays of n, not to be written to."""

    reqs: list[Req]
    rows: np.ndarray  # -1 for one that has none
    seqs: np.ndarray  # arrival numbers
    whole: bool  # whether each has a row


class RequestRegistry:
    """Rows of live requests, and the iterations whose end is not known yet."""

    def __init__(self, config: SloConfig, page_tokens: int = 1, step: DecodeStep = PLAIN) -> None:
        self.table = RequestTable(max_preemptions=config.max_preemptions, page_tokens=page_tokens, step=step)
        self._bursts = BurstLength()
        self.reqs: dict[int, Req] = {}  # row -> request
        self.inflight: deque[Launch] = deque()
        self.closing: Callable[[Req], None] = lambda req: (
            None
        )  # told of each request before its row is given back
        self._last_end_s = 0.0
        self.recent_ttft = RecentLimits()
        self._version = 0  # changes with every row that is given or taken back
        self._known: deque[Seen] = deque(maxlen=3)  # the batches seen last
        self._waiting = WaitingRows(self.table)

    # -- requests

    def open(self, req: Req, slo: Slo, arrival_s: float, model: LatencyModel, cached_tokens: int = 0) -> int:
        """Give `req` a row, or bring its row up to date if it comes back to the queue.

        A limit that the hardware cannot keep even for this request alone, with `cached_tokens` of its prompt in the
        cache, is left out of the row (and so out of every decision) and told on the request.
        """
        row = req.slo_row
        prompt = len(req.origin_input_ids)
        if row < 0:
            verified = self.table.step.verified_tokens
            limits, req.slo_unattainable = attainable(slo, prompt, model, cached_tokens, verified)
            declared, permits = req.sampling_params.max_new_tokens, features.of(req)
            try:
                row = self.table.add(limits, arrival_s, prompt, 2**30 if declared is None else declared)
            except Exception:
                for nobodys in self.table.taken - self.reqs.keys():
                    self.table.remove(nobodys)
                raise
            req.slo, req.slo_row = slo, row  # at once: whatever raises from here on, the row is somebody's
            self.reqs[row] = req
            self._changed()
            # of a burst in flight, a grammar knows the tokens only when its own decode is launched
            mixable = permits.mix and not (self.table.step.bursts and features.has_grammar(req))
            self.table.mixable[row], self.table.cuttable[row] = mixable, permits.cut
            self.table.splittable[row] = permits.split
            self._due_for_the_end(row, model)
            if limits.ttft_s < np.inf:
                self.recent_ttft.arrived(arrival_s, limits.ttft_s)
        self.table.output_tokens[row] = len(req.output_ids)
        return row

    def _due_for_the_end(self, row: int, model: LatencyModel) -> None:
        """End to end: the first token is due so that what is expected after it still fits, at a lone request's pace."""
        table = self.table
        if np.isfinite(table.e2e_by_s[row]):
            alone = decode_shape(1, int(table.prompt_tokens[row]), verified=table.step.verified_tokens)
            steps = float(table.expected_steps(np.array([row]))[0])
            start_s = table.e2e_by_s[row] - steps * model.iteration_s(alone)
            table.deadline_s[row] = min(table.deadline_s[row], max(start_s, table.since_s[row]))

    def predicted(self, row: int, log_quantiles: list[float], confidence: float) -> None:
        """Take over the predicted output length of a request that has just arrived."""
        self.table.log_quantiles[row] = log_quantiles
        self.table.bound_lengths(np.array([row]), confidence)

    def close(self, req: Req) -> None:
        """Take the row back; nothing if it has none."""
        row = req.slo_row
        if row >= 0:
            self.closing(req)
            try:
                self.table.remove(row)
            finally:
                # a request keeps its row for as long as the table does: `sweep` tries again
                if row not in self.table.taken:
                    del self.reqs[row]
                    req.slo_row = -1
                    self._changed()

    def _changed(self) -> None:
        self._version += 1
        self._known.clear()

    def sweep(self, alive: Iterable[Req]) -> list[Req]:
        """Close the rows of requests that are nowhere any more (aborted on a path of SGLang's own); returns them."""
        rows = {req.slo_row for req in alive}
        gone = [req for row, req in self.reqs.items() if row not in rows]
        for req in gone:
            self.close(req)
        return gone

    # -- iterations

    def rows(self, reqs: list[Req]) -> np.ndarray:
        """Rows of the requests of a batch, in its order, -1 for one that has none; int[n], not to be written to."""
        return self.seen(reqs).rows

    def seen(self, reqs: list[Req]) -> Seen:
        """Where the requests of a batch are in the table.

        A batch that decodes stays the same for many iterations: it is remembered until a row is given or taken.
        """
        for known in self._known:
            if known.reqs == reqs:
                return known
        rows = np.fromiter((req.slo_row for req in reqs), np.int64, len(reqs))
        rows.flags.writeable = False
        whole = not len(rows) or bool(rows.min() >= 0)
        found = Seen(reqs.copy(), rows, self.table.seq[rows], whole)
        self._known.append(found)
        return found

    def planned(self, rows: list[int]) -> None:
        """Note whose prefill is planned: whoever of them waited leaves the queue."""
        self._waiting.planned(rows)

    def waiting_rows(self, queue: list[Req]) -> np.ndarray:
        """Rows of the waiting requests by deadline, then arrival, int[n]; -1 for any that has none yet."""
        return self._waiting.of(queue)

    def launch(self, launch: Launch) -> None:
        """Note an iteration that was just launched; its requests' last token is predicted at its end."""
        launch.version = self._version
        self.inflight.append(launch)
        self.table.last_token_s[launch.rows] = launch.end_s
        self.table.inflight_tokens[launch.rows] += 1
        self.table.begun[launch.rows] = True

    def tokens_out(self, reqs: list[Req]) -> list[Req]:
        """Take over the numbers of tokens after results were processed; end the rows of those that finished.

        Returns those that finished.
        """
        live = [req for req in reqs if req.slo_row >= 0]
        rows = self.rows(live)
        table = self.table
        tokens = np.fromiter((len(r.output_ids) for r in live), np.int64, len(live))
        new = tokens - table.output_tokens[rows]
        if table.step.bursts:
            self._bursts_out(rows, new)
        table.output_tokens[rows] = tokens
        table.remaining_tokens[rows] = np.maximum(table.remaining_tokens[rows] - new, 1)
        finished = [req for req in live if req.finished_reason is not None]
        for req in finished:
            self.close(req)
        return finished

    def _bursts_out(self, rows: np.ndarray, new: np.ndarray) -> None:
        """`new` int[n], tokens that the results just processed gave to `rows`; the first of each is counted at its end."""
        table, got = self.table, new > 0
        table.burst_tokens[rows] += np.maximum(new - 1, 0)
        decoded = got & (table.output_tokens[rows] > 0)
        if decoded.any():
            table.tokens_per_step = self._bursts.seen(int(new[decoded].sum()), int(decoded.sum()))

    def ended(self, iteration: int, end_s: float) -> Launch | None:
        """A measured end: correct the last-token times that were predicted from it. None if it is not known."""
        while self.inflight and self.inflight[0].iteration < iteration:
            self._over(self.inflight.popleft())
        if not self.inflight or self.inflight[0].iteration != iteration:
            return None
        launch = self.inflight.popleft()
        launch.duration_s = end_s - max(launch.launched_s, self._last_end_s)
        launch.idle_s = max(launch.launched_s - self._last_end_s, 0.0)
        self._last_end_s = end_s
        self._count_gaps(launch, end_s)
        previous = end_s
        for later in self.inflight:
            later.end_s = max(previous, later.launched_s) + later.predicted_s
            self.table.last_token_s[self._still_there(later)] = later.end_s
            previous = later.end_s
        return launch

    def _over(self, launch: Launch) -> np.ndarray:
        """No token of this launch is on its way any more; returns its rows that are still there."""
        rows = self._still_there(launch)
        self.table.inflight_tokens[rows] = np.maximum(self.table.inflight_tokens[rows] - 1, 0)
        return rows

    def _count_gaps(self, launch: Launch, end_s: float) -> None:
        """Take over when tokens were out, and who has missed a promise by it, each by its own rule (`core.slo`)."""
        table, rows = self.table, self._over(launch)
        before = table.token_s[rows]
        # who decodes has had a first token
        begun = before > -np.inf if launch.shape.extend else None
        if begun is not None and not begun.all():
            first = rows[~begun]
            table.first_token_s[first] = end_s
            # until the first token, `since_s` is the arrival
            table.lost[first] |= end_s > table.since_s[first] + table.ttft_s[first]
            rows, before, late = rows[begun], before[begun], first
        else:
            late = rows[:0]
        gap = end_s - before
        missed = gap > table.tbt_s[rows]
        table.gaps[rows] += 1
        table.missed_gaps[rows] += missed
        rule = table.gap_rule[rows]
        if rule.any():  # not all mean every gap
            table.lost[rows] |= missed & (rule == GapRule.EVERY)
            most = (table.gaps[rows] + table.expected_steps(rows)) // 100
            spent = (table.missed_gaps[rows] > most) | (gap > table.max_pause_s[rows])
            table.lost[rows] |= (rule == GapRule.P99) & spent
            paced = (rule == GapRule.PACE) & np.isfinite(table.tbt_s[rows])
            behind = end_s > table.first_token_s[rows] + table.out_tokens[rows] * table.tbt_s[rows]
            table.lost[rows] |= paced & behind
        else:
            table.lost[rows] |= missed
        everyone = np.concatenate((rows, late)) if len(late) else rows
        table.lost[everyone] |= end_s > table.e2e_by_s[everyone]
        table.out_tokens[everyone] += 1 + table.burst_tokens[everyone]
        table.burst_tokens[everyone] = 0
        table.last_token_s[everyone] = table.token_s[everyone] = table.since_s[everyone] = end_s

    def _still_there(self, launch: Launch) -> np.ndarray:
        """The launch's rows that belong to the same requests as when it was launched."""
        if launch.version == self._version:
            return launch.rows
        return launch.rows[self.table.seq[launch.rows] == launch.seqs]

    def drop_in_flight(self, row: int) -> None:
        """The request of `row` was taken out of the iterations on their way: no token will come from them."""
        for launch in self.inflight:
            if launch.version >= 0:
                launch.seqs = launch.seqs.copy()  # it may be the copy that is remembered for the batch
            launch.seqs[launch.rows == row] = -1
            launch.version = -1
        self.table.last_token_s[row] = self.table.token_s[row]
        self.table.inflight_tokens[row] = 0

    def ready_s(self, now_s: float) -> float:
        """When the iterations in flight are predicted to have ended, at least now."""
        return max(now_s, self.inflight[-1].end_s) if self.inflight else now_s


def attainable(
    slo: Slo, prompt_tokens: int, model: LatencyModel, cached_tokens: int = 0, verified: int = 1
) -> tuple[Slo, bool]:
    """The limits that a lone request of this size could meet on this hardware; the others become none.

    `cached_tokens` of the prompt need not be computed; a step computes `verified` tokens. What a mean of burst lengths
    makes of a mean time per token is not known of a request that has just come: every drafted token may be accepted.
    """
    c = model.coefficients
    alone_s = c.t0_extend + c.c_req + model.prefill_s(cached_tokens, max(prompt_tokens - cached_tokens, 1))
    decode_s = model.iteration_s(decode_shape(1, prompt_tokens, verified=verified))
    kept = replace(
        slo,
        ttft_s=slo.ttft_s if alone_s <= slo.ttft_s else np.inf,
        tbt_s=slo.tbt_s if decode_s <= slo.tbt_s else np.inf,
        tpot_s=slo.tpot_s if decode_s / verified <= slo.tpot_s else np.inf,
        e2e_s=slo.e2e_s if alone_s <= slo.e2e_s else np.inf,
    )
    return kept, kept != slo
