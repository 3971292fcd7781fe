"""SGLang's scheduler with deadlines: SGLang's own methods, each with ours called at the right moment. Thin.

Each iteration: receive requests and the tick -> SGLang merges what finished prefill into the running batch -> plan
-> SGLang's own code builds the planned batch -> launch. Whatever raises while planning hands this iteration to stock
scheduling. Here is nothing but overrides: what they call is built in `parts` and sees SGLang through `runtime.ports`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch

from sglang_slo import clock
from sglang_slo.config import SloConfig
from sglang_slo.core.latency import LatencyModel
from sglang_slo.estimator.service import LengthService
from sglang_slo.runtime.kv.host_pool import HostPool, make_host_pool
from sglang_slo.runtime.latency.shape import note_launch
from sglang_slo.runtime.latency.startup_profile import startup_model
from sglang_slo.runtime.ports import Tick
from sglang_slo.runtime.report import loads
from sglang_slo.runtime.report.request_times import JudgingStreamer, hearing
from sglang_slo.runtime.report.senders import naming
from sglang_slo.runtime.requests import batches, features, penalties
from sglang_slo.runtime.requests.lengths import ArrivingLengths, length_folder, vocabulary_of
from sglang_slo.runtime.scheduler import flags, news
from sglang_slo.runtime.scheduler.parts import build
from sglang_slo.runtime.scheduler.plan_log import PlanLog
from sglang_slo.runtime.scheduler.rank_sync import TickReceiver
from sglang_slo.runtime.sglang import kv, process

logger = logging.getLogger(__name__)

SWEEP_EVERY = 256  # iterations between looks for requests that left on a path of SGLang's own


class SloScheduler(stock.Scheduler):
    """A drop-in replacement of SGLang's scheduler. Settings come from the environment (`SloConfig.from_env`)."""

    if TYPE_CHECKING:  # SGLang sets these without saying what they are
        is_mixed_chunk: bool
        request_receiver: Any
        ipc_channels: Any
        output_streamer: Any
        load_inquirer: Any
        waiting_queue: list[Req]
        running_batch: ScheduleBatch
        last_batch: ScheduleBatch | None
        chunked_req: Req | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.slo_config = SloConfig.from_env() or SloConfig()
        self.slo_on = False  # until everything is built, SGLang schedules
        super().__init__(*args, **kwargs)
        self.slo_ranks = process.ranks(self)
        reason = flags.uncovered(self, self.slo_config)
        if reason:
            logger.warning("sglang-slo: stock scheduling: %s", reason)
            return
        # Where a pass has ended when its launch returns, its results are processed a whole pass later.
        self.slo_forward_blocks = getattr(self.tp_worker, "forward_blocks", self.device == "cpu")
        self.slo_mixed_chunk = self.is_mixed_chunk
        overlap = self.enable_overlap and not self.slo_forward_blocks
        parts = self.slo_parts = build(self, self.slo_config, startup_model(self), overlap)
        self.slo_ports, self.slo_news, self.slo_planning = parts.ports, parts.news, parts.planning
        self.slo_registry, self.slo_preempt, self.slo_pins = parts.ports.requests, parts.preempt, parts.pins
        self.slo_fit, self.slo_planner, self.slo_viewer = parts.fit, parts.planner, parts.viewer
        self.slo_observer, self.slo_reporter = parts.observer, parts.reporter
        self.slo_lengths, self.slo_lifecycle = parts.lengths, parts.lifecycle
        self._noting, self._gauges = parts.ports.trouble.noting, parts.gauges
        if parts.reporter is not None:
            self.ipc_channels = hearing(self.ipc_channels, parts.reporter.refused)
        self.metrics_reporter.scheduler = loads.Counted(self, self._waiting)
        self._plan_log = PlanLog(self.slo_ranks.tp_rank)
        self.slo_on = True
        if self.slo_ranks.attn_tp_rank == 0:
            logger.info("sglang-slo: scheduling by deadline")

    # -- asked for while the parts are built; the twin has its own

    def make_lengths(self) -> ArrivingLengths:
        """The predictor of output lengths, on the rank that broadcasts."""
        config = self.slo_config
        folder = length_folder(config, self.model_config.model_path, self.slo_ranks.dp_rank)
        service = LengthService(config, "child", folder, vocabulary=vocabulary_of(self.tokenizer))
        return ArrivingLengths(service, config)

    def make_host_pool(self) -> HostPool | None:
        """Host memory for swapped KV, if there is any to be had."""
        kv_pool = self.token_to_kv_pool_allocator.get_kvcache()
        return make_host_pool(kv_pool, self.slo_config.host_kv_gb, self.slo_ranks.tp_size)

    def slo_fell_back(self, error: Exception) -> None:
        """Stock scheduling takes this iteration: every flag it reads is as it would have left it."""
        self.is_mixed_chunk = self.slo_mixed_chunk
        self.slo_observer.fallback(error, self.slo_tick.now_s)

    # -- what others look at

    @property
    def slo_tick(self) -> Tick:
        """The last news from rank 0."""
        return self.slo_ports.agreed.tick

    @property
    def slo_model(self) -> LatencyModel:
        """The latency model in force."""
        return self.slo_ports.agreed.model

    @property
    def slo_split(self) -> ScheduleBatch | None:
        """A part of the running batch that was launched alone."""
        return self.slo_ports.iteration.split

    # -- in

    def init_ipc_channels(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's channels, with every answer named after the worker that waits for it."""
        super().init_ipc_channels(*args, **kwargs)
        self.ipc_channels = naming(self.ipc_channels)

    def init_load_inquirer(self) -> None:
        """SGLang's counts of requests, with those that are in none of its own places."""
        super().init_load_inquirer()
        self.load_inquirer = loads.counted(self.load_inquirer, self._running, self._waiting)

    def _running(self) -> list[Req]:
        if not self.slo_on:
            return self.running_batch.reqs
        return loads.running((self.running_batch, self.slo_split, self.last_batch), self.chunked_req)

    def _waiting(self) -> list[Req]:
        """Requests that wait for prefill or for their way back."""
        queue = self.waiting_queue
        return loads.waiting(queue, self.slo_preempt.alive, self._noting) if self.slo_on else queue

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
        """What this rank measured since the last tick."""
        return self.slo_news.make(requests) if self.slo_on else Tick(clock.now())

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Take the tick out of the list and SGLang's requests from the rest."""
        received, recv_reqs = recv_reqs, news.without_ticks(recv_reqs)
        if self.slo_on:
            with self._noting("a tick"):
                tick = news.in_one(received)
                if tick is not None or self.slo_ranks.tp_size == 1:
                    self.slo_news.take(tick or self.make_tick(recv_reqs))
            with self._noting("new weights"):
                if any(isinstance(r, news.WEIGHTS_CHANGE) for r in recv_reqs):
                    self.slo_preempt.weights_change()
        super().process_input_requests(recv_reqs)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self.slo_on:
            with self._noting("an arrival"):  # planning will try again, and leave it to stock scheduling
                self.slo_lifecycle.open(req)
                if is_retracted:
                    self.slo_preempt.retracted(req)
        super()._add_request_to_queue(req, is_retracted)

    # -- plan

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        """SGLang's step, with the plan made inside it (`get_new_batch_prefill`)."""
        if not self.slo_on:
            return super().get_next_batch_to_run(running_batch, last_batch)
        running_batch = self.slo_planning.rejoin(running_batch)
        self.slo_ports.iteration.plan = None
        chosen = super().get_next_batch_to_run(running_batch, last_batch)
        step = self.slo_planning.end(chosen, last_batch is not None)
        with self._noting("an iteration"):
            if self.slo_ports.iteration.plan is not None:
                self._plan_log.add(self.forward_ct, self.slo_tick.now_s, self.slo_ports.iteration.plan)
            if self.forward_ct % SWEEP_EVERY == 0:
                self.slo_lifecycle.sweep(step, self.slo_preempt)
        return step

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        """What was planned, else SGLang's own batch, in a state that it understands."""
        if not self.slo_on:
            return super().get_new_batch_prefill(running_batch)
        step = self.slo_planning.prefill(running_batch)
        return super().get_new_batch_prefill(self.slo_ports.iteration.running) if step is None else step

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
        if not self.slo_on:
            return super().update_running_batch(batch)
        with self._noting("penalties"):
            penalties.own(batch)
        return self.slo_planning.decode(batch, super().update_running_batch)

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Launch, and note when it is predicted to end."""
        result = super().run_batch(batch, *args, **kwargs)
        if self.slo_on:
            with self._noting("a launch"):
                note_launch(self.slo_registry, batch, self.forward_ct, self.slo_tick.now_s, self.slo_model)
            if self.slo_forward_blocks:
                self.slo_news.ended.append((self.forward_ct, clock.now()))
        return result

    # -- out

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """SGLang's processing, then the table's."""
        if not self.slo_on:
            return super().process_batch_result(batch, result)
        with features.made_true(batch, result, self._noting):
            super().process_batch_result(batch, result)
        if not self.slo_forward_blocks:
            self.slo_news.ended.append((batch.forward_iter, clock.now()))
        self.slo_planning.cached(batch, lambda req: kv.row_of(req) is None)
        self.slo_lifecycle.results(batch.reqs)
        with self._noting("gauges"):
            self.slo_observer.refresh(clock.now(), self._gauges)

    def abort_request(self, recv_req: Any) -> None:
        """SGLang's abort; rows of requests that were only waiting end at once."""
        super().abort_request(recv_req)
        if self.slo_on:
            with self._noting("an abort"):
                self.slo_preempt.abort(recv_req.rid, recv_req.abort_all)
                self.slo_lifecycle.sweep(None, self.slo_preempt)

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        """SGLang's; a server with requests on the host is not idle."""
        idle = bool(super().is_fully_idle(*args, **kwargs))
        return idle and (not self.slo_on or loads.nobody_away(lambda: self.slo_preempt.idle, self._noting))

    def flush_cache(self, empty_cache: bool = True) -> bool:
        """SGLang's flush; nothing may stay pinned in a tree that is cut down."""
        if self.slo_on:
            with self._noting("a flush"):
                self.slo_pins.release_all()
        return super().flush_cache(empty_cache)

    def pause_generation(self, recv_req: Any) -> Any:
        """SGLang's pause, over the whole running batch."""
        if self.slo_on:
            self.running_batch = self.slo_planning.rejoin(self.running_batch)
            if recv_req.mode == "retract":
                with self._noting("a pause"):
                    self.slo_preempt.release_device()
        return super().pause_generation(recv_req)

    # -- report

    def on_idle(self) -> None:
        """SGLang's housekeeping; who was aborted in the last batch ends, and the windows of the metrics go on sliding."""
        if self.slo_on and self.slo_registry.reqs:
            with self._noting("idleness"):
                self.slo_lifecycle.sweep(None, self.slo_preempt)
        super().on_idle()
        if self.slo_on:
            with self._noting("idleness"):
                self.slo_observer.refresh(clock.now(), self._gauges)

    def get_internal_state(self, recv_req: Any) -> Any:
        """SGLang's, with ours under `slo`."""
        answer = super().get_internal_state(recv_req)
        if self.slo_on:
            with self._noting("a snapshot"):
                answer.internal_state["slo"] = self.slo_observer.snapshot(clock.now(), self._gauges)
        return answer
