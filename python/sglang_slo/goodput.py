"""`sglang-slo goodput`: the highest rate at which a class of a live server keeps its target.

    sglang-slo goodput --url http://127.0.0.1:30000 --class chat --tokenizer MODEL --target 0.95

guidellm makes the load (it has to be installed, in any environment: `--guidellm PROGRAM`): requests of the class at a
rate, Poisson arrivals. The server itself says how many of them kept all that the class declares, by whatever rule, which
no load tool could; so nobody else may send requests of this class meanwhile. The rate doubles until the target is
missed, then the search halves the interval between the last rate that held and the first that did not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROG = "sglang-slo goodput"
WINDOW = "1h"  # of /slo/status, whose counts are compared before and after a probe
MAX_PROBES = 20
SETTLE_S, PATIENCE_S = 1.0, 120.0


class GoodputError(RuntimeError):
    """The search cannot go on; the message says why."""


@dataclass(frozen=True)
class Probe:
    """One rate that was tried: requests that were judged, and those of them that attained."""

    rate_rps: float
    judged: int
    attained: int

    @property
    def attainment(self) -> float:
        """Share that attained; 0 if nothing was judged."""
        return self.attained / self.judged if self.judged else 0.0


def search(
    probe: Callable[[float], Probe], first_rps: float, target: float, tolerance: float
) -> Iterator[Probe]:
    """Probes in turn until the highest rate that holds is known to within `tolerance`, a share of it."""
    holds, fails, rate = 0.0, float("inf"), first_rps
    for _ in range(MAX_PROBES):
        tried = probe(rate)
        yield tried
        if tried.attainment >= target:
            holds = max(holds, rate)
        else:
            fails = min(fails, rate)
        if fails - holds <= tolerance * max(holds, first_rps * tolerance):
            return
        rate = 2 * holds if fails == float("inf") else (holds + fails) / 2


def best(probes: Sequence[Probe], target: float) -> Probe | None:
    """The highest rate that held."""
    held = [p for p in probes if p.attainment >= target]
    return max(held, key=lambda p: p.rate_rps, default=None)


class Live:
    """A live server and the load tool: `probe(rate)`."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._key = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}

    def status(self) -> Any:
        """What `/slo/status` says. Raises GoodputError."""
        request = urllib.request.Request(self._args.url + "/slo/status", headers=self._key)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise GoodputError(f"{self._args.url}/slo/status: {error}") from error

    def check(self) -> None:
        """Raises GoodputError if the server has no such class."""
        classes = self.status().get("classes") or {}
        if self._args.slo_class not in classes:
            raise GoodputError(f"--class: need one of {sorted(classes)}, got {self._args.slo_class!r}")

    def probe(self, rate_rps: float) -> Probe:
        """Load at this rate for a while, and what became of it. Raises GoodputError."""
        before = self._counts()
        done = subprocess.run(self.command(rate_rps), capture_output=True, text=True, check=False)
        if done.returncode:
            raise GoodputError(
                f"guidellm ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        after = self._settled()
        return Probe(rate_rps, max(after[0] - before[0], 0), max(after[1] - before[1], 0))

    def command(self, rate_rps: float) -> list[str]:
        """guidellm's command line."""
        args = self._args
        headers = {"x-slo-class": args.slo_class, **self._key}
        backend = {"kind": "openai_http", "target": args.url, "request_format": "/v1/completions"}
        data = {
            "kind": "synthetic_text",
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
        }
        return [
            *(args.guidellm, "run", "--disable-console"),
            *("--backend", json.dumps({**backend, "extras": {"headers": headers}})),
            *("--profile", json.dumps({"kind": "poisson", "rate": [rate_rps]})),
            *(
                "--constraint",
                json.dumps(
                    {"kind": "max_requests", "count": max(round(rate_rps * args.seconds), args.least)}
                ),
            ),
            *("--data", json.dumps(data)),
            *("--tokenizer", json.dumps({"kind": "hf_auto", "model": args.tokenizer})),
            *("--output", json.dumps({"kind": "json", "path": str(self._folder / "guidellm.json")})),
        ]

    def _counts(self) -> tuple[int, int]:
        figures = self.status().get("windows", {}).get(WINDOW, {}).get(self._args.slo_class, {})
        return figures.get("judged", 0), figures.get("attained", 0)

    def _settled(self) -> tuple[int, int]:
        """Counts once nothing runs any more."""
        deadline, seen = time.monotonic() + PATIENCE_S, (-1, -1)
        while time.monotonic() < deadline:
            time.sleep(SETTLE_S)
            counts = self._counts()
            if counts == seen:
                return counts
            seen = counts
        return seen


def picture(probes: Sequence[Probe], target: float, name: str, file: Path) -> None:
    """Attainment over the rate, and the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(probes, key=lambda p: p.rate_rps)
    axes.plot([p.rate_rps for p in ordered], [p.attainment for p in ordered], "o-")
    axes.axhline(target, color="grey", linestyle="--", label=f"target {target:g}")
    axes.set(xlabel="requests per second", ylabel=f"attained by class {name}", ylim=(0, 1.03))
    axes.legend()
    figure.savefig(file)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="of a running server")
    parser.add_argument("--class", dest="slo_class", required=True, help="class of its slo.yaml")
    parser.add_argument("--tokenizer", required=True, help="the model's, for guidellm: a name or a folder")
    parser.add_argument("--target", type=float, default=0.95, help="share that has to attain (default: 0.95)")
    parser.add_argument("--first", type=float, default=1.0, help="first rate, requests a second (default: 1)")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="of the answer, a share of it (default: 0.1)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a probe (default: 30)")
    parser.add_argument("--least", type=int, default=30, help="requests of a probe, at least (default: 30)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of each request (default: 512)")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--api-key", help="of the server")
    parser.add_argument("--guidellm", default="guidellm", help="the program (default: the one on PATH)")
    parser.add_argument("--picture", type=Path, help="draw attainment over the rate into this file")
    args = parser.parse_args(argv)
    for name in ("first", "tolerance", "seconds", "least", "prompt_tokens", "output_tokens"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: need a number above 0, got {getattr(args, name)}")
    if not 0 < args.target <= 1:
        parser.error(f"--target: need a share in (0, 1], got {args.target:g}")
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"--url: need http://host:port, got {args.url}")
    if shutil.which(args.guidellm) is None:
        parser.error(
            f"--guidellm: no program {args.guidellm}; pip install guidellm, in an environment of its own"
        )
    args.url = args.url.rstrip("/")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if no rate held."""
    args = _arguments(sys.argv[1:] if argv is None else argv)
    probes: list[Probe] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            live = Live(args, Path(folder))
            live.check()
            for probe in search(live.probe, args.first, args.target, args.tolerance):
                probes.append(probe)
                print(f"{probe.rate_rps:8.3g} req/s: {probe.attained} of {probe.judged} attained", flush=True)
    except GoodputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    if args.picture:
        picture(probes, args.target, args.slo_class, args.picture)
    found = best(probes, args.target)
    if found is None:
        print(f"no rate tried kept {args.target:g} of class {args.slo_class}")
        return 1
    print(
        f"{found.rate_rps:.3g} requests a second: {found.attainment:.1%} of class {args.slo_class} attained"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
