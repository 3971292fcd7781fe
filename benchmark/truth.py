"""Does the twin tell the truth? One workload on a real server and in the twin with the profile measured
there.

    python benchmark/truth.py            # the demo model on this machine's CPU, about three minutes

1. starts our server, which first measures the profile of this machine (`--seconds` of passes),
2. replays the workload over HTTP, while the server logs what each iteration took,
3. runs the same workload in the twin with the measured profile, ours in both,
4. prints medians side by side: time to first token, gap, iteration time; each within 15 % or said not to be.

The twin knows the scheduler and the device. It does not know HTTP, tokenizer and detokenizer: `--overhead-ms`
of them (default: none) is added to its first tokens and printed. On a machine that is busy with something
else the check means nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from client import replay
from servers import ServerError, end_cleanly, server
from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.profile import MEASURE_ENV
from sglang_slo.runtime.iteration_log import ENV as ITERATION_LOG
from sglang_slo.twin.result import RunResult
from sglang_slo.twin.runs import Spec, run_all
from sglang_slo.twin.workload import WorkloadError, load_workload

TOLERANCE = 0.15
WORKLOAD = Path(__file__).parent / "workloads" / "truth.yaml"
# The twin's defaults; a server picks others by the size of the device.
SAME_FLAGS = ["--chunked-prefill-size", "2048", "--max-running-requests", "256"]


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

    def line(self) -> str:
        """For people."""
        verdict = "within" if abs(self.off) <= TOLERANCE else "NOT within"
        return (
            f"{self.name:38s} real {1e3 * self.real_s:8.2f} ms   twin {1e3 * self.twin_s:8.2f} ms   "
            f"{self.off:+6.1%}   {verdict} {TOLERANCE:.0%}"
        )


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
            "TBT (a request's 99th percentile gap)",
            median(real.requests.tbt_s[many]),
            median(twin.requests.tbt_s[many]),
        ),
        Figure("mean gap", median(real.requests.tpot_s[many]), median(twin.requests.tpot_s[many])),
        Figure("iteration", median(real_iterations_s), median(twin.iterations.duration_s)),
    ]


def read_iterations(path: Path) -> NDArray[np.float64]:
    """Durations from a server's iteration log, seconds. Raises ValueError if it holds none."""
    with path.open() as file:
        durations = [float(row["duration_s"]) for row in csv.DictReader(file)]
    if not durations:
        raise ValueError(f"{path}: no iteration was logged")
    return np.array(durations)


def with_profile(workload: Path, profile: Path, folder: Path) -> Path:
    """A copy of the workload that runs on `profile`."""
    raw = yaml.safe_load(workload.read_text())
    raw["profile"] = str(profile.resolve())
    copy = folder / workload.name
    copy.write_text(yaml.safe_dump(raw))
    return copy


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every median is within the tolerance, 1 if not, 2 if something could not be run."""
    args, flags = _parser().parse_known_args(argv)
    end_cleanly()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = check(args, [*SAME_FLAGS, *flags])
    except (ServerError, WorkloadError, ProfileError, ValueError, OSError) as error:
        print(f"truth.py: {error}", file=sys.stderr)
        return 2
    for figure in found:
        print(figure.line())
    if args.json:
        print(json.dumps({f.name: {"real_s": f.real_s, "twin_s": f.twin_s, "off": f.off} for f in found}))
    return 0 if all(abs(f.off) <= TOLERANCE for f in found) else 1


def check(args: argparse.Namespace, flags: list[str]) -> list[Figure]:
    """Both runs and their figures."""
    profile, log = args.out / "profile.json", args.out / "iterations.csv"
    log.unlink(missing_ok=True)
    environment = {
        MEASURE_ENV: json.dumps({"out": str(profile.resolve()), "seconds": args.seconds}),
        ITERATION_LOG: str(log.resolve()),
    }
    real_workload = load_workload(str(args.workload), load=args.load)
    with server("slo", flags, args.out / "server.log", environment) as url:
        before = len(log.read_text().splitlines()) if log.exists() else 0
        real = replay(real_workload, url, "real")
    model = LatencyModel.load(profile)
    copy = with_profile(Path(args.workload), profile, args.out)
    [twin] = run_all([Spec(str(copy), "slo", tuple(flags), load=args.load)], 1, None, keep=False)
    iterations = read_iterations(log)[max(before - 1, 0) :]
    overhead_s = args.overhead_ms / 1e3
    fit = model.meta.get("fit", {})
    print(
        f"{len(real_workload)} requests, {len(iterations)} real and {len(twin.iterations.start_s)} twin "
        f"iterations; profile of {fit.get('cases')} cases, median error {fit.get('median_error', 0):.1%}; "
        f"{args.overhead_ms:g} ms for HTTP and tokenizer; {real.notes['errors']:.0f} errors"
    )
    return figures(real, twin, iterations, overhead_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="a YAML file (default: %(default)s)")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--seconds", type=float, default=10.0, help="device time of measuring the profile")
    parser.add_argument("--overhead-ms", type=float, default=0.0, help="of HTTP and tokenizer (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/truth"), help="folder for profile and logs")
    parser.add_argument("--json", action="store_true", help="also one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
