"""`python -m sglang_slo.twin`: the real scheduler in virtual time, from the command line.

    run       one scheduler on one workload
    compare   ours, ours with parts off, stock defaults, best stock
    capacity  the highest load at which a target share of requests is kept
    plan      how many replicas keep a target share
    bound     what no scheduler can exceed
    validate  the twin against serving runs on real GPUs
    plot      the same as pictures

SGLang's own flags and --slo-* are accepted behind every command that runs a scheduler. Each command is a
module with `add_arguments(parser)` and `command(args, rest) -> exit status`, loaded when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from sglang_slo.config import ConfigError
from sglang_slo.core.latency import ProfileError
from sglang_slo.twin.devices import DeviceError
from sglang_slo.twin.workloads.workload import WorkloadError

COMMANDS = {
    **{
        name: f"sglang_slo.twin.{name}" for name in ("run", "compare", "capacity", "plan", "validate", "plot")
    },
    "bound": "sglang_slo.twin.bound.upper_bound",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for input that cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print(__doc__ if not argv or argv[0] in ("-h", "--help") else f"need one of {', '.join(COMMANDS)}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    module = importlib.import_module(COMMANDS[argv[0]])
    parser = argparse.ArgumentParser(
        prog=f"python -m sglang_slo.twin {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(argv[1:])
    try:
        return int(module.command(args, rest))
    except (WorkloadError, ConfigError, ProfileError, DeviceError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
