"""The seam: what of a scheduler is replaced so that it runs in virtual time.

`virtual(base)` makes a subclass of any scheduler class. Replaced are the model worker and its launch, the
sockets that requests come from and tokens go to, and what depends on the wall: the watchdog, and the child
process that trains the predictor of lengths (here it learns in the run itself). Event loop, scheduling, radix
cache, allocator, chunking, retraction and result processing stay the class's own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from sglang_slo.estimator.service import LengthService
from sglang_slo.runtime.requests.lengths import ArrivingLengths, length_folder
from sglang_slo.runtime.scheduler.planning import EVERYONE_DECODES
from sglang_slo.runtime.sglang import pools, process
from sglang_slo.twin import predictors
from sglang_slo.twin.sim import speculation
from sglang_slo.twin.sim.feeder import Feeder
from sglang_slo.twin.sim.host_pool import VirtualHostPool
from sglang_slo.twin.sim.planning_cost import KV_SHORT_SHARE, fitted
from sglang_slo.twin.sim.recorder import Recorder, request_id
from sglang_slo.twin.sim.worker import TwinWorker
from sglang_slo.twin.workloads.workload import Workload


class _Outlet:
    """In the place of the sockets to tokenizer and detokenizer: hears of tokens and of refusals."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.tokens_out = recorder.tokens_out

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Note a refusal; everything else is nobody's business here."""
        if type(output).__name__ == "AbortReq" and output.rid:
            self._recorder.refused(output.rid)


def _launch(self: Any, batch: Any, pp_proxy_tensors: Any = None) -> Any:
    """`Scheduler.run_batch` without what serves a device: streams, events, relay buffers, copies."""
    self.forward_ct += 1
    batch.forward_iter = self.forward_ct
    batch.launch_ts = time.monotonic()
    if not self.spec_algorithm.is_none():
        return speculation.launch(self, batch)
    # What resolving the inputs would have consumed:
    batch.prefill_input_ids_cpu = batch.mix_running_indices = None
    result = self.model_worker.forward_batch_generation(batch)
    batch.input_ids = None
    return result


def _pull(self: Any) -> list[Any]:
    """`SchedulerRequestReceiver._pull_raw_reqs`, from the feeder in the socket's place."""
    return self.recv_from_tokenizer.pull()


def _send(self: Any, reqs: list[Any], *_: Any, **__: Any) -> None:
    """`SchedulerOutputStreamer._stream_output_generation`, to the outlet in the socket's place."""
    self.send_to_detokenizer.tokens_out(reqs)


class _Virtual:
    """The replaced parts, mixed in before the scheduler class under test."""

    twin_workload: Workload
    twin_recorder: Recorder

    def init_tp_model_worker(self: Any) -> None:
        self.tp_worker = TwinWorker(**process.worker_arguments(self))
        self.tp_worker.recorder = self.twin_recorder

    def make_lengths(self: Any) -> Any:
        """Asked for by `SloScheduler`: a predictor that learns at once, from this run and `--slo-model-dir`.

        Or the one that the workload names, to which alone its true lengths may be told.
        """
        config, workload = self.slo_config, self.twin_workload
        folder = length_folder(config, "", None) if config.model_dir else None
        if workload.predictor is None:
            service: Any = LengthService(config, "inline", folder, seed=workload.seed)
        else:
            hidden = {request_id(i): int(n) for i, n in enumerate(workload.output_tokens)}
            service = predictors.make(workload.predictor, config, hidden, workload.seed, shifted_model=folder)
        return ArrivingLengths(service, config)

    def make_host_pool(self: Any) -> VirtualHostPool | None:
        """Asked for by `SloScheduler`."""
        gb = self.slo_config.host_kv_gb
        return VirtualHostPool(self.twin_recorder.engine, gb) if gb > 0 else None

    def init_ipc_channels(self: Any, port_args: Any) -> None:
        outlet = _Outlet(self.twin_recorder)
        self.recv_from_tokenizer = Feeder(self, self.twin_workload, self.twin_recorder)
        self.load_snapshot_writer = None
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=self.recv_from_tokenizer,
            recv_from_rpc=None,
            send_to_tokenizer=outlet,
            send_to_detokenizer=outlet,
            send_metrics_from_scheduler=None,
        )

    def get_new_batch_prefill(self: Any, running_batch: Any) -> Any:
        """SGLang's or ours; ours takes its time where there is something to plan."""
        running, waiting = len(running_batch.reqs), len(self.waiting_queue)
        kv_short = self._twin_free() < KV_SHORT_SHARE * self.max_total_num_tokens
        step = super().get_new_batch_prefill(running_batch)  # type: ignore[misc]
        ports = getattr(self, "slo_ports", None)
        plan = None if ports is None else ports.iteration.plan
        if plan is not None and plan is not EVERYONE_DECODES:
            self.twin_recorder.engine.spend(fitted().seconds(running, waiting, kv_short))
        return step

    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().run_batch(batch, *args, **kwargs)  # type: ignore[misc]
        self.twin_recorder.pool_state(self.max_total_num_tokens - self._twin_free(), len(self.waiting_queue))
        return result

    def _twin_free(self: Any) -> int:
        return pools.free_tokens(self.token_to_kv_pool_allocator, self.tree_cache)

    def process_batch_result(self: Any, batch: Any, result: Any) -> None:
        self.twin_recorder.engine.take_result(result.end_s)
        super().process_batch_result(batch, result)  # type: ignore[misc]


def virtual(base: type, workload: Workload, recorder: Recorder, watcher: type | None = None) -> type:
    """A subclass of `base` that runs `workload`, to be used inside `seam()`. `watcher`: a mixin of tests."""
    bases = tuple(b for b in (watcher, _Virtual, base) if b is not None)
    return type("Virtual" + base.__name__, bases, {"twin_workload": workload, "twin_recorder": recorder})


@contextlib.contextmanager
def seam() -> Iterator[None]:
    """While it is open, SGLang's launch, receipt and sending go to the twin, below whatever wraps them."""
    with (
        mock.patch.object(stock.Scheduler, "run_batch", _launch),
        mock.patch.object(SchedulerRequestReceiver, "_pull_raw_reqs", _pull),
        mock.patch.object(SchedulerOutputStreamer, "_stream_output_generation", _send),
        mock.patch.object(stock, "create_scheduler_watchdog", lambda *_, **__: None),
    ):
        yield
