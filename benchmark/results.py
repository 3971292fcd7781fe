"""Makes benchmark/GRID.md and its plots from runs of the twin.

    python benchmark/results.py --data FOLDER_WITH_TRACES            # all of it: hours on a small machine
    python benchmark/results.py --workloads mix --pieces attainment  # one piece; the others stay as they are

Each piece of each workload is kept in benchmark/results/ with the date and versions it was made with, and the
page is put together from what is there. A piece that is stopped goes on where it was when it is started
again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pieces import PIECES, SCENES, Scene, Setup
from sglang_slo.twin.workloads.workload import WorkloadError

FOLDER = Path(__file__).parent
SEEDS = "7,8,9"
Number = TypeVar("Number", int, float)
HEADINGS = {
    "attainment": "Attainment against load",
    "capacity": "Capacity: the highest load with 90 % of requests within their limits",
    "parts": "What each part gives: ours with it switched off",
    "lengths": "What knowing output lengths gives: ours with each predictor",
}
PREFACE = """# Results

**Judged by the p99 rule of version 0.1**: a limit on gaps held for the 99th percentile of a request's gaps. Version 0.2
judges every gap, unless a request asks for `percentile: 99`.

Made by `python benchmark/results.py`; do not edit. Runs of the twin (`python -m sglang_slo.twin`): the real scheduler
classes in virtual time on **modelled** latency profiles of the devices named, not measurements on them. Attainment:
share of requests with both limits kept (time to first token, 99th percentile gap). Every figure is the mean over
the seeds with its range. Best stock: the best of SGLang's own settings (fcfs, lpm, priority; mixed chunks on or off;
chunk 256 to 8192; conservativeness 0.3 and 1.0), searched for each workload and load. Upper bound: what no scheduler
can exceed (`python -m sglang_slo.twin bound`, derived in `twin/bound/upper_bound.py`); by the 99th percentile rule a
request of over 100 tokens may pause once for as long as it likes, so beside it stands the bound for schedulers that never let
any gap pass its limit.
"""


def keep(scene: Scene, piece: str, setup: Setup, text: str, folder: Path) -> Path:
    """Store a piece with what it was made from; atomically."""
    made: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "sglang": version("sglang"),
        "seeds": list(setup.seeds),
        "max_requests": scene.max_requests,
        "grid": setup.grid,
        "text": text,
    }
    path = folder / "results" / f"{scene.workload}-{piece}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1) + "\n")
    partial.replace(path)
    return path


def page(folder: Path) -> str:
    """The page from the pieces that are there."""
    text = [PREFACE]
    for scene in SCENES:
        kept = {piece: folder / "results" / f"{scene.workload}-{piece}.json" for piece in PIECES}
        there = {piece: json.loads(path.read_text()) for piece, path in kept.items() if path.exists()}
        if not there:
            continue
        text.append(f"## {scene.workload}\n\n{scene.title}.\n")
        for piece, made in there.items():
            seeds = ", ".join(str(s) for s in made["seeds"])
            size = f", first {made['max_requests']} requests" if made["max_requests"] else ""
            text.append(f"### {HEADINGS[piece]}\n")
            quick = ", quick grid of stock settings" if made.get("grid") == "quick" else ""
            text.append(
                f"{made['date']}, SGLang {made['sglang']}, seeds {seeds}{size}{quick}.\n\n{made['text']}\n"
            )
    return "\n".join(text)


def chosen(args: argparse.Namespace) -> tuple[list[Scene], list[str]]:
    """Scenes and pieces that the command line asks for. Raises ValueError naming the flag."""
    known = {scene.workload: scene for scene in SCENES}
    names = args.workloads.split(",") if args.workloads else list(known)
    pieces = args.pieces.split(",") if args.pieces else list(PIECES)
    for flag, given, those in (("--workloads", names, known), ("--pieces", pieces, PIECES)):
        wrong = [g for g in given if g not in those]
        if wrong:
            raise ValueError(f"{flag}: need some of {', '.join(those)}, got {wrong[0]!r}")
    scenes = [replace(known[name], max_requests=args.max_requests) for name in names]
    if args.loads:
        loads = _numbers("--loads", args.loads, float)
        scenes = [
            replace(s, loads=loads, main_load=min(loads, key=lambda x: abs(x - s.main_load))) for s in scenes
        ]
    return scenes, pieces


def _numbers(flag: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"{flag}: need numbers by comma, got {text!r}") from None


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for and write the page; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        scenes, pieces = chosen(args)
        seeds = _numbers("--seeds", args.seeds, int)
        grid = "quick" if args.quick_grid else "usual"
        setup = Setup(seeds, args.jobs, args.data, args.folder / "plots", grid)
        for scene in scenes if not args.page_only else ():
            for piece in pieces:
                print(f"{scene.workload}: {piece}", file=sys.stderr, flush=True)
                print(f"wrote {keep(scene, piece, setup, PIECES[piece](scene, setup), args.folder)}")
    except (ValueError, WorkloadError) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2
    (args.folder / "GRID.md").write_text(page(args.folder))
    print(f"wrote {args.folder / 'GRID.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workloads", help="some of mix,reason,agent,chat70b (default: all)")
    parser.add_argument("--pieces", help="some of attainment,capacity,parts,lengths (default: all)")
    parser.add_argument("--seeds", default=SEEDS, help="by comma (default: %(default)s)")
    parser.add_argument(
        "--max-requests", type=int, help="for a quick look: fewer requests than the workload's"
    )
    parser.add_argument("--loads", help="by comma (default: the workload's own)")
    parser.add_argument(
        "--quick-grid", action="store_true", help="some 15 settings of stock, see `twin compare`"
    )
    parser.add_argument("--data", default=os.environ.get("SGLANG_SLO_DATA"), help="folder with the traces")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core that has memory for it)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the page goes (default: here)")
    parser.add_argument("--page-only", action="store_true", help="only put the page together")
    return parser


if __name__ == "__main__":
    sys.exit(main())
