"""Folds the results of a GPU visit into benchmark/GPU.md: tables, plots, and on request the measured profile.

    python benchmark/gpu_report.py OUT                    rewrites the results of benchmark/GPU.md and its plots
    python benchmark/gpu_report.py OUT --print            prints the tables only
    python benchmark/gpu_report.py OUT --install-profile  also puts the measured profile in place of the modelled one

Only results of a GPU get into GPU.md and the shipped profile; those of a trial on a CPU can be printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_plots import plot
from gpu_results import Results, ResultsError
from gpu_tables import report
from sglang_slo.core.latency import LatencyModel, ProfileError
from sglang_slo.twin.devices.profiles import DATA

PAGE = Path(__file__).with_name("GPU.md")
BEGIN, END = "<!-- results: written by gpu_report.py -->", "<!-- end of results -->"
PROFILE = "h200-llama3-8b"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="output folder of scripts/gpu/run.sh")
    parser.add_argument(
        "--print", action="store_true", dest="only_print", help="leave GPU.md and plots alone"
    )
    parser.add_argument("--install-profile", action="store_true", help=f"replace the shipped {PROFILE}")
    args = parser.parse_args(argv)
    try:
        results = Results.read(args.out)
        text = report(results)
        if args.only_print:
            print(text)
            return 0
        require_gpu(results)
        if args.install_profile:
            print(f"written: {install_profile(results, DATA / 'profiles')}")
        pictures = plot(results, PAGE.parent)
        links = "\n".join(f"![{p.stem}]({p.name})" for p in pictures)
        PAGE.write_text(folded(PAGE.read_text(), f"{text}\n{links}".strip()))
    except (ResultsError, ProfileError, OSError) as error:
        print(f"gpu_report.py: {error}", file=sys.stderr)
        return 1
    print(f"written: {PAGE}, {len(pictures)} plots")
    return 0


def require_gpu(results: Results) -> None:
    """Raises ResultsError unless the runs were made on a GPU."""
    env = results.environment
    if env["device"] != "cuda" or not env.get("gpu"):
        raise ResultsError(
            f"{results.folder}: measured with --device {env['device']}; only runs on a GPU are published "
            "(--print shows these)"
        )


def folded(page: str, text: str) -> str:
    """`page` with what is between its two markers replaced. Raises ResultsError if they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultsError(f"{PAGE}: need the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def install_profile(results: Results, folder: Path) -> Path:
    """Put the measured profile in place of the modelled one; what was not measured (swap) stays as it was.

    Raises ResultsError if there is none, ProfileError if it cannot be used.
    """
    source, target = results.folder / "profile" / "profile.json", folder / f"{PROFILE}.json"
    if not source.exists():
        raise ResultsError(f"{source}: no profile was measured (part b)")
    measured, modelled = LatencyModel.load(source), LatencyModel.load(target)
    if not measured.measured:
        raise ResultsError(f"{source}: not marked as measured")
    about: dict[str, Any] = {
        key: modelled.meta[key] for key in ("swap", "schedule_s", "process_s") if key in modelled.meta
    }
    meta: dict[str, Any] = {**about, **measured.meta, "source": f"measured on {results.environment['gpu']}"}
    replace(
        measured,
        name=PROFILE,
        meta=meta,
        swap_bytes_per_s=modelled.swap_bytes_per_s,
        swap_overhead_s=modelled.swap_overhead_s,
    ).save(target)
    return target


if __name__ == "__main__":
    sys.exit(main())
