"""Runs a real SGLang scheduler in virtual time: `run(workload, "stock" | "slo", argv)` -> `RunResult`.

One code path for every scheduler class: a subclass made on the spot replaces the model worker, the request
receiver, the output, and nothing else; the event loop, the scheduling, the radix cache, the allocator,
chunking and retraction are the class's own. The clock (`sglang_slo.clock`) is the virtual engine's.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import sglang_slo.twin.platform as twin_platform

twin_platform.settle()

import torch  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer  # noqa: E402
from sglang.srt.runtime_context import publish  # noqa: E402
from sglang.srt.server_args import PortArgs, ServerArgs  # noqa: E402

from sglang_slo import clock, config  # noqa: E402
from sglang_slo.config import SloConfig  # noqa: E402
from sglang_slo.core.slo import SloClass  # noqa: E402
from sglang_slo.twin.engine import VirtualEngine  # noqa: E402
from sglang_slo.twin.feeder import Feeder  # noqa: E402
from sglang_slo.twin.recorder import Recorder  # noqa: E402
from sglang_slo.twin.result import RunResult  # noqa: E402
from sglang_slo.twin.worker import TwinWorker, write_model  # noqa: E402
from sglang_slo.twin.workload import Workload  # noqa: E402

CONTEXT_STEP = 8192
SCHEDULERS = ("slo", "stock")


class _Output(SchedulerOutputStreamer):
    """In the place of the sockets: tells the recorder which requests got tokens."""

    recorder: Recorder

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        """Tokens of `reqs` are out."""
        self.recorder.tokens_out(reqs)


class _Refusals:
    """In the place of the socket to the tokenizer: requests that were aborted or shed."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Note a refusal; everything else is nobody's business here."""
        if type(output).__name__ == "AbortReq" and output.rid:
            self._recorder.refused(output.rid)


def _launch(self: Any, batch: Any, pp_proxy_tensors: Any = None) -> Any:
    """`Scheduler.run_batch` without what serves a device: streams, events, relay buffers, copies."""
    self.forward_ct += 1
    batch.forward_iter = self.forward_ct
    batch.launch_ts = time.monotonic()
    # What resolving the inputs would have consumed:
    batch.prefill_input_ids_cpu = batch.mix_running_indices = None
    result = self.model_worker.forward_batch_generation(batch)
    batch.input_ids = None
    return result


class _Virtual:
    """The replaced parts, mixed in before the scheduler class under test."""

    twin_workload: Workload
    twin_recorder: Recorder

    def init_tp_model_worker(self: Any) -> None:
        self.tp_worker = TwinWorker(
            server_args=self.server_args, gpu_id=self.ps.gpu_id, ps=self.ps, nccl_port=self.nccl_port
        )
        self.tp_worker.recorder = self.twin_recorder

    def init_ipc_channels(self: Any, port_args: PortArgs) -> None:
        super().init_ipc_channels(port_args)  # type: ignore[misc]
        self.load_snapshot_writer = None
        self.ipc_channels = replace(self.ipc_channels, send_to_tokenizer=_Refusals(self.twin_recorder))

    def init_request_receiver(self: Any) -> None:
        self.request_receiver = Feeder(self, self.twin_workload, self.twin_recorder)

    def init_output_streamer(self: Any) -> None:
        super().init_output_streamer()  # type: ignore[misc]
        stock = self.output_streamer
        fields = {name: getattr(stock, name) for name in SchedulerOutputStreamer.__dataclass_fields__}
        self.output_streamer = _Output(**fields)
        self.output_streamer.recorder = self.twin_recorder

    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().run_batch(batch, *args, **kwargs)  # type: ignore[misc]
        allocator = self.token_to_kv_pool_allocator
        free = allocator.available_size() + self.tree_cache.evictable_size()
        self.twin_recorder.pool_state(self.max_total_num_tokens - free, len(self.waiting_queue))
        return result

    def process_batch_result(self: Any, batch: Any, result: Any) -> None:
        self.twin_recorder.engine.take_result(result.end_s)
        super().process_batch_result(batch, result)  # type: ignore[misc]


def run(
    workload: Workload,
    scheduler: str = "stock",
    argv: list[str] | None = None,
    name: str | None = None,
    mixin: type | None = None,
) -> RunResult:
    """Run the whole workload and return its record. `argv`: stock's flags and --slo-*; `mixin`: for tests.

    Raises SystemExit on unknown flags, ConfigError on bad settings, StuckError if the scheduler hangs.
    """
    argv = list(argv or [])
    server_argv, slo = split_flags(argv, workload)
    engine = VirtualEngine(workload.profile, workload.noise_sigma, workload.seed)
    recorder = Recorder(workload, engine)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sglang-slo-twin-") as folder:
        server_args = _server_args(server_argv, workload, Path(folder))
        if slo.profile is None:  # what a profile measured on this device would say
            workload.profile.save(Path(folder) / "profile.json")
            slo = replace(slo, profile=str(Path(folder) / "profile.json"))
        slo.to_env()
        clock.use(engine.now)
        try:
            built = _build(scheduler, server_args, workload, recorder, mixin)
            _loop(built)
        finally:
            clock.use(None)
    result = RunResult(
        workload=workload.name,
        scheduler=name or " ".join([scheduler, *argv]),
        settings={"argv": argv},
        profile=workload.profile_name,
        seed=workload.seed,
        load=workload.load,
        class_names=workload.class_names,
        kv_capacity_tokens=int(built.max_total_num_tokens),
        requests=recorder.requests,
        iterations=recorder.iterations(),
        retractions=int(recorder.requests.preemptions.sum()),
        recompute_tokens=recorder.recompute_tokens,
        prefill_tokens=recorder.prefill_tokens,
        wall_s=time.perf_counter() - began,
    )
    return result


def split_flags(argv: list[str], workload: Workload) -> tuple[list[str], SloConfig]:
    """Stock's flags, and the settings of ours with the workload's classes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    settings = config.from_args(args)
    classes = {
        n: SloClass(
            None if s.ttft_s == float("inf") else s.ttft_s * 1e3,
            None if s.tbt_s == float("inf") else s.tbt_s * 1e3,
        )
        for n, s in zip(workload.class_names, workload.limits, strict=True)
    }
    return rest, replace(settings, classes={**classes, **settings.classes})


def _server_args(argv: list[str], workload: Workload, folder: Path) -> ServerArgs:
    parser = argparse.ArgumentParser(prog="twin", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    model = write_model(folder / "model", _context_tokens(workload))
    fixed = ["--model-path", str(model), "--device", "cpu", "--load-format", "dummy"]
    fixed += ["--skip-tokenizer-init", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    fixed += [
        "--max-total-tokens",
        str(workload.profile.kv_capacity_tokens),
        "--random-seed",
        str(workload.seed),
    ]
    fixed += ["--log-level", "error", "--grammar-backend", "none", "--watchdog-timeout", "1e9"]
    fixed += ["--decode-log-interval", "1000000000"]
    if "--chunked-prefill-size" not in argv:
        fixed += ["--chunked-prefill-size", "8192"]  # what stock picks on a GPU of this class
    if "--max-running-requests" not in argv:
        fixed += ["--max-running-requests", "2048"]  # likewise
    return ServerArgs.from_cli_args(parser.parse_args([*fixed, *argv]))


def _context_tokens(workload: Workload) -> int:
    """The model's context: room for the longest declared request, in coarse steps."""
    longest = max(int(workload.input_tokens[i]) + workload.declared(i) for i in range(len(workload)))
    return (longest // CONTEXT_STEP + 2) * CONTEXT_STEP


def _build(
    scheduler: str, server_args: ServerArgs, workload: Workload, recorder: Recorder, mixin: type | None
) -> Scheduler:
    base: type = Scheduler
    if scheduler == "slo":
        from sglang_slo.runtime.scheduler import SloScheduler

        base = SloScheduler
    bases = tuple(b for b in (mixin, _Virtual, base) if b is not None)
    virtual = type("Twin" + base.__name__, bases, {"twin_workload": workload, "twin_recorder": recorder})
    # Below the class under test, which may wrap run_batch: launching is the worker's side of the seam.
    Scheduler.run_batch = _launch
    torch.set_num_threads(1)
    publish(server_args, role="scheduler")
    built = virtual(server_args, PortArgs.init_new(server_args), 0, 0, 0, 0, 0, 0, None)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    return built


def _loop(scheduler: Scheduler) -> None:
    gc.collect()
    gc.freeze()  # the imports are not garbage: collecting must not walk them again and again
    try:
        scheduler.run_event_loop()
    finally:
        gc.unfreeze()
