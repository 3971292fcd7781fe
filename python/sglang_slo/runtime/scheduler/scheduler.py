"""SGLang's scheduler with deadlines: builds a view, asks `core` for a plan, applies it. Thin.

Each iteration: receive requests and the tick -> SGLang merges what finished prefill into the running batch -> plan
-> SGLang's own code builds the planned batch (`admission`) -> launch. Whatever raises while planning hands this
iteration to stock scheduling. Batches, KV pool, radix cache and results stay SGLang's.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct
from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.core.plan import IterationPlan, Planner
from sglang_slo.core.slo import BEST_EFFORT
from sglang_slo.estimator.service import LengthService
from sglang_slo.observe.observer import Observer
from sglang_slo.runtime.kv.host_pool import HostPool, make_host_pool
from sglang_slo.runtime.kv.preempt import Preemptor
from sglang_slo.runtime.kv.prefix_pins import Pins
from sglang_slo.runtime.kv.prefixes import PrefixGroups
from sglang_slo.runtime.latency.online_fit import OnlineFit
from sglang_slo.runtime.latency.shape import batch_shape, token_getters
from sglang_slo.runtime.latency.startup_profile import startup_model
from sglang_slo.runtime.report import loads
from sglang_slo.runtime.report.gauges import gauges
from sglang_slo.runtime.report.request_times import HearingSender, JudgingStreamer, Reporter, metric_labels
from sglang_slo.runtime.report.senders import naming
from sglang_slo.runtime.requests import batches, features, penalties
from sglang_slo.runtime.requests.lengths import ArrivingLengths, length_folder, vocabulary_of
from sglang_slo.runtime.requests.registry import Launch, RequestBook
from sglang_slo.runtime.scheduler.applier import Applier
from sglang_slo.runtime.scheduler.flags import uncovered
from sglang_slo.runtime.scheduler.plan_log import PlanLog
from sglang_slo.runtime.scheduler.rank_sync import Tick, TickReceiver
from sglang_slo.runtime.scheduler.viewer import Viewer
from sglang_slo.server.limits import LimitError, received_s, slo_of

logger = logging.getLogger(__name__)

WEIGHTS_CHANGE = (
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
)

MOST_PINNED_SHARE = 0.25  # of the pool may be kept for requests that wait
LOW_POOL_SHARE = 0.05  # with less of the pool free or evictable than this, nothing is kept for them
OLDEST_ARRIVAL_S = 600.0  # an arrival time further back is another host's clock
LENGTHS_EVERY = 16  # iterations without arrivals between looks at the load and at how learning goes
EVERYONE_DECODES = IterationPlan()  # the plan of an iteration in which there is nothing to decide
MOST_ENDED = 1024  # measured ends of iterations that wait for a tick
STAY_SHARE = 0.1  # of the time that an overdue request waited, it is left alone once it is in
MOST_IDLE_PLANS = 8  # in a row that give an idle device nothing to do while somebody waits
SWEEP_EVERY = 256  # iterations between looks for requests that left on a path of SGLang's own


class IdlePlanError(RuntimeError):
    """Plan after plan leaves the device idle though somebody waits."""


class SloScheduler(stock.Scheduler):
    """A drop-in replacement of SGLang's scheduler. Settings come from the environment (`SloConfig.from_env`)."""

    if TYPE_CHECKING:  # SGLang sets these without saying what they are
        is_mixed_chunk: bool
        request_receiver: Any
        ipc_channels: Any
        output_streamer: Any
        policy: Any
        waiting_queue: list[Req]
        running_batch: ScheduleBatch
        last_batch: ScheduleBatch | None
        chunked_req: Req | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.slo_config = SloConfig.from_env() or SloConfig()
        self.slo_on = False  # until everything is built, SGLang schedules
        super().__init__(*args, **kwargs)
        reason = uncovered(self, self.slo_config)
        if reason:
            logger.warning("sglang-slo: stock scheduling: %s", reason)
            return
        self.slo_model = startup_model(self)
        # Where a pass has ended when its launch returns, its results are processed a whole pass later.
        self.slo_forward_blocks = getattr(self.tp_worker, "forward_blocks", self.device == "cpu")
        overlap = self.enable_overlap and not self.slo_forward_blocks
        self.slo_fit = OnlineFit(self.slo_model, overlap, log=self.ps.attn_tp_rank == 0)
        self.slo_book = RequestBook(self.slo_config)
        self.slo_planner = Planner(self.slo_config)
        self.slo_preempt = Preemptor(self, self.make_host_pool())
        self.slo_viewer, self.slo_applier = Viewer(self), Applier(self)
        self.slo_tick = Tick(clock.now(), confidence=self.slo_config.confidence_high)
        # taken by ticks, which only the rank that broadcasts makes: on the others the oldest fall out
        self.slo_ended: deque[tuple[int, float]] = deque(maxlen=MOST_ENDED)
        self.slo_plan: IterationPlan | None = None
        self.slo_running: ScheduleBatch = self.running_batch  # as it is at this moment of planning
        self.slo_step: NextBatchPlan | None = None  # what this planning has built
        self._idle_plans = 0
        self.slo_split: ScheduleBatch | None = None  # a part of the running batch that was launched alone
        rank0 = self.ps.attn_tp_rank == 0
        dp_rank = self.ps.dp_rank if self.server_args.dp_size > 1 else None
        self.slo_observer = Observer(self.slo_config, rank0, metric_labels(self), dp_rank)
        self.slo_reporter = Reporter(self.slo_observer, self.slo_config.request_log_text) if rank0 else None
        if self.slo_reporter is not None:
            hearing = HearingSender(self.ipc_channels.send_to_tokenizer, self.slo_reporter.refused)
            self.ipc_channels = replace(self.ipc_channels, send_to_tokenizer=hearing)
        self.slo_plan_s = 0.0  # time it took to plan the last iteration
        self.slo_lengths = self.make_lengths() if rank0 else None
        self.slo_mixed_chunk = self.is_mixed_chunk
        most_pinned = int(MOST_PINNED_SHARE * self.max_total_num_tokens)
        self.slo_next_in_line: list[int] = []
        self.slo_pins = Pins(
            self.tree_cache, self.slo_book.table, most_pinned, self.slo_viewer.look_up_prefix
        )
        self.slo_prefixes = PrefixGroups()
        self.slo_book.closing = self._closing
        self.metrics_reporter.scheduler = loads.Counted(self)
        self._gauges = partial(gauges, self)
        self._plan_log = PlanLog(self.ps.tp_rank)
        self.slo_on = True
        if rank0:
            logger.info("sglang-slo: scheduling by deadline")

    def make_lengths(self) -> ArrivingLengths:
        """The predictor of output lengths, on the rank that broadcasts."""
        config = self.slo_config
        folder = length_folder(config, self.model_config.model_path, self.ps.dp_rank)
        service = LengthService(config, "child", folder, vocabulary=vocabulary_of(self.tokenizer))
        return ArrivingLengths(service, config.confidence_low, config.confidence_high)

    def make_host_pool(self) -> HostPool | None:
        """Host memory for swapped KV, if there is any to be had."""
        kv_pool = self.token_to_kv_pool_allocator.get_kvcache()
        return make_host_pool(kv_pool, self.slo_config.host_kv_gb, self.ps.tp_size)

    # -- in

    def init_ipc_channels(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's channels, with every answer named after the worker that waits for it."""
        super().init_ipc_channels(*args, **kwargs)
        self.ipc_channels = naming(self.ipc_channels)

    def init_load_inquirer(self) -> None:
        """SGLang's counts of requests, with those that are in none of its own places."""
        super().init_load_inquirer()
        self.load_inquirer = loads.counted(self)

    def init_request_receiver(self) -> None:
        """SGLang's receiver, with ticks."""
        super().init_request_receiver()
        self.request_receiver = TickReceiver.wrapping(self.request_receiver, self.make_tick)

    def init_output_streamer(self) -> None:
        """SGLang's streamer, with requests timed and judged as their tokens leave."""
        super().init_output_streamer()
        self.output_streamer = JudgingStreamer.wrapping(self.output_streamer, self._report)

    def _report(self, reqs: Iterable[Req]) -> None:
        if self.slo_on and self.slo_reporter is not None:
            with self._noting("tokens"):
                self.slo_reporter.streamed(reqs)

    def make_tick(self, requests: list[Any]) -> Tick:
        """What this rank measured since the last tick; called on the rank whose requests are broadcast."""
        if not self.slo_on:
            return Tick(clock.now())
        try:
            return self._news(requests)
        except Exception as error:
            self._failed("a tick", error)
            return Tick(clock.now(), confidence=self.slo_tick.confidence)

    def _news(self, requests: list[Any]) -> Tick:
        now = clock.now()
        ended = list(self.slo_ended)
        self.slo_ended.clear()
        lengths, quantiles, revised = self.slo_lengths, {}, {}
        confidence = self.slo_tick.confidence
        if lengths is not None and (requests or self.forward_ct % LENGTHS_EVERY == 0):
            try:
                quantiles = lengths.predict(requests)
                confidence = lengths.confidence(now, len(quantiles), len(self.waiting_queue))
                revised = lengths.revised()
            except Exception as error:
                self._failed("lengths", error)
        return Tick(
            now,
            ended,
            self.slo_fit.maybe_refit(),
            quantiles | revised,
            bool(revised),
            confidence,
            self.slo_preempt.measured(),
            vote=self.slo_preempt.line is not None and self.slo_preempt.line.votes(),
            lengths_trusted=lengths is not None and lengths.gate.trusted,
        )

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Take the tick out of the list and SGLang's requests from the rest."""
        tick = None
        if recv_reqs and isinstance(recv_reqs[-1], Tick):
            tick = recv_reqs.pop()
        elif any(isinstance(r, Tick) for r in recv_reqs):
            tick = next(r for r in recv_reqs if isinstance(r, Tick))
            recv_reqs = [r for r in recv_reqs if not isinstance(r, Tick)]
        elif self.ps.tp_size == 1:
            tick = self.make_tick(recv_reqs)
        if self.slo_on and tick is not None:
            try:
                self._take(tick)
            except Exception as error:
                self._failed("a tick", error)
        if self.slo_on and any(isinstance(r, WEIGHTS_CHANGE) for r in recv_reqs):
            with self._noting("new weights"):
                self.slo_preempt.weights_change()
        super().process_input_requests(recv_reqs)

    def _take(self, tick: Tick) -> None:
        self.slo_tick = tick
        if tick.vote and self.slo_preempt.line is not None:
            self.slo_preempt.line.vote()
        for iteration, end_s in tick.ended:
            launch = self.slo_book.ended(iteration, end_s)
            if launch is not None:
                self.slo_fit.add(launch)
        if tick.revised:
            for row, req in self.slo_book.reqs.items():
                if req.rid in tick.log_quantiles:
                    self.slo_book.predicted(row, tick.log_quantiles[req.rid], tick.confidence)
        if tick.model is not None or tick.swap is not None:
            self.slo_model = self.slo_preempt.priced(tick.model or self.slo_model, tick.swap)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self.slo_on:
            try:
                self.slo_open(req)
                if is_retracted:
                    self.slo_preempt.retracted(req)
            except Exception as error:
                # planning will try again, and leave it to stock scheduling if that fails
                self._failed("an arrival", error)
        super()._add_request_to_queue(req, is_retracted)

    def slo_open(self, req: Req) -> None:
        """Give a request its row; one that comes back (preempted, retracted) keeps it."""
        new = req.slo_row < 0
        now, custom = self.slo_tick.now_s, req.sampling_params.custom_params
        try:
            slo, told_s = slo_of(custom, self.slo_config), received_s(custom)
        except LimitError as error:  # HTTP refuses these at the door; an offline caller is told in the log
            slo, told_s = BEST_EFFORT, None
            self.slo_observer.trouble.happened("a limit could not be read: best effort", now, error)
        sent_s = req.time_stats.created_time if told_s is None else told_s
        # all of these are the host's monotone clock; what comes from another host counts from now
        arrival_s = sent_s if 0 < sent_s <= now < sent_s + OLDEST_ARRIVAL_S else now
        cached = self.slo_viewer.cached_tokens(req) if new else 0
        self.slo_book.open(req, slo, arrival_s, self.slo_model, cached)
        quantiles = self.slo_tick.log_quantiles.get(req.rid)
        if new and quantiles is not None:
            self.slo_book.predicted(req.slo_row, quantiles, self.slo_tick.confidence)
            table, row = self.slo_book.table, req.slo_row
            req.slo_predicted_tokens = float(table.expected_tokens[row])
            req.slo_bound_tokens = float(table.remaining_tokens[row])
        if new and self.slo_reporter is not None:
            self.slo_reporter.opened(req, arrival_s, now)
            if self.slo_config.request_log and self.slo_lengths is not None:
                req.slo_features = self.slo_lengths.for_log(req.rid)
        self.slo_viewer.look_up_prefix(req)
        if new:
            self.slo_book.table.prefix_group[req.slo_row] = self.slo_prefixes.opened(req)
            self.slo_viewer.arrived(req)

    # -- plan

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        """SGLang's step, with the plan made inside it (`get_new_batch_prefill`)."""
        if not self.slo_on:
            return super().get_next_batch_to_run(running_batch, last_batch)
        running_batch = self._rejoin(running_batch)
        self.slo_plan = None
        step = super().get_next_batch_to_run(running_batch, last_batch)
        self._settle()
        if self.slo_split is not None:
            step = NextBatchPlan(batch_to_run=self.slo_split, running_batch=step.running_batch)
        self._watch(step, last_batch)
        with self._noting("an iteration"):
            if self.slo_plan is not None:
                self._plan_log.add(self.forward_ct, self.slo_tick.now_s, self.slo_plan)
            if self.forward_ct % SWEEP_EVERY == 0:
                self._sweep(step)
        return step

    def _watch(self, step: NextBatchPlan, last_batch: ScheduleBatch | None) -> None:
        """Count plannings in a row that leave an idle device idle while somebody waits (`get_new_batch_prefill` reads it)."""
        idle = step.batch_to_run is None and last_batch is None and not getattr(self, "result_queue", ())
        somebody = self.waiting_queue or self.chunked_req is not None or not step.running_batch.is_empty()
        self._idle_plans = self._idle_plans + 1 if idle and somebody else 0

    def _settle(self) -> None:
        """This iteration's victims wait for prefill from now on."""
        back, self.slo_preempt.leaving = self.slo_preempt.leaving, []
        self.waiting_queue.extend(back)
        for req in back:
            with self._noting("a victim"):
                self.slo_preempt.requeued(req)

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Around bookkeeping: what raises there is counted and logged; it never stops serving."""
        try:
            yield
        except Exception as error:
            self._failed(what, error)

    def _sweep(self, step: NextBatchPlan | None) -> None:
        """End the rows of requests that are nowhere any more."""
        for req in self.slo_book.sweep(self._alive(step)):
            self.slo_gone(req)
            if self.slo_reporter is not None:
                self.slo_reporter.ended(req, clock.now())

    def _closing(self, req: Req) -> None:
        """A request's row is given back."""
        row = req.slo_row
        self.slo_pins.release(row)
        self.slo_prefixes.closed(req.rid, int(self.slo_book.table.prefix_group[row]))

    def slo_gone(self, req: Req) -> None:
        """A request has left: what was kept of it for learning is learnt from, or forgotten."""
        if self.slo_lengths is not None:
            self.slo_lengths.ended(req)

    def _rejoin(self, running_batch: ScheduleBatch) -> ScheduleBatch:
        """The running batch with the part that was launched alone."""
        part = self.slo_split
        if part is None:
            return running_batch
        try:
            running_batch = batches.merged(running_batch, part)
        except Exception as error:
            self._failed("a part that was launched alone", error)
            part.filter_batch()
            if running_batch.is_empty():
                running_batch = part
            elif not part.is_empty():
                running_batch.merge_batch(part)
        self.slo_split = None
        return running_batch

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        """Plan, carry out what concerns KV, then let SGLang build the planned prefill batch.

        Whatever raises before the first change leaves the iteration to stock scheduling, in a state that it understands.
        """
        if not self.slo_on:
            return super().get_new_batch_prefill(running_batch)
        self.slo_running, self.slo_step = running_batch, None
        try:
            if self._idle_plans >= MOST_IDLE_PLANS:
                self._idle_plans = 0
                raise IdlePlanError(f"{len(self.waiting_queue)} requests wait, and nothing runs")
            return self._planned_step(running_batch)
        except Exception as error:
            self._fall_back(error)
            if self.slo_step is not None:  # it was built, and its requests are in it
                return self.slo_step
            self.slo_running.batch_is_full = False
            return super().get_new_batch_prefill(self.slo_running)

    def _planned_step(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        began_s = clock.now()
        if self._nothing_to_decide(running_batch):
            self.slo_plan = EVERYONE_DECODES
            self.slo_plan_s = clock.now() - began_s
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        running_batch.filter_batch()
        self.slo_preempt.arrived(running_batch)
        plan = self._make_plan(self.slo_running)
        self._carry_out(plan)
        self.slo_plan = plan
        planned = {
            self.slo_book.reqs[row]: tokens for row, tokens in plan.prefill if row in self.slo_book.reqs
        }
        self.slo_plan_s = clock.now() - began_s
        if not plan.prefill:
            return NextBatchPlan(batch_to_run=None, running_batch=self.slo_running)
        return self.slo_applier.prefill(plan, planned, self.slo_running)

    def _carry_out(self, plan: IterationPlan) -> None:
        """Victims out, then returns begun, then whom to refuse; `slo_running` follows at the moment of each change."""
        if plan.victims:
            with self._noting("preemption"):
                self.slo_preempt.preempt(plan.victims, self.slo_running)
        if plan.park_chunked:
            with self._noting("parking"):
                self.slo_preempt.park()
        if plan.returns:
            with self._noting("a return from the host"):
                self.slo_preempt.bring_back(plan.returns, self.slo_running)
        if plan.shed or plan.hopeless:
            with self._noting("refusing"):
                self.slo_applier.refuse(plan.shed, plan.hopeless)

    def _nothing_to_decide(self, running_batch: ScheduleBatch) -> bool:
        """Nobody waits, KV is ample, and everyone can decode in time: most iterations, told at little cost."""
        if self.waiting_queue or self.chunked_req is not None or running_batch.is_empty():
            return False
        if self.grammar_manager.has_waiting_grammars() or not self.slo_preempt.at_rest(running_batch):
            return False
        book = self.slo_book
        seen = book.seen(running_batch.reqs)
        base_s = book.base_s(self.slo_tick.now_s)
        if not (seen.whole and self.slo_planner.all_decode(book.table, seen.rows, base_s, self.slo_model)):
            return False
        self.slo_next_in_line = []
        if len(self.slo_pins):
            self.slo_pins.release_all()
        return True

    def _make_plan(self, running_batch: ScheduleBatch) -> IterationPlan:
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        for req in self.slo_prefixes.stale():
            if req.slo_row >= 0 and req is not self.chunked_req:
                self.slo_viewer.look_up_prefix(req)
        # before anything is counted on: what is pinned cannot be evicted for this iteration's chunks
        self._pin_next()
        plan = self.slo_planner.plan(self.slo_viewer.view(running_batch))
        self.slo_next_in_line = plan.next_in_line
        self.slo_book.table.deferrals[plan.deferred] += 1
        if plan.overdue >= 0:
            stays_s = STAY_SHARE * (self.slo_config.lost_wait_s or 0.0)
            self.slo_book.table.stays_until_s[plan.overdue] = self.slo_tick.now_s + stays_s
        for row, _ in plan.prefill:
            self.slo_pins.release(row)
        return plan

    def _pin_next(self) -> None:
        if not self.slo_next_in_line and not len(self.slo_pins):
            return
        free = self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size()
        if free < LOW_POOL_SHARE * self.max_total_num_tokens:
            self.slo_pins.release_all()
            return
        reqs = self.slo_book.reqs
        cut = -1 if self.chunked_req is None else self.chunked_req.slo_row
        self.slo_pins.keep([reqs[row] for row in self.slo_next_in_line if row in reqs and row != cut])

    def _fall_back(self, error: Exception) -> None:
        self.slo_plan = None
        self.is_mixed_chunk = self.slo_mixed_chunk
        self.slo_observer.fallback(error, self.slo_tick.now_s)

    # -- apply

    def _get_new_batch_prefill_raw(self, *args: Any, **kwargs: Any) -> tuple[Any, ScheduleBatch]:
        """SGLang's building of a prefill batch, with what it takes for granted of mixed ones made true."""
        if self.slo_on:
            with self._noting("penalties"):
                penalties.own(kwargs["running_batch"] if "running_batch" in kwargs else args[1])
        batch, running_batch = super()._get_new_batch_prefill_raw(*args, **kwargs)
        if batch is not None and self.slo_on:
            with self._noting("prefixes of a mixed batch"):
                batches.correct_prefixes(batch)
            with self._noting("penalties"):
                penalties.rebuild(batch, len(batch.reqs) - len(batch.decoding_reqs or ()))
        return batch, running_batch

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        """Decode: all of the running batch, or the part of it that the plan names."""
        plan = self.slo_plan if self.slo_on else EVERYONE_DECODES
        if self.slo_on:
            with self._noting("penalties"):
                penalties.own(batch)
        if plan is EVERYONE_DECODES:
            return super().update_running_batch(batch)
        with self._noting("room before decoding"):
            self.slo_preempt.before_decode(batch)
        if plan is None or plan.decode is None:
            return super().update_running_batch(batch)
        try:
            part, rest = batches.divide(batch, plan.decode)
        except Exception as error:
            self._fall_back(error)
            return super().update_running_batch(batch)
        part = super().update_running_batch(part)
        if part is not None and not part.is_empty():
            self.slo_split = part
        return rest

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Launch, and note when it is predicted to end."""
        if not self.slo_on:
            return super().run_batch(batch, *args, **kwargs)
        result = super().run_batch(batch, *args, **kwargs)
        with self._noting("a launch"):
            self._note_launch(batch)
        if self.slo_forward_blocks:
            self.slo_ended.append((self.forward_ct, clock.now()))
        return result

    def _note_launch(self, batch: ScheduleBatch) -> None:
        shape, book = batch_shape(batch), self.slo_book
        now, predicted = self.slo_tick.now_s, self.slo_model.iteration_s(shape)
        seen = book.seen(token_getters(batch))
        rows, seqs = seen.rows, seen.seqs
        if not seen.whole:
            rows, seqs = rows[rows >= 0], seqs[rows >= 0]
        end_s = book.base_s(now) + predicted
        book.launch(Launch(self.forward_ct, rows, seqs, shape, now, predicted, end_s))

    def _failed(self, what: str, error: Exception) -> None:
        """Bookkeeping that fails is counted and logged; it never stops serving."""
        try:
            self.slo_observer.trouble.happened(f"noting {what} failed", clock.now(), error)
        except Exception:
            logger.exception("sglang-slo: noting %s failed, and so did telling of it", what)

    # -- out

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """SGLang's processing, then the table's."""
        again = features.prefilled_again(batch) if self.slo_on else []
        super().process_batch_result(batch, result)
        features.drop_repeated(again)
        if self.slo_on:
            now = clock.now()
            if not self.slo_forward_blocks:
                self.slo_ended.append((batch.forward_iter, now))
            with self._noting("results"):
                self._cached(batch)
                for req in self.slo_book.tokens_out(batch.reqs):
                    self.slo_gone(req)
                self.slo_observer.refresh(now, self._gauges)

    def _cached(self, batch: ScheduleBatch) -> None:
        """Those who wait with the same beginning as one that was just computed are looked up again."""
        if batch.forward_mode.is_extend() and self.waiting_queue:
            table = self.slo_book.table
            done = [(req, int(table.prefix_group[req.slo_row])) for req in batch.reqs if req.slo_row >= 0]
            self.slo_prefixes.computed(done, lambda req: req.req_pool_idx is None)

    def abort_request(self, recv_req: Any) -> None:
        """SGLang's abort; rows of requests that were only waiting end at once."""
        super().abort_request(recv_req)
        if self.slo_on:
            with self._noting("an abort"):
                self.slo_preempt.abort(recv_req.rid, recv_req.abort_all)
                self._sweep(None)

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        """SGLang's; a server with requests on the host is not idle."""
        idle = super().is_fully_idle(for_health_check)
        return idle and (not self.slo_on or self.slo_preempt.idle)

    def flush_cache(self, empty_cache: bool = True) -> bool:
        """SGLang's flush; nothing may stay pinned in a tree that is cut down."""
        if self.slo_on:
            with self._noting("a flush"):
                self.slo_pins.release_all()
        return super().flush_cache(empty_cache)

    def pause_generation(self, recv_req: Any) -> Any:
        """SGLang's pause, over the whole running batch."""
        if self.slo_on:
            self.running_batch = self._rejoin(self.running_batch)
            if recv_req.mode == "retract":
                with self._noting("a pause"):
                    self.slo_preempt.release_device()
        return super().pause_generation(recv_req)

    # -- report

    def on_idle(self) -> None:
        """SGLang's housekeeping; the windows of the metrics go on sliding."""
        if self.slo_on and self.slo_book.reqs:
            with self._noting("idleness"):
                self._sweep(
                    None
                )  # who was aborted while still in the last batch; no iteration may come for long
        super().on_idle()
        if self.slo_on:
            with self._noting("idleness"):
                self.slo_observer.refresh(clock.now(), self._gauges)

    def get_internal_state(self, recv_req: Any) -> Any:
        """SGLang's, with ours under `slo`."""
        answer = super().get_internal_state(recv_req)
        if self.slo_on:
            answer.internal_state["slo"] = self.slo_observer.snapshot(clock.now(), self._gauges)
        return answer

    def _alive(self, step: NextBatchPlan | None) -> Iterator[Req]:
        found = [self.running_batch, self.last_batch, self.slo_split]
        if step is not None:
            found += [step.batch_to_run, step.running_batch]
        for batch in found:
            if batch is not None:
                yield from batch.reqs
        yield from self.waiting_queue
        yield from self.slo_preempt.alive()
        if self.chunked_req is not None:
            yield self.chunked_req
        for batch, _ in getattr(self, "result_queue", ()):
            yield from batch.reqs
