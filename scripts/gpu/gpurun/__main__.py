"""`python -m gpurun`: checks the imports, then runs the parts asked for, each in a process of its own with a
limit.

A part that fails or is cut off does not keep the others from running. `status.json` in the output folder
says what ran, how long, and what became of it; it is rewritten after every part. Exit status: 0 if all
parts asked for are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpurun import imports

PART_LIMIT_S = 520.0  # a part ends in under nine minutes
GRACE_S = 25.0  # for a part that was told to end to stop its servers
LETTERS = "abcdef"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse(argv)
    out, work = args.out.resolve(), args.work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args, out, work)
    if run_bounded(args, "check", out, work):
        return 1
    names = wanted(args.parts)
    codes = [run_bounded(args, name, out, work) for name in names]
    return 0 if not any(codes) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        default=["check"],
        help=f"check (imports only), all, a letter a to f, or one of {', '.join(part_names())}",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: everything small, to try it"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; given again, it goes on there"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and caches")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--arms", default="stock,ours", help="of stock, tuned, ours (default: stock,ours)")
    parser.add_argument("--loads", default="", help="three load factors of part c (default: 0.5,1,2)")
    parser.add_argument("--part-limit-s", type=float, default=PART_LIMIT_S, help="default: 520")
    parser.add_argument(
        "--pretend-cuda", action="store_true", help="check imports as on a GPU where there is none"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.arms = tuple(args.arms.split(","))
    try:
        args.loads = tuple(float(word) for word in args.loads.split(",") if word)
    except ValueError:
        parser.error(f"--loads: need three numbers such as 0.5,1,2, got {args.loads!r}")
    unknown = [arm for arm in args.arms if arm not in ("stock", "tuned", "ours")]
    if unknown or len(set(args.arms)) != len(args.arms):
        parser.error(f"--arms: need different ones of stock, tuned, ours; got {','.join(args.arms)}")
    if args.loads and (len(args.loads) != 3 or not all(0 < load < 1e3 for load in args.loads)):
        parser.error(f"--loads: need three numbers above 0, got {args.loads}")
    if args.rounds < 1:
        parser.error(f"--rounds: need at least 1, got {args.rounds}")
    bad = [part for part in args.parts if part not in ("check", "all", *LETTERS, *part_names())]
    if bad:
        parser.error(f"PART: unknown {bad[0]!r}; accepted: check, all, a to f, {', '.join(part_names())}")
    return args


def part_names() -> tuple[str, ...]:
    """Names of the parts, in the order in which they build on each other."""
    from gpurun.parts import PARTS

    return tuple(PARTS)


def wanted(asked: Sequence[str]) -> list[str]:
    """The parts behind what was asked for, each once, in their order."""
    from gpurun.parts import PARTS

    return [name for name, (letter, _) in PARTS.items() if {"all", name, letter} & set(asked)]


def check(args: argparse.Namespace, out: Path) -> int:
    """Say what is missing, if anything, and note what the figures will be measured on."""
    if args.pretend_cuda:
        imports.pretend_cuda()
    faults = imports.missing("pretended" if args.pretend_cuda else args.device)
    for fault in faults:
        print(f"missing: {fault}", flush=True)
    if faults:
        update(out, "check", state="failed", error="; ".join(faults))
        return 1
    update(out, "check", state="done", error="", environment=environment(args.device))
    return 0


def run_bounded(args: argparse.Namespace, name: str, out: Path, work: Path) -> int:
    """Run a part in a process group of its own; end the whole group if it outstays its limit."""
    options = {
        "--device": args.device,
        "--out": out,
        "--work": work,
        "--rounds": args.rounds,
        "--arms": ",".join(args.arms),
        "--loads": ",".join(map(str, args.loads)),
        "--part-limit-s": args.part_limit_s,
    }
    words = [str(word) for pair in options.items() for word in pair]
    pretend = ["--pretend-cuda"] if args.pretend_cuda else []
    command = [sys.executable, "-m", "gpurun", name, "--one", *words, *pretend]
    print(f"{name}: begins", flush=True)
    update(out, name, state="running", error="")
    begin = time.monotonic()
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(timeout=args.part_limit_s + 5)
    except subprocess.TimeoutExpired:
        code = _end(child)
        update(
            out, name, state="timeout", error=f"cut off after {args.part_limit_s:.0f} s; ask again to go on"
        )
    except BaseException:
        _end(child)
        raise
    finally:
        _kill_group(child.pid)  # whatever a killed part left behind
    seconds = time.monotonic() - begin
    status = update(out, name, seconds=round(seconds, 1))
    if status["state"] == "running":  # it ended without a word
        status = update(out, name, state="failed", error=f"ended with {code}")
    print(f"{name}: {status['state']} after {seconds:.0f} s {status.get('error', '')[:400]}", flush=True)
    return 0 if status["state"] == "done" else 1


def run_one(args: argparse.Namespace, out: Path, work: Path) -> int:
    """Run one part in this process and note what became of it."""
    from gpurun.parts import PARTS
    from gpurun.run import SIZES, OutOfTimeError, Run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    [name] = args.parts
    if name == "check":
        return check(args, out)
    run = Run(
        args.device,
        out,
        work,
        args.rounds,
        args.arms,
        args.loads,
        time.monotonic() + args.part_limit_s,
        SIZES[args.device],
    )
    try:
        PARTS[name][1](run)
    except OutOfTimeError as error:
        update(out, name, state="partial", error=str(error))
        return 1
    except Exception as error:  # any: the other parts have to run
        update(out, name, state="failed", error=f"{type(error).__name__}: {error}"[:4000])
        return 1
    update(out, name, state="done", error="")
    return 0


def update(out: Path, part: str, **fields: Any) -> dict[str, Any]:
    """Note `fields` of a part in status.json; returns the part's entry."""
    path = out / "status.json"
    status = json.loads(path.read_text()) if path.exists() else {}
    entry = status.setdefault(part, {})
    entry.update(fields, at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(status, indent=1) + "\n")
    partial.replace(path)
    return dict(entry)


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    card = "none"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device,
        "gpu": card,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": imports.versions(),
    }


def _end(child: subprocess.Popen[bytes]) -> int:
    child.terminate()
    try:
        return child.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_group(child.pid)
        return child.wait()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
