"""`python -m sglang_slo.twin`: the scheduler in virtual time, from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_slo.twin", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one scheduler on one workload", allow_abbrev=False)
    run.add_argument("--workload", required=True)
    run.add_argument("--scheduler", choices=("slo", "stock"), default="slo")
    run.add_argument("--load", type=float, default=1.0)
    run.add_argument("--data", type=Path)
    run.add_argument("--seed", type=int)
    run.add_argument("--max-requests", type=int)
    run.add_argument("--json", action="store_true")
    args, rest = parser.parse_known_args(argv)
    from sglang_slo.twin import driver
    from sglang_slo.twin.workload import load_workload

    workload = load_workload(
        args.workload, load=args.load, data=args.data, seed=args.seed, max_requests=args.max_requests
    )
    result = driver.run(workload, args.scheduler, rest)
    print(result.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
