"""What planning costs: CPU time of the scheduler's thread per iteration, ours over stock, on the same requests.

Both schedulers run the same workload in the twin, one after the other in alternating order. Counted is the
thread's CPU time in the event loop less what only the twin does (its worker, feeder and recorder), so what is
left is SGLang's and our own work around a forward pass; tokens are gathered, pickled and sent as in a server.
Second figure: planning with hundreds running and thousands waiting, timed where the scheduler plans (view,
ledger and plan).

    python benchmark/scheduler_cpu.py --workload mix-generated --runs 5
    python benchmark/scheduler_cpu.py --stock "--enable-mixed-chunk --chunked-prefill-size 512"
    python benchmark/scheduler_cpu.py --profile ours     # where the time goes
    python benchmark/scheduler_cpu.py --fit python/sglang_slo/twin/data/planning.json   # what the twin charges
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pickle
import pstats
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zmq
from scipy.optimize import nnls
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_slo.estimator.trainer import InlineTrainer
from sglang_slo.runtime.scheduler.planning import Planning
from sglang_slo.twin.sim import driver, virtual
from sglang_slo.twin.sim.feeder import Feeder
from sglang_slo.twin.sim.recorder import Recorder
from sglang_slo.twin.sim.worker import TwinWorker
from sglang_slo.twin.workloads.workload import Workload, load_workload

PLAN = Planning._make_plan
# What a real server does elsewhere, or not at all.
TWINS_OWN = (
    (TwinWorker, "forward_batch_generation"),
    (Feeder, "pull"),
    (Recorder, "pool_state"),
    (Recorder, "tokens_out"),
    (InlineTrainer, "start"),  # a server trains in a child process
)


# What a workload holds of each request: always, and where its trace has it.
OF_SOME_TRACES = ("callers", "texts", "declared_tokens", "features")
PER_REQUEST = ("class_id", "arrival_s", "input_tokens", "output_tokens", "blocks", *OF_SOME_TRACES)


class Meter:
    """CPU time of this thread inside the event loop, the twin's own share apart; seconds."""

    def __init__(self) -> None:
        self.loop_s = self.twin_s = 0.0
        self.plan_s: list[tuple[int, int, float]] = []  # (running, waiting, seconds) of each planning

    def excluded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time taken for the twin's own."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.twin_s += time.thread_time() - began

        return timed

    def planned(self, planning: Planning, running_batch: Any) -> Any:
        """In the place of `Planning._make_plan`, which is `PLAN`: the same, timed."""
        sizes = len(running_batch.reqs), len(planning._ports.waiting.reqs)
        began = time.thread_time()  # the machine may be busy with other work
        plan = PLAN(planning, running_batch)
        self.plan_s.append((*sizes, time.thread_time() - began))
        return plan

    def watcher(self) -> type:
        """A mixin that times the loop."""
        meter = self

        class Timed:
            def run_event_loop(self) -> None:
                began = time.thread_time()
                super().run_event_loop()  # type: ignore[misc]
                meter.loop_s += time.thread_time() - began

        return Timed

    def timing(self) -> Any:
        """While it is open, plannings are timed."""

        def timed(planning: Planning, running_batch: Any) -> Any:
            return self.planned(planning, running_batch)

        return mock.patch.object(Planning, "_make_plan", timed)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While it is open, the twin's own functions are timed."""
        with contextlib.ExitStack() as stack:
            for owner, name in TWINS_OWN:
                stack.enter_context(mock.patch.object(owner, name, self.excluded(getattr(owner, name))))
            stack.enter_context(self.timing())
            stack.enter_context(streaming())
            yield


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """While it is open, tokens also leave as from a server: gathered, pickled, and written to a socket."""
    context = zmq.Context()
    sink, source = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    sink.set_hwm(1)  # nobody reads: what does not fit is dropped, after it was made
    source.set_hwm(1)
    source.connect(f"tcp://127.0.0.1:{sink.bind_to_random_port('tcp://127.0.0.1')}")
    gather, keep_time = SchedulerOutputStreamer._stream_output_generation, virtual._send

    class Detokenizer:
        @staticmethod
        def send_output(output: Any, recv_obj: Any = None) -> None:
            with contextlib.suppress(zmq.Again):
                source.send(pickle.dumps(output, pickle.HIGHEST_PROTOCOL), zmq.NOBLOCK, copy=False)

    def send(self: Any, *args: Any, **kwargs: Any) -> None:
        keep_time(self, *args, **kwargs)
        outlet, self.send_to_detokenizer = self.send_to_detokenizer, Detokenizer
        try:
            gather(self, *args, **kwargs)
        finally:
            self.send_to_detokenizer = outlet

    try:
        with mock.patch.object(virtual, "_send", send):
            yield
    finally:
        context.destroy(linger=0)


def measure(workload: Workload, scheduler: str, argv: list[str]) -> dict[str, float]:
    """One run: CPU microseconds per iteration, iterations, and what was in an iteration on average."""
    meter = Meter()
    with meter.installed():
        result = driver.run(workload, scheduler, argv, watcher=meter.watcher())
    passes = result.iterations
    return {
        "cpu_us": (meter.loop_s - meter.twin_s) / len(passes.start_s) * 1e6,
        "iterations": len(passes.start_s),
        "requests_per_iteration": float(np.mean(passes.prefills + passes.decodes)),
        "attainment": result.attainment,
    }


def crowd(running: int, waiting: int, kv_short: bool = False) -> Workload:
    """A burst of requests: `running` short ones that write for long, then everyone else, for whom KV may be short."""
    base = load_workload("mix-generated", max_requests=8)
    n = running + waiting
    first = np.arange(n) < running
    nothing: dict[str, Any] = dict.fromkeys(OF_SOME_TRACES)
    return replace(
        base,
        name="crowd",
        class_id=np.arange(n) % len(base.limits),
        arrival_s=np.where(first, 0.0, 0.5),
        input_tokens=np.where(first, 64, 512 + np.arange(n) % 1024),
        output_tokens=np.where(first, 400, 16),
        blocks=[None] * n,
        **nothing,
        profile=replace(base.profile, kv_capacity_tokens=running * 250 if kv_short else 1 << 20),
    )


class EnoughSeen(BaseException):
    """Ends a run whose figures are complete."""


def planning(
    running: int, waiting: int, samples: int, argv: list[str], kv_short: bool = False
) -> list[float]:
    """Milliseconds of planning with at least so many running and waiting, `samples` of them."""
    found: list[float] = []

    class Counting(Meter):
        def planned(self, planning: Planning, running_batch: Any) -> Any:
            plan = super().planned(planning, running_batch)
            runs, waits, seconds = self.plan_s[-1]
            if runs >= running and waits >= waiting:
                found.append(seconds * 1e3)
                if len(found) >= samples:
                    raise EnoughSeen
            return plan

    with contextlib.suppress(EnoughSeen), Counting().timing():
        driver.run(crowd(running + 64, waiting + 512, kv_short), "slo", argv)
    return found


def planning_cost(running: int, waiting: int, argv: list[str]) -> dict[str, float]:
    """Seconds of one planning, fitted to its size: `PlanningCost`'s numbers, and the median relative error.

    Robust to what a busy machine adds: a sample counts by its relative error, and the least absolute ones win.
    """
    rows: list[tuple[float, float, float, float]] = []
    for kv_short in (False, True):
        meter = Meter()
        with meter.timing():
            driver.run(crowd(running, waiting, kv_short), "slo", argv)
        rows += [(runs, waits, float(kv_short and waits > 0), s) for runs, waits, s in meter.plan_s if runs]
    sizes, seconds = np.array(rows)[:, :3], np.array(rows)[:, 3]
    design = np.column_stack((np.ones(len(rows)), sizes))
    weight = 1 / seconds
    for _ in range(20):
        found, _ = nnls(design * weight[:, None], seconds * weight)
        error = np.abs(design @ found / seconds - 1)
        weight = 1 / seconds / np.sqrt(np.maximum(error, 0.01))
    names = ("base_s", "running_s", "waiting_s", "kv_short_s")
    return {**dict(zip(names, found.tolist(), strict=True)), "median_error": float(np.median(error))}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Alternating runs; prints each pair, then the ratio's median and spread."""
    workload = load_workload(args.workload, load=args.load, max_requests=args.requests, data=args.data)
    measure(replace_size(workload, 50), "stock", [])  # warm up: lazy imports, caches
    measure(replace_size(workload, 50), "slo", args.flags)
    ratios, rows = [], []
    for i in range(args.runs):
        order = ("stock", "slo") if i % 2 == 0 else ("slo", "stock")
        row = {name: measure(workload, name, args.flags if name == "slo" else args.stock) for name in order}
        rows.append(row)
        ratios.append(row["slo"]["cpu_us"] / row["stock"]["cpu_us"])
        both = ", ".join(
            f"{name} {row[name]['cpu_us']:.0f} us x {row[name]['iterations']} iterations of "
            f"{row[name]['requests_per_iteration']:.1f} requests"
            for name in ("stock", "slo")
        )
        print(f"{both}: ratio {ratios[-1]:.2f}", flush=True)
    return {"ratio": ratios, "rows": rows}


def replace_size(workload: Workload, n: int) -> Workload:
    """The first `n` requests."""
    kept = {name: getattr(workload, name) for name in PER_REQUEST}
    return replace(workload, **{name: each[:n] for name, each in kept.items() if each is not None})


def profile(args: argparse.Namespace) -> None:
    """Where the event loop's CPU time goes, by cProfile: the heaviest functions by total and by own time."""
    workload = load_workload(args.workload, load=args.load, max_requests=args.requests, data=args.data)
    profiler = cProfile.Profile(time.thread_time)

    class Profiled:
        def run_event_loop(self) -> None:
            profiler.runcall(super().run_event_loop)  # type: ignore[misc]

    stock = args.profile == "stock"
    driver.run(workload, "stock" if stock else "slo", args.stock if stock else args.flags, watcher=Profiled)
    stats = pstats.Stats(profiler, stream=sys.stdout)
    stats.sort_stats("cumulative").print_stats("sglang_slo|sglang/srt/managers", 70)
    stats.sort_stats("tottime").print_stats(40)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", default="mix-generated", help="name or YAML file")
    parser.add_argument("--data", type=Path, help="folder of traces")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--requests", type=int, help="requests of the workload to run (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--running", type=int, default=512)
    parser.add_argument("--waiting", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=100, help="plannings to time; 0: none")
    parser.add_argument("--profile", choices=("ours", "stock"), help="print where the time goes, and end")
    parser.add_argument(
        "--fit", type=Path, help="fit what planning costs to its size, write it here, and end"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--stock", default="", help="flags of stock, in one word (default: none)")
    args, flags = parser.parse_known_args()
    args.flags = flags
    args.stock = shlex.split(args.stock)
    if args.profile:
        profile(args)
        return
    if args.fit:
        cost = planning_cost(args.running, args.waiting, args.flags)
        args.fit.write_text(json.dumps(cost, indent=1) + "\n")
        print(json.dumps(cost))
        return
    figures = compare(args) if args.runs else {}
    if figures:
        print(f"CPU time per iteration, ours over stock: {spread(figures['ratio'])}, {args.runs} pairs")
    for kv_short in (False, True) if args.samples else ():
        times = planning(args.running, args.waiting, args.samples, args.flags, kv_short)
        figures["planning_kv_short_ms" if kv_short else "planning_ms"] = times
        sizes = f"{args.running} running and {args.waiting} waiting" + ", KV short" * kv_short
        print(f"planning with {sizes}, ms: {spread(times) if times else 'never seen'}, {len(times)} samples")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
