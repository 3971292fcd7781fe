"""Runs a real SGLang scheduler in virtual time: `run(workload, "stock" | "slo", argv)` -> `RunResult`.

One code path for every scheduler class (see `virtual`). The clock (`sglang_slo.clock`) is the virtual
engine's. Runs follow each other in one process; the result of a run does not depend on what ran before it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import sglang_slo.twin.platform as twin_platform

twin_platform.settle()

import torch  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    destroy_distributed_environment,
    destroy_model_parallel,
)
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_slo import clock, settings_in  # noqa: E402
from sglang_slo.config import ENV, SloConfig  # noqa: E402
from sglang_slo.core.slo import SloClass  # noqa: E402
from sglang_slo.runtime.sglang import process  # noqa: E402
from sglang_slo.twin.devices.measured import MeasuredDevice  # noqa: E402
from sglang_slo.twin.result.run_result import RunResult  # noqa: E402
from sglang_slo.twin.sim.engine import VirtualEngine  # noqa: E402
from sglang_slo.twin.sim.hierarchical import hierarchical  # noqa: E402
from sglang_slo.twin.sim.recorder import Recorder  # noqa: E402
from sglang_slo.twin.sim.speculation import speculating  # noqa: E402
from sglang_slo.twin.sim.virtual import seam, virtual  # noqa: E402
from sglang_slo.twin.sim.worker import write_model  # noqa: E402
from sglang_slo.twin.workloads.workload import Workload  # noqa: E402

# The imports are no garbage: collecting must not walk them, which SGLang asks for whenever it builds a scheduler.
gc.collect()
gc.freeze()

SCHEDULERS = ("slo", "stock")
CONTEXT_STEP = 8192
# What stock SGLang picks on a GPU of the profiles' class, where a flag does not say otherwise.
GPU_DEFAULTS = {"--max-running-requests": "2048"}


class FallbackError(RuntimeError):
    """Planning failed in a run: its figures are partly those of stock scheduling."""


def run(
    workload: Workload,
    scheduler: str = "stock",
    argv: list[str] | None = None,
    name: str | None = None,
    watcher: type | None = None,
    allow_fallbacks: bool = False,
    model: dict[str, Any] | None = None,
) -> RunResult:
    """Run the whole workload and return its record. `argv`: stock's flags and --slo-*; `watcher` and `model`, what of the
    model's configuration differs: for tests.

    Raises SystemExit on unknown flags, ConfigError on bad settings, StuckError if the scheduler hangs, and
    FallbackError if stock scheduling had to take an iteration, unless that is allowed.
    """
    argv = list(argv or [])
    server_argv, slo = split_flags(argv, workload)
    engine = VirtualEngine(workload.on, workload.noise_sigma, workload.seed)
    recorder = Recorder(workload, engine)
    began = time.perf_counter()
    with seam(), speculating(), hierarchical(engine), _virtual_time(engine, slo, workload) as folder:
        server_args = _server_args(server_argv, workload, folder, model)
        process.publish(server_args)
        built = process.build(virtual(_scheduler_class(scheduler), workload, recorder, watcher), server_args)
        logging.getLogger("sglang").setLevel(logging.ERROR)
        built.run_event_loop()
    fallbacks = _fallbacks(built, allow_fallbacks)
    return RunResult(
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
        swapped_tokens=engine.swapped_tokens,
        fallbacks=fallbacks,
        wall_s=time.perf_counter() - began,
    )


def _fallbacks(scheduler: Any, allowed: bool) -> int:
    """How often stock scheduling took an iteration from ours."""
    observer = getattr(scheduler, "slo_observer", None)
    if observer is None:
        return 0
    if observer.fallbacks.count and not allowed:
        raise FallbackError(f"planning failed {observer.fallbacks.count} times: {observer.last_fallback}")
    return int(observer.fallbacks.count)


def split_flags(argv: list[str], workload: Workload) -> tuple[list[str], SloConfig]:
    """Stock's flags, and the settings of ours with the workload's classes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings_in.add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    settings = settings_in.from_args(args)
    classes = {
        name: SloClass(_ms(limits.ttft_s), _ms(limits.tbt_s))
        for name, limits in zip(workload.class_names, workload.limits, strict=True)
    }
    return rest, replace(settings, classes={**classes, **settings.classes})


def _ms(limit_s: float) -> float | None:
    return None if math.isinf(limit_s) else limit_s * 1e3


def _scheduler_class(scheduler: str) -> type:
    if scheduler == "stock":
        return Scheduler
    if scheduler == "slo":
        from sglang_slo.runtime.scheduler.scheduler import SloScheduler

        return SloScheduler
    raise ValueError(f"scheduler: need one of {', '.join(SCHEDULERS)}, got {scheduler!r}")


@contextlib.contextmanager
def _virtual_time(engine: VirtualEngine, slo: SloConfig, workload: Workload) -> Iterator[Path]:
    """The run's clock, settings and scratch folder; the process is left as it was found."""
    before = os.environ.get(ENV)
    with tempfile.TemporaryDirectory(prefix="sglang-slo-twin-") as folder:
        if slo.profile is None:  # what a profile measured on this device would say
            workload.profile.save(Path(folder) / "profile.json")
            slo = replace(slo, profile=str(Path(folder) / "profile.json"))
        slo.to_env()
        clock.use(engine.now)
        torch.set_num_threads(1)
        try:
            yield Path(folder)
        finally:
            clock.use(None)
            del os.environ[ENV]
            if before is not None:
                os.environ[ENV] = before
            destroy_model_parallel()
            destroy_distributed_environment()


def _server_args(
    argv: list[str], workload: Workload, folder: Path, model: dict[str, Any] | None = None
) -> ServerArgs:
    parser = argparse.ArgumentParser(prog="twin", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    fixed: dict[str, Any] = {
        "--model-path": write_model(folder / "model", _context_tokens(workload), model),
        "--load-format": "dummy",
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--max-total-tokens": _kv_tokens(argv, workload),
        "--random-seed": workload.seed,
        "--log-level": "error",
        "--decode-log-interval": 10**9,
    }
    usual = {**GPU_DEFAULTS, "--chunked-prefill-size": str(getattr(workload.on, "chunk_tokens", 8192))}
    fixed.update({flag: value for flag, value in usual.items() if flag not in argv})
    words = [str(word) for pair in fixed.items() for word in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ServerArgs.from_cli_args(parser.parse_args([*words, "--skip-tokenizer-init", *argv]))


def _kv_tokens(argv: list[str], workload: Workload) -> int:
    """Tokens of KV: what the profile says, or what `--mem-fraction-static` leaves on a measured device."""
    if isinstance(workload.on, MeasuredDevice) and "--mem-fraction-static" in argv[:-1]:
        return workload.on.kv_capacity(float(argv[argv.index("--mem-fraction-static") + 1]))
    return workload.profile.kv_capacity_tokens


def _context_tokens(workload: Workload) -> int:
    """The model's context: room for the longest declared request, in coarse steps."""
    longest = max(int(workload.input_tokens[i]) + workload.declared(i) for i in range(len(workload)))
    return (longest // CONTEXT_STEP + 2) * CONTEXT_STEP
