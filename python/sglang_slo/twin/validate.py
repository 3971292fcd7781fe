"""`validate`: the twin against serving runs on real GPUs that nobody here made.

Stock SGLang in a closed loop on measured kernels, same clients and lengths as each real run. Two constants, the host's
time per pass and per request in it, may be fitted (`--fit`) on the runs of one half (by a hash of their id); errors are
reported on the other half. How the real clients started is not known: both ways are run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from sglang_slo.core.latency import Coefficients, LatencyModel
from sglang_slo.core.slo import Slo
from sglang_slo.twin.devices.database import samples_file
from sglang_slo.twin.devices.measured import HostTimes, MeasuredDevice, measured
from sglang_slo.twin.workloads.serving_runs import ServingRun, read_runs
from sglang_slo.twin.workloads.workload import Workload, staggered_outputs

STARTS = ("at_once", "staggered")
TURNS = 3  # requests of each client; the first and the last turn are not judged
MOST_TOKENS = 250_000  # of output in one run: longer ones are left out unless asked for
FIT_ROUNDS = 1  # of linearising; the loop is all but linear in the two
HUBER = 0.1  # relative error beyond which a run counts less in the fit


@dataclass(frozen=True)
class Checked:
    """A real run beside its twin. Times in ms; `error` of what the twin says, relative."""

    run: ServingRun
    start: str
    ttft_ms: float
    tpot_ms: float
    passes: float  # a request lives through, in Little's sense
    places: float  # in all the passes that a request lives through

    @property
    def request_ms(self) -> float:
        """Of a whole request."""
        return self.ttft_ms + self.tpot_ms * (self.run.output_tokens - 1)

    def errors(self) -> dict[str, float]:
        """Relative, signed: above 0 where the twin is slower (of throughput: where it is faster)."""
        request = self.request_ms / self.run.request_ms - 1
        return {
            "request": request,
            "tpot": self.tpot_ms / self.run.tpot_ms - 1,
            "ttft": self.ttft_ms / self.run.ttft_ms - 1,
            "throughput": 1 / (1 + request) - 1,
        }


def closed_loop(run: ServingRun, device: MeasuredDevice, start: str) -> Workload:
    """The real run's clients and lengths."""
    n = run.clients * TURNS
    outputs = np.full(n, run.output_tokens, np.int64)
    return Workload(
        name=run.id,
        profile_name=device.name,
        profile=LatencyModel(
            Coefficients(0, 0, 0, 0, 0, 0), name=device.name, kv_capacity_tokens=device.kv_capacity_tokens
        ),
        seed=0,
        load=1.0,
        class_names=["any"],
        limits=[Slo()],
        class_id=np.zeros(n, np.int64),
        arrival_s=np.zeros(n),
        input_tokens=np.full(n, run.input_tokens, np.int64),
        output_tokens=staggered_outputs(outputs, run.clients) if start == "staggered" else outputs,
        blocks=[None] * n,
        declared_max_new_tokens=None,
        clients=run.clients,
        staggered=start == "staggered",
        device=device,
    )


def check(run: ServingRun, host: HostTimes, start: str) -> Checked:
    """Run the twin of a real run."""
    from sglang_slo.twin.sim.driver import run as run_twin

    result = run_twin(closed_loop(run, measured(run.device, host), start), "stock")
    order = np.argsort(result.requests.arrival_s, kind="stable")
    middle = order[run.clients : -run.clients]
    rows, passes = result.requests, result.iterations
    per_request = run.clients / len(rows.arrival_s)
    return Checked(
        run,
        start,
        float(rows.ttft_s[middle].mean()) * 1e3,
        float(rows.tpot_s[middle].mean()) * 1e3,
        len(passes.start_s) * per_request,
        float((passes.prefills + passes.decodes).sum()) * per_request,
    )


def fit_host(runs: Sequence[ServingRun], start: str) -> HostTimes:
    """The two constants that bring the whole requests of these runs nearest, relative, robustly.

    A closed loop is linear in them to first order: by Little's law a request lives through `passes` passes with
    `places` places in all. Both are taken from the runs themselves and again with the constants found.
    """
    host = HostTimes()
    for _ in range(FIT_ROUNDS):
        found = [check(run, host, start) for run in runs]
        real = np.array([c.run.request_ms for c in found]) / 1e3
        slope = np.array([[c.passes, c.places] for c in found])
        now = np.array([c.request_ms for c in found]) / 1e3
        lacking = real - now + slope @ np.array([host.iteration_s, host.request_s])
        weight = np.ones(len(found))
        for _ in range(20):
            root = np.sqrt(weight) / real
            x, _residual = nnls(slope * root[:, None], lacking * root)
            weight = np.minimum(1, HUBER / np.maximum(np.abs((lacking - slope @ x) / real), 1e-9))
        host = HostTimes(float(x[0]), float(x[1]))
    return host


def spread(checked: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """Per measure: median and 90th percentile of the size of the error, and the median of the signed one."""
    errors = {name: np.array([c.errors()[name] for c in checked]) for name in checked[0].errors()}
    return {
        name: {
            "median": float(np.median(np.abs(e))),
            "p90": float(np.quantile(np.abs(e), 0.9)),
            "bias": float(np.median(e)),
        }
        for name, e in errors.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `validate`."""
    parser.add_argument("--model", required=True, help="such as Llama-3.1-8B or Qwen/Qwen3-32B")
    parser.add_argument("--system", required=True, help="such as h200_sxm")
    parser.add_argument("--rows", type=Path, help="a CSV of runs (default: those that come with the kernels)")
    parser.add_argument("--fit", action="store_true", help="fit the host's two constants on one half anew")
    parser.add_argument(
        "--every", type=int, default=1, help="of the runs, take each so-manieth (default: all)"
    )
    parser.add_argument("--most-tokens", type=int, default=MOST_TOKENS, help="leave out longer runs")
    parser.add_argument("--start", choices=(*STARTS, "both"), default="both", help="how the clients start")
    parser.add_argument("--json", action="store_true", help="a line for each run, and one for the whole")
    parser.add_argument("--out", type=Path, help="a file for the same lines")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Run and print. Raises ValueError on flags it does not know."""
    if rest:
        raise ValueError(f"{rest[0]}: unknown option")
    if args.every < 1:
        raise ValueError(f"--every: need at least 1, got {args.every}")
    runs, left_out = read_runs(args.rows or samples_file(), args.model, args.system)
    short = [r for r in runs if r.clients * r.output_tokens * TURNS <= args.most_tokens]
    left_out["longer than --most-tokens"] = len(runs) - len(short)
    chosen = short[:: args.every]
    left_out["not among those taken by --every"] = len(short) - len(chosen)
    if not chosen:
        raise ValueError(f"no run of {args.model} on {args.system} is left; left out: {left_out}")
    chosen.sort(key=lambda r: r.device.tp)  # a device is built once
    fitted_on = [r for r in chosen if r.half == 0] if args.fit else []
    judged = [r for r in chosen if r.half == 1] if args.fit else chosen
    lines = []
    for start in STARTS if args.start == "both" else (args.start,):
        began = time.perf_counter()
        host = fit_host(fitted_on, start) if args.fit else HostTimes.fitted()
        checked = []
        for i, run in enumerate(judged, 1):
            checked.append(check(run, host, start))
            print(
                f"[{i}/{len(judged)}] {run.id}: {checked[-1].errors()['request']:+.1%}",
                file=sys.stderr,
                flush=True,
            )
        whole = {
            "model": args.model,
            "system": args.system,
            "start": start,
            "host": asdict(host),
            "fitted_on": len(fitted_on),
            "judged_on": len(judged),
            "left_out": {k: v for k, v in left_out.items() if v},
            "errors": spread(checked),
            "wall_s": round(time.perf_counter() - began),
        }
        lines += [json.dumps(_line(c)) for c in checked] + [json.dumps(whole)]
        print("\n".join(lines[-len(checked) - 1 :]) if args.json else _sentence(whole))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return 0


def _line(c: Checked) -> dict[str, object]:
    run = c.run
    return {
        "id": run.id,
        "version": run.version,
        "half": run.half,
        "tp": run.device.tp,
        "isl": run.input_tokens,
        "osl": run.output_tokens,
        "clients": run.clients,
        "start": c.start,
        "real": {"ttft_ms": run.ttft_ms, "tpot_ms": run.tpot_ms, "request_ms": run.request_ms},
        "twin": {"ttft_ms": c.ttft_ms, "tpot_ms": c.tpot_ms, "request_ms": c.request_ms},
        "passes": c.passes,
        "places": c.places,
        "errors": c.errors(),
    }


def _sentence(whole: dict[str, object]) -> str:
    errors, host = whole["errors"], whole["host"]
    assert isinstance(errors, dict) and isinstance(host, dict)
    parts = [f"{n} {e['median']:.1%} (p90 {e['p90']:.1%}, bias {e['bias']:+.1%})" for n, e in errors.items()]
    return (
        f"{whole['model']} on {whole['system']}, clients {whole['start']}: {whole['judged_on']} runs, median error of "
        f"{'; '.join(parts)}; host {host['iteration_s'] * 1e3:.3f} ms a pass, {host['request_s'] * 1e6:.1f} us a request"
    )
