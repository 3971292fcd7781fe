"""`run`: one scheduler on one workload."""

from __future__ import annotations

import argparse

from sglang_slo.twin import flags
from sglang_slo.twin.result.table import legend, render
from sglang_slo.twin.runs import run_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `run`."""
    flags.add_workload(parser)
    parser.add_argument("--scheduler", choices=("slo", "stock"), default="slo")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Run and print: a table, or with --json one line with every measure. `rest`: the scheduler's flags."""
    ours, others = flags.split(rest)
    argv = others + (ours if args.scheduler == "slo" else [])
    [result] = run_all([flags.spec(args, args.scheduler, argv)], 1, None, not args.no_cache)
    print(result.to_json() if args.json else render([(result.scheduler, result)]) + "\n\n" + legend(result))
    return 0
