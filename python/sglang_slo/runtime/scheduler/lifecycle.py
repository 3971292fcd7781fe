"""A request's way through the books: its row when it comes, what is told and learnt of it when it goes.

Whoever keeps something by request is told from here: the table, the reporter, the predictor of lengths, pins, groups of
prefixes. A request that left on a path of SGLang's own is found by a sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sglang_slo import clock
from sglang_slo.core.slo import BEST_EFFORT
from sglang_slo.runtime.sglang import kv
from sglang_slo.server.limits import LimitError, received_s, slo_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import NextBatchPlan, Req

    from sglang_slo.observe.judge import Finish
    from sglang_slo.runtime.kv.held import HeldPrefills
    from sglang_slo.runtime.kv.look_up import PrefixLookUp
    from sglang_slo.runtime.kv.preempt import Preemptor
    from sglang_slo.runtime.kv.prefix_pins import Pins
    from sglang_slo.runtime.kv.prefixes import PrefixGroups
    from sglang_slo.runtime.ports import Ports
    from sglang_slo.runtime.report.request_times import Reporter
    from sglang_slo.runtime.requests.lengths import ArrivingLengths
    from sglang_slo.runtime.scheduler.viewer import Viewer

OLDEST_ARRIVAL_S = 600.0  # an arrival time further back is another host's clock


class Lifecycle:
    """Opens and closes requests. `reporter`, `lengths`: on the ranks that have them."""

    def __init__(
        self,
        ports: Ports,
        look_up: PrefixLookUp,
        groups: PrefixGroups,
        pins: Pins,
        held: HeldPrefills,
        reporter: Reporter | None,
        lengths: ArrivingLengths | None,
    ) -> None:
        self._ports, self._look_up, self._groups, self._pins = ports, look_up, groups, pins
        self._held, self._reporter, self._lengths = held, reporter, lengths
        self.viewer: Viewer  # counts arrivals; it opens those that came in unseen, so each knows the other
        ports.requests.closing = self._closing

    def open(self, req: Req) -> None:
        """Give a request its row; one that comes back (preempted, retracted) keeps it."""
        new = req.slo_row < 0
        if new:
            _refuse_empty(req)
        self._given_a_row(req, self._look_up.cached_tokens(req) if new else 0)
        self._look_up.look_up(req)
        if new:
            self._ports.requests.table.prefix_group[req.slo_row] = self._groups.opened(req)
            self.viewer.arrived(req)

    def open_begun(self, req: Req) -> None:
        """Give its row to a request that stock scheduling has begun: where it could have none when it came.

        What it holds is not looked up again, and the times of its tokens count from now.
        """
        try:
            self._given_a_row(req, kv.prefix_tokens(req))
        finally:  # it is not asked for again once there is a row
            if req.slo_row >= 0:
                self._ports.requests.table.goes_on(req.slo_row, self._ports.agreed.now_s)

    def _given_a_row(self, req: Req, cached_tokens: int) -> None:
        p, new = self._ports, req.slo_row < 0
        now, custom = p.agreed.now_s, req.sampling_params.custom_params
        try:
            slo, told_s = slo_of(custom, p.settings), received_s(custom)
        except LimitError as error:  # HTTP refuses these at the door; an offline caller is told in the log
            slo, told_s = BEST_EFFORT, None
            p.trouble.happened("a limit could not be read: best effort", error)
        sent_s = req.time_stats.created_time if told_s is None else told_s
        # all of these are the host's monotone clock; what comes from another host counts from now
        arrival_s = sent_s if 0 < sent_s <= now < sent_s + OLDEST_ARRIVAL_S else now
        p.requests.open(req, slo, arrival_s, p.agreed.model, cached_tokens)
        if new:
            self._predicted(req)
            self._tell(req, arrival_s)

    def _predicted(self, req: Req) -> None:
        requests, tick = self._ports.requests, self._ports.agreed.tick
        quantiles = tick.log_quantiles.get(req.rid)
        if quantiles is not None:
            requests.predicted(req.slo_row, quantiles, tick.confidence)
            req.slo_predicted_tokens = float(requests.table.expected_tokens[req.slo_row])
            req.slo_bound_tokens = float(requests.table.remaining_tokens[req.slo_row])

    def _tell(self, req: Req, arrival_s: float) -> None:
        if self._reporter is None:
            return
        self._reporter.opened(req, arrival_s, self._ports.agreed.now_s)
        if self._ports.settings.request_log and self._lengths is not None:
            req.slo_features = self._lengths.for_log(req.rid)

    def _closing(self, req: Req) -> None:
        """A request's row is given back."""
        noting, row = self._ports.trouble.noting, req.slo_row
        with noting("a pin"):
            self._pins.release(row)
        with noting("a held prefill"):
            self._held.over(req)
        with noting("a shared prefix"):
            self._groups.closed(req.rid, int(self._ports.requests.table.prefix_group[row]))

    def gone(self, req: Req) -> None:
        """A request has left: what was kept of it for learning is learnt from, or forgotten."""
        if self._lengths is not None:
            self._lengths.ended(req)

    def results(self, reqs: list[Req]) -> None:
        """The results of an iteration were processed: some of its requests may have ended."""
        with self._ports.trouble.noting("results"):
            for req in self._ports.requests.tokens_out(reqs):
                self.gone(req)

    def refused(self, req: Req, finish: Finish) -> None:
        """A request was refused while it waited, or could not be served."""
        self.gone(req)
        if self._reporter is not None:
            self._reporter.ended(req, clock.now(), finish)

    def sweep(self, step: NextBatchPlan | None, preempt: Preemptor) -> None:
        """End the rows of requests that are nowhere any more."""
        for req in self._ports.requests.sweep(self._alive(step, preempt)):
            self.gone(req)
            if self._reporter is not None:
                self._reporter.ended(req, clock.now())

    def _alive(self, step: NextBatchPlan | None, preempt: Preemptor) -> Iterator[Req]:
        waiting = self._ports.waiting
        found: Iterable = [*self._ports.batches.all(), self._ports.iteration.split]
        if step is not None:
            found = [*found, step.batch_to_run, step.running_batch]
        for batch in found:
            if batch is not None:
                yield from batch.reqs
        yield from waiting.reqs
        yield from preempt.alive()
        if waiting.cut is not None:
            yield waiting.cut


def _refuse_empty(req: Req) -> None:
    """What has no tokens, a session's history included, and came past the door: a pass over none ends the scheduler.

    SGLang 0.5.23 refuses such a turn of a session itself.
    """
    if not len(req.origin_input_ids) and req.input_embeds is None:
        req.set_finish_with_abort("the prompt has no tokens: need at least one")
