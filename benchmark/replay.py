"""Stock SGLang and ours on the same machine, one after the other, on the same requests: who keeps the limits?

    python benchmark/replay.py --workload benchmark/workloads/tight-and-loose.yaml --rounds 3

Starts a fresh server for every run, in alternating order (stock, ours; ours, stock; ...), replays the
workload over HTTP, and prints attainment with its spread over the rounds and the ratio of ours to stock. All
that follows and is not listed by --help goes to both servers. `--url NAME=URL` replays against servers that
run already.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from child_process import ChildError
from client import replay
from servers import end_cleanly, server
from sglang_slo.twin import plot
from sglang_slo.twin.result.report import share_with_spread, spread
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.workloads.workload import Workload, WorkloadError, load_workload

NAMES = {"stock": "stock SGLang", "slo": "ours"}


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a kind of server with flags, or one that runs already."""

    name: str
    kind: str = ""
    flags: tuple[str, ...] = ()
    url: str = ""

    def run(self, workload: Workload, log: Path) -> RunResult:
        """One replay."""
        if self.url:
            return replay(workload, self.url, self.name, {"url": self.url})
        with server(self.kind, self.flags, log) as url:
            return replay(workload, url, self.name, {"flags": list(self.flags)})


def alternating(sides: list[Side], rounds: int) -> list[Side]:
    """Every side once a round, in reverse order every second round, so that no one always goes first."""
    return [side for k in range(rounds) for side in (sides if k % 2 == 0 else sides[::-1])]


def report(results: list[RunResult], names: list[str]) -> str:
    """A table: attainment in all and per class, tails, errors; then the ratio of the last name to the first."""
    classes = results[0].class_names
    lines = [["", "kept", *classes, "TTFT p50 / p99", "TBT p50 / p99", "errors"]]
    shares = {name: _shares(results, name) for name in names}
    for name in names:
        mine = [r for r in results if r.scheduler == name]
        tails = [
            " / ".join(
                f"{1e3 * spread([r.measures()[m][p] for r in mine])[1]:.0f} ms" for p in ("p50", "p99")
            )
            for m in ("ttft_s", "tbt_s")
        ]
        cells = [share_with_spread(shares[name][c]) for c in ("all", *classes)]
        lines.append([name, *cells, *tails, f"{sum(r.notes['errors'] for r in mine):.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(names) == 2:
        for c in ("all", *classes):
            text.append(f"{c}: {ratio(shares[names[1]][c], shares[names[0]][c])}")
    return "\n".join(text)


def ratio(ours: list[float], stock: list[float]) -> str:
    """Ratio of the means, and of each round's pair."""
    if sum(stock) == 0:
        return "stock kept none" if sum(ours) else "none kept by either"
    pairs = [f"{a / b:.2f}" if b else "inf" for a, b in zip(ours, stock, strict=False)]
    return f"{np.mean(ours) / np.mean(stock):.2f}x stock (rounds: {', '.join(pairs)})"


def pooled(results: list[RunResult], name: str) -> RunResult:
    """All rounds of one name as one result, for the distributions."""
    mine = [r for r in results if r.scheduler == name]
    whole = mine[0]
    for field in whole.requests.__dataclass_fields__:
        setattr(whole.requests, field, np.concatenate([getattr(r.requests, field) for r in mine]))
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run, print, draw; returns the exit status."""
    args, shared = _parser().parse_known_args(argv)
    end_cleanly()
    try:
        workload = load_workload(
            args.workload, load=args.load, data=args.data, seed=args.seed, max_requests=args.max_requests
        )
        sides = _sides(args, shared)
        results = _run(alternating(sides, args.rounds), workload, args.out)
    except (WorkloadError, ChildError, ValueError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        return 2
    names = [side.name for side in sides]
    if args.json:
        for result in results:
            print(result.to_json())
    else:
        print(f"{len(workload)} requests of {workload.name}, load {workload.load:g}, {args.rounds} rounds")
        print(report(results, names))
    title = f"{workload.name}, load {workload.load:g}, {args.rounds} rounds, real servers"
    image = args.out / f"{workload.name}-load{workload.load:g}.png"
    plot.latency_cdfs([pooled(results, name) for name in names], title, image)
    print(f"wrote {image}", file=sys.stderr)
    return 0


def _run(order: list[Side], workload: Workload, folder: Path) -> list[RunResult]:
    results = []
    for k, side in enumerate(order):
        stem = f"{k:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', side.name)}"
        result = side.run(workload, folder / f"{stem}.log")
        result.write(folder / f"{stem}.npz")
        print(f"[{k + 1}/{len(order)}] {side.name}: {result.attainment:.3f}", file=sys.stderr, flush=True)
        results.append(result)
    return results


def _shares(results: list[RunResult], name: str) -> dict[str, list[float]]:
    """Attainment of each round, of all requests and per class."""
    mine = [r.measures() for r in results if r.scheduler == name]
    classes = mine[0]["classes"]
    return {
        "all": [m["attainment"] for m in mine],
        **{c: [m["classes"][c]["attainment"] for m in mine] for c in classes},
    }


def _sides(args: argparse.Namespace, shared: list[str]) -> list[Side]:
    if args.url:
        named = [text.partition("=") for text in args.url]
        if not all(name and url.startswith("http") for name, _, url in named):
            raise ValueError(f"--url: need NAME=http://..., got {args.url}")
        return [Side(name, url=url.rstrip("/")) for name, _, url in named]
    own = {"stock": args.stock_flags, "slo": args.our_flags}
    return [Side(NAMES[kind], kind, (*shared, *shlex.split(own[kind]))) for kind in args.servers.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else "", allow_abbrev=False
    )
    parser.add_argument("--workload", required=True, help="a ready-made workload or a YAML file")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--data", type=Path, help="further folder for traces")
    parser.add_argument("--seed", type=int, help="instead of the workload's")
    parser.add_argument("--max-requests", type=int, help="instead of the workload's")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each server (default: 3)")
    parser.add_argument("--servers", default="stock,slo", help="which to start (default: stock,slo)")
    parser.add_argument("--stock-flags", default="", help="flags for stock alone, quoted")
    parser.add_argument("--our-flags", default="", help="flags for ours alone, quoted")
    parser.add_argument(
        "--url", action="append", help="NAME=URL of a running server, instead of starting any"
    )
    parser.add_argument("--out", type=Path, default=Path("out/replay"), help="folder for results and plots")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
