"""A client for each rule against both servers, the same mixed load: whose promise was kept, by rule?

    scripts/run.sh -- benchmark/rules.py --rounds 2

Starts stock SGLang and ours in turn, replays `workloads/rules.yaml` over HTTP, and judges each request from the
client's own clock by the rule that its class declares, also on stock, which knows of none. All that follows and is not
listed by --help goes to both servers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from child_process import ChildError
from client import slo_field
from replay import NAMES, Side, _run, alternating
from servers import end_cleanly
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.workloads.workload import Workload, WorkloadError, load_workload

RULES = Path(__file__).resolve().parent / "workloads" / "rules.yaml"


def table(workload: Workload, results: list[RunResult], names: list[str]) -> str:
    """Kept of all by class, and the longest pause that a request of it had, as Markdown."""
    heads = [f"{name}: kept, longest pause" for name in names]
    lines = ["| class | declared | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(names)]
    for k, slo in enumerate(workload.limits):
        cells = [_cell([r for r in results if r.scheduler == name], k) for name in names]
        declared = json.dumps(slo_field(slo))[1:-1].replace('"', "")
        lines.append(f"| {workload.class_names[k]} | {declared} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(mine: list[RunResult], class_id: int) -> str:
    rows = [(r.requests, r.requests.class_id == class_id) for r in mine]
    kept = sum(int(np.sum(requests.attained[of])) for requests, of in rows)
    pause_s = max(float(np.max(requests.max_gap_s[of], initial=0.0)) for requests, of in rows)
    return f"{kept} of {sum(int(of.sum()) for _, of in rows)}, {pause_s:.2f} s"


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default=str(RULES), help="another workload, a class a rule")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each server (default: 1)")
    parser.add_argument("--load", type=float, default=1.0, help="factor on all arrival rates")
    parser.add_argument("--out", type=Path, default=Path("out/rules"), help="folder for results and logs")
    args, shared = parser.parse_known_args(argv)
    end_cleanly()
    try:
        workload = load_workload(args.workload, load=args.load)
        sides = [Side(name, kind, tuple(shared)) for kind, name in NAMES.items()]
        results = _run(alternating(sides, args.rounds), workload, args.out)
    except (WorkloadError, ChildError) as error:
        print(f"rules.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(workload)} requests, load {args.load:g}, {args.rounds} rounds, real servers, client's clock\n"
    )
    print(table(workload, results, [side.name for side in sides]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
