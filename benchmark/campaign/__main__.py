"""Tries to break sglang-slo, and says what broke. Deterministic per seed (`twin`); bounded in count and time (`server`).

    python benchmark/campaign twin --requests 1000000 --seed 1 --json twin.json
    python benchmark/campaign server --fuzz 10000 --soak-minutes 60 --json server.json
    python benchmark/campaign page twin.json server.json     # writes benchmark/CAMPAIGN.md

Run from the repository's root with the package importable. The exit status is 1 where something broke.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
for _folder in ("benchmark", "test"):  # the campaign shares its checkers with the tests
    sys.path.insert(0, str(_ROOT / _folder))


def twin(args: argparse.Namespace) -> int:
    """The scheduler in virtual time."""
    logging.disable(
        logging.CRITICAL
    )  # thousands of exceptions are injected, and logged where they are caught
    warnings.simplefilter("ignore")
    from campaign.sweep import Order, campaign

    order = Order(
        args.requests,
        args.seed,
        not args.no_sweep,
        args.entries_only,
        args.fault,
        tuple(args.wire),
        args.worlds,
    )
    findings = campaign(order, _say, lambda so_far: _write(args.json, so_far.plain()))
    _write(args.json, findings.plain())
    for broken in findings.breaks[: args.show]:
        print(
            f"{broken.what}\n  fault: {broken.fault or 'none'}\n  world: {broken.world}\n  at: {broken.trace}"
        )
    print(f"{findings.tally.arrived} requests, {findings.tried} faults, {len(findings.breaks)} runs broke")
    return int(bool(findings.breaks))


def server(args: argparse.Namespace) -> int:
    """A real server on this machine's CPU."""
    from campaign.fuzz import fuzz
    from campaign.harm import harm
    from campaign.matrix import matrix
    from campaign.soak import soak
    from servers import end_cleanly

    end_cleanly()
    began, folder = time.monotonic(), args.folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "matrix": lambda: matrix(folder, args.copies),
        "fuzz": lambda: fuzz(folder, args.fuzz, args.seed, _say),
        "soak": lambda: soak(folder, args.soak_minutes, args.seed, _say),
        "harm": lambda: harm(folder, args.crowd, _say, args.harm),
    }
    checks = []
    for name in args.parts.split(","):
        for check in parts[name]():
            checks.append(check)
            word = {True: "held", False: "BROKE", None: "not tried"}[check.held]
            print(f"{word:10} {check.name}: {check.detail}", flush=True)
        result = {"seed": args.seed, "minutes": (time.monotonic() - began) / 60}
        _write(args.json, {**result, "checks": [vars(c) for c in checks]})
    return int(any(check.held is False for check in checks))


def page(args: argparse.Namespace) -> int:
    """The page of what was found."""
    from campaign.page import page as written

    text = written([json.loads(file.read_text()) for file in args.files])
    args.output.write_text(text)
    return 0


def _write(path: Path | None, result: object) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


_last_said = 0.0


def _say(line: str) -> None:
    """Progress, at most once in two seconds."""
    global _last_said
    if time.monotonic() - _last_said > 2:
        _last_said = time.monotonic()
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("twin", help="the scheduler in virtual time")
    one.add_argument("--requests", type=int, default=1_000_000, help="of the soak; the sweep has its own")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--json", type=Path, help="write the findings here")
    one.add_argument("--no-sweep", action="store_true", help="the soak alone")
    one.add_argument(
        "--entries-only", action="store_true", help="no exceptions in functions called by our own"
    )
    one.add_argument("--fault", default="", metavar="TEXT", help="only faults whose name contains this")
    one.add_argument(
        "--wire", action="append", default=[], metavar="NAME", help="exceptions in this function alone"
    )
    one.add_argument("--worlds", type=int, default=6, help="worlds of each kind that entries are listed from")
    one.add_argument("--show", type=int, default=20, help="breaks to print")
    one.set_defaults(run=twin)
    two = parts.add_parser("server", help="a real server on this machine")
    two.add_argument("--fuzz", type=int, default=10_000, help="requests to fuzz")
    two.add_argument("--soak-minutes", type=float, default=60.0)
    two.add_argument("--crowd", type=int, default=5000, help="requests at once")
    two.add_argument("--copies", type=int, default=2, help="of each feature in the matrix")
    two.add_argument("--parts", default="matrix,fuzz,soak,harm", help="which, by commas (default: all)")
    two.add_argument("--harm", default="", metavar="TEXT", help="only the harm whose name contains this")
    two.add_argument("--seed", type=int, default=1)
    two.add_argument(
        "--folder", type=Path, default=Path("out") / "campaign", help="for logs and scratch files"
    )
    two.add_argument("--json", type=Path, help="write the findings here")
    two.set_defaults(run=server)
    three = parts.add_parser("page", help="write the page from the findings of runs")
    three.add_argument("files", type=Path, nargs="+", help="JSON files of runs")
    three.add_argument("--output", type=Path, default=_ROOT / "benchmark" / "CAMPAIGN.md")
    three.set_defaults(run=page)
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
