"""Does the twin tell the truth? One workload on a real server and in the twin with the profile measured
there.

    python benchmark/truth.py --disable-overlap-schedule    # the demo model on this machine's CPU, four minutes

1. starts our server, which first measures the profile of this machine (`--seconds` of passes),
2. rehearses: replays the workload with another seed, from which the server learns what iterations take while
   client, tokenizer and detokenizer want the same cores; takes the profile that it has then,
3. sends some requests one by one: what their first tokens take beyond their iteration is HTTP and tokenizer,
   of which the twin knows nothing (`--overhead-ms` gives a figure instead),
4. replays the workload with its own seed, while the server logs requests, and what each iteration took,
5. runs its request log in the twin with the profile of 2, ours in both, and adds the overhead of 3 to first tokens,
6. prints medians side by side: time to first token, gap, iteration time; each within 15 % or said not to be; and how
   many attained, as the server and the twin judged; within 5 points or said not to be.

Where the forward pass runs on the CPU there is nothing to overlap with: launching blocks until it has run, and
the twin, whose virtual device is a GPU, is right about such a server only without the overlap scheduler. On a
machine that is busy with something else the check means nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from child_process import ChildError
from client import replay, slo_field
from servers import end_cleanly, server
from sglang_slo.core.latency import ProfileError
from sglang_slo.core.slo import Slo
from sglang_slo.measuring import MEASURE_ENV, describe
from sglang_slo.profile import of_running
from sglang_slo.runtime.latency.iteration_log import ENV as ITERATION_LOG
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.runs import Spec, run_all
from sglang_slo.twin.workloads.workload import WorkloadError, load_workload

TOLERANCE = 0.15
TOLERANCE_SHARE = 0.05
WORKLOAD = Path(__file__).parent / "workloads" / "truth.yaml"
# The twin's defaults; a server picks others by the size of the device.
SAME_FLAGS = ["--chunked-prefill-size", "2048", "--max-running-requests", "256"]
LONE = 20  # requests sent one by one
LONE_LOAD = 0.4  # of the workload's: one has ended before the next comes


@dataclass(frozen=True)
class Figure:
    """One median, both ways, seconds."""

    name: str
    real_s: float
    twin_s: float

    @property
    def off(self) -> float:
        """Relative difference of the twin's figure."""
        return self.twin_s / self.real_s - 1 if self.real_s > 0 else float("inf")

    @property
    def within(self) -> bool:
        """Whether the twin says about the same."""
        return abs(self.off) <= TOLERANCE

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return {"real_s": self.real_s, "twin_s": self.twin_s, "off": self.off}

    def line(self) -> str:
        """For people."""
        verdict = "within" if self.within else "NOT within"
        return (
            f"{self.name:38s} real {1e3 * self.real_s:8.2f} ms   twin {1e3 * self.twin_s:8.2f} ms   "
            f"{self.off:+6.1%}   {verdict} {TOLERANCE:.0%}"
        )


@dataclass(frozen=True)
class Share:
    """Attainment, both ways."""

    name: str
    real: float
    twin: float

    @property
    def within(self) -> bool:
        """Whether the twin says about the same."""
        return abs(self.twin - self.real) <= TOLERANCE_SHARE

    def line(self) -> str:
        """For people."""
        return (
            f"{self.name:38s} real {self.real:11.3f}   twin {self.twin:11.3f}   {100 * (self.twin - self.real):+.1f} points"
            f"   {'within' if self.within else 'NOT within'} {100 * TOLERANCE_SHARE:.0f}"
        )

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return {"real": self.real, "twin": self.twin}


def shares(rows: list[dict[str, Any]], twin: RunResult, limits: list[Slo]) -> list[Share]:
    """Attainment in all and by promise: `rows` of the server's request log, and the twin's run of them in this order."""
    real, class_id = np.array([row["attained"] for row in rows], bool), twin.requests.class_id
    if len(class_id) != len(real):
        raise ValueError(f"{len(real)} requests were logged and {len(class_id)} replayed")
    groups = {"all": np.ones(len(real), bool)}
    if len(limits) > 1:
        groups |= {
            json.dumps(slo_field(slo))[1:-1].replace('"', ""): class_id == k for k, slo in enumerate(limits)
        }
    return [
        Share(f"attained, {name}", float(real[of].mean()), float(twin.requests.attained[of].mean()))
        for name, of in groups.items()
    ]


def figures(
    real: RunResult, twin: RunResult, real_iterations_s: NDArray[np.float64], overhead_s: float
) -> list[Figure]:
    """Medians over requests, and over iterations."""
    many = twin.requests.output_tokens > 1

    def median(values: NDArray[np.float64]) -> float:
        return float(np.median(values))

    return [
        Figure(
            "time to first token", median(real.requests.ttft_s), median(twin.requests.ttft_s) + overhead_s
        ),
        Figure(
            "TBT (a request's mean gap)",
            median(real.requests.tpot_s[many]),
            median(twin.requests.tpot_s[many]),
        ),
        Figure("iteration", median(real_iterations_s), median(twin.iterations.duration_s)),
    ]


def overhead(alone: RunResult, iterations: dict[str, NDArray[np.float64]]) -> float:
    """Median seconds that first tokens of requests sent one by one take beyond their prefill, one pass each.

    Raises ValueError if there are fewer passes than requests; those before belong to warming up.
    """
    ttft_s = alone.requests.ttft_s
    prefill_s = iterations["duration_s"][iterations["extend"] > 0][-len(ttft_s) :]
    if len(prefill_s) < len(ttft_s):
        raise ValueError(f"{len(ttft_s)} requests sent one by one made {len(prefill_s)} prefill passes")
    return float(np.median(ttft_s - prefill_s))


def read_iterations(
    path: Path, from_s: float = 0.0, until_s: float = float("inf")
) -> dict[str, NDArray[np.float64]]:
    """Columns of a server's iteration log, of iterations launched between these times of the monotone clock.

    Raises ValueError if there are none.
    """
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if from_s <= float(row["launched_s"]) < until_s]
    if not rows:
        raise ValueError(f"{path}: no iteration was logged")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def replayed(log: Path, count: int, profile: Path, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """The last `count` requests of a server's log, and a workload that replays them on `profile`.

    Raises ValueError if there are fewer.
    """
    rows = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: float(row["arrival_s"]))
    if len(rows) < count:
        raise ValueError(f"{log}: {len(rows)} requests of {count} were logged")
    trace, workload = folder / "replayed.jsonl", folder / "replayed.yaml"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows[-count:]))
    workload.write_text(
        yaml.safe_dump({"profile": str(profile.resolve()), "streams": [{"trace": trace.name}]})
    )
    return rows[-count:], workload


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every figure is within its tolerance, 1 if not, 2 if something could not be run."""
    args, flags = _parser().parse_known_args(argv)
    end_cleanly()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = check(args, [*SAME_FLAGS, *flags])
    except (ChildError, WorkloadError, ProfileError, ValueError, OSError) as error:
        print(f"truth.py: {error}", file=sys.stderr)
        return 2
    for figure in found:
        print(figure.line())
    if args.json:
        print(json.dumps({f.name: f.plain() for f in found}))
    return 0 if all(f.within for f in found) else 1


def check(args: argparse.Namespace, flags: list[str]) -> list[Figure | Share]:
    """All runs, and the figures of both."""
    profile, log, requests = (
        args.out / name for name in ("profile.json", "iterations.csv", "requests.jsonl")
    )
    for old in (log, requests):
        old.unlink(missing_ok=True)
    environment = {
        MEASURE_ENV: json.dumps(
            {"out": str((args.out / "at-start.json").resolve()), "seconds": args.seconds}
        ),
        ITERATION_LOG: str(log.resolve()),
    }
    name = str(args.workload)
    workload = load_workload(name, load=args.load)
    rehearsal = load_workload(name, load=args.load, seed=workload.seed + 1)
    lone = load_workload(name, load=LONE_LOAD, seed=workload.seed + 2, max_requests=LONE)
    logging = ["--slo-request-log", str(requests.resolve())]
    with server("slo", [*flags, *logging], args.out / "server.log", environment) as url:
        replay(rehearsal, url, "rehearsal")
        model = of_running(url)
        model.save(profile)
        before_s = time.monotonic()
        alone = replay(lone, url, "one by one")
        between_s = time.monotonic()
        real = replay(workload, url, "real")
    overhead_s = overhead(alone, read_iterations(log, before_s, between_s))
    if args.overhead_ms is not None:
        overhead_s = args.overhead_ms / 1e3
    rows, again = replayed(requests, len(workload), profile, args.out)
    [twin] = run_all([Spec(str(again), "slo", tuple(flags))], 1, None, keep=False)
    iterations = read_iterations(log, between_s)
    print(
        f"{len(workload)} requests, {len(iterations['extend'])} real and {len(twin.iterations.start_s)} twin iterations; "
        f"{1e3 * overhead_s:.2f} ms for HTTP and tokenizer; {real.notes['errors']:.0f} errors\n{describe(model)}"
    )
    return [
        *figures(real, twin, iterations["duration_s"], overhead_s),
        *shares(rows, twin, load_workload(str(again)).limits),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="a YAML file (default: %(default)s)")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--seconds", type=float, default=10.0, help="device time of measuring the profile")
    parser.add_argument("--overhead-ms", type=float, help="of HTTP and tokenizer (default: measured)")
    parser.add_argument("--out", type=Path, default=Path("out/truth"), help="folder for profile and logs")
    parser.add_argument("--json", action="store_true", help="also one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
