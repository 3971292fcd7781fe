"""The parts of a measurement. Each takes a `Run`, saves one JSON per run, and may be cut off and asked for
again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpurun import tools
from gpurun.run import ARMS, OutOfTimeError, Run, generate
from gpurun.server import OURS, Arm, Server
from gpurun.workloads import mix_file, pressure_file, request_count

LOADS = {"low": 0.5, "mid": 1.0, "high": 2.0}
COUNTED = (
    "retract",
    "preempt",
    "swap",
    "recompute",
    "park",
    "fallback",
    "forward_execution",
    "generation_tokens",
    "prompt_tokens",
    "cached_tokens",
)
PREEMPT_ARMS = {
    way: Arm(f"ours-{way}", OURS, ("--slo-preempt", way, "--slo-host-kv-gb", "8"))
    for way in ("auto", "swap", "recompute")
}


def start(run: Run) -> None:
    """(a) Each server once alone: seconds to healthy, greedy output, and whether both say the same."""
    for name in run.arms:
        if run.load("start", name):
            continue
        with run.servers([ARMS[name]]) as alive:
            server = alive[name]
            ids = generate(server, 64, 32)
            run.save(
                "start",
                name,
                {"arm": name, "start_s": server.start_s, "output_ids": ids, "server": facts(server)},
            )
    said = {name: run.load("start", name)["output_ids"] for name in run.arms}
    first = said[run.arms[0]]
    equal = {name: ids == first for name, ids in said.items()}
    run.save("start", "greedy", {"tokens": len(first), "equal_to_first": equal})


def serve(run: Run) -> None:
    """(a) SGLang's own benchmark, unmodified, against both."""

    def work(server: Server) -> dict[str, Any]:
        sizes = run.sizes
        return tools.bench_serving(
            run, server, sizes.bench_prompts, sizes.bench_input_tokens, sizes.bench_output_tokens
        )

    alternate(run, "serve", [ARMS[name] for name in run.arms], work)


def profile(run: Run) -> None:
    """(b) The latency profile of this device, with what the fit leaves over."""
    if run.profile.exists():
        return
    run.profile.parent.mkdir(parents=True, exist_ok=True)
    tools.measure_profile(run)


def mix(level: str) -> Callable[[Run], None]:
    """(c) The mixed workload at one of three loads."""

    def part(run: Run) -> None:
        load = run.loads[list(LOADS).index(level)] if run.loads else LOADS[level]
        workload = mix_file(run)
        requests = request_count(run, workload, load)

        def work(server: Server) -> dict[str, Any]:
            return tools.replay(run, server, workload, load, requests)

        about = {"level": level, "load": load, "max_requests": requests}
        alternate(run, "mix", [ARMS[name] for name in run.arms], work, about, suffix=f"-{level}")

    return part


def pressure(run: Run) -> None:
    """(d) Little KV, long answers: stock against ours with each way out of a preemption."""
    workload, kv_tokens = pressure_file(run), run.sizes.pressure_kv_tokens

    def work(server: Server) -> dict[str, Any]:
        return tools.replay(run, server, workload, 1.0, run.sizes.pressure_requests)

    ways = (
        ("auto",) if run.device == "cpu" else tuple(PREEMPT_ARMS)
    )  # each server takes 2 GB of a CPU's memory
    arms = [ARMS["stock"], *(PREEMPT_ARMS[way] for way in ways)]
    alternate(run, "pressure", arms, work, {"kv_tokens": kv_tokens}, kv_tokens=kv_tokens)


def overhead(run: Run) -> None:
    """(e) All requests at once: tokens per second, and how long the device waits for the scheduler."""

    def work(server: Server) -> dict[str, Any]:
        sizes = run.sizes
        return tools.bench_serving(
            run,
            server,
            sizes.saturation_prompts,
            sizes.saturation_input_tokens,
            sizes.saturation_output_tokens,
            tools.LOOSE,
        )

    alternate(run, "overhead", [ARMS[name] for name in run.arms], work)


def twin(run: Run) -> None:
    """(f) The same replays in the twin, on the profile of part (b). Needs no GPU."""
    workload = mix_file(run)
    for level in LOADS:
        for arm in run.arms:
            real = run.load("mix", f"{arm}-{level}-1")
            if real is None or run.load("twin", f"{arm}-{level}"):
                continue
            said = tools.twin(run, workload, real)
            run.save(
                "twin",
                f"{arm}-{level}",
                {
                    "arm": arm,
                    "level": level,
                    "load": real["load"],
                    "result": said,
                    "profile": "measured" if run.profile.exists() else "modelled",
                },
            )
    if not any(run.load("mix", f"{arm}-{level}-1") for level in LOADS for arm in run.arms):
        raise OutOfTimeError("twin: nothing to compare with: part mix has no results yet")


PARTS: dict[str, tuple[str, Callable[[Run], None]]] = {
    "start": ("a", start),
    "serve": ("a", serve),
    "profile": ("b", profile),
    "mix-low": ("c", mix("low")),
    "mix-mid": ("c", mix("mid")),
    "mix-high": ("c", mix("high")),
    "pressure": ("d", pressure),
    "overhead": ("e", overhead),
    "twin": ("f", twin),
}


def alternate(
    run: Run,
    part: str,
    arms: Sequence[Arm],
    work: Callable[[Server], dict[str, Any]],
    about: dict[str, Any] | None = None,
    *,
    suffix: str = "",
    kv_tokens: int | None = None,
) -> None:
    """Do `work` on every arm in turn until each has its rounds, and save each time with what it is `about`."""
    names = tuple(arm.name for arm in arms)
    if run.finished(part, names, suffix):
        return
    with run.servers(arms, kv_tokens) as alive:
        for arm, name in run.rounds_of(part, names, suffix):
            alive[arm].flush()
            run.save(part, name, {"arm": arm, **(about or {}), **measured(alive[arm], work)})


def measured(server: Server, work: Callable[[Server], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returned, its seconds, the seconds the device computed in them, and the counters it moved."""
    before, begin = server.counters(), time.monotonic()
    result = work(server)
    seconds, after = time.monotonic() - begin, server.counters()
    moved = {
        name: after[name] - before.get(name, 0.0)
        for name in after
        if name.endswith("_total") and any(word in name for word in COUNTED)
    }
    return {
        "result": result,
        "seconds": seconds,
        "device_busy_s": moved.get("sglang:forward_execution_seconds_total"),
        "counters": moved,
        "status": server.status(),
        "server": facts(server),
    }


def facts(server: Server) -> dict[str, Any]:
    """What the server says about itself that a figure may depend on."""
    try:
        info = json.loads(server.get("/server_info"))
    except (OSError, ValueError):
        return {}
    wanted = (
        "attention_backend",
        "sampling_backend",
        "max_total_num_tokens",
        "chunked_prefill_size",
        "dtype",
        "schedule_policy",
        "max_running_requests",
        "disable_overlap_schedule",
        "enable_mixed_chunk",
        "version",
        "cuda_graph_max_bs",
        "mem_fraction_static",
    )
    return {key: info[key] for key in wanted if key in info}
