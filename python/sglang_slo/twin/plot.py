"""`plot`: runs as pictures. Attainment against load, latencies against limits, KV and iterations over time.

Every picture is drawn from `RunResult`s alone, with units on its axes and limits as dashed lines, and written
as PNG. `figure` is all that the other modules need to make one of their own in the same style.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sglang_slo.twin import flags
from sglang_slo.twin.bound.upper_bound import bound
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.runs import run_all, show_progress

# Distinct for every kind of colour vision (Okabe and Ito); black is kept for limits and bounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 130,
}
Curve = dict[float, list[float]]  # load -> attainment of each seed


@contextmanager
def figure(path: Path, rows: int, columns: int, title: str, height: float = 3.0) -> Iterator[NDArray[Any]]:
    """Axes [rows, columns] of a picture that is written to `path` at the end."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(4.6 * columns + 0.8, height * rows + 0.6), layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False)
        drawn.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date and no version in the file: the same figures give the same bytes.
        drawn.savefig(path, metadata={"Software": None})


def attainment_against_load(
    curves: dict[str, Curve], upper: dict[str, Curve], title: str, path: Path
) -> Path:
    """One line per scheduler through the mean of its seeds, with their range; upper bounds dotted."""
    with figure(path, 1, 1, title, height=3.6) as axes:
        ax: Axes = axes[0, 0]
        for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
            loads, low, mean, high = _range(curve)
            ax.plot(loads, mean, marker="o", markersize=3.5, color=colour, label=name)
            ax.fill_between(loads, low, high, color=colour, alpha=0.18, linewidth=0)
        for (name, curve), dashes in zip(upper.items(), (":", "-."), strict=False):
            loads, _, mean, _ = _range(curve)
            ax.plot(loads, mean, color="black", linestyle=dashes, linewidth=1.2, label=name)
        ax.set(xlabel="load (factor on the arrival rate)", ylabel="share of requests within limits")
        ax.set_ylim(0, 1.02)
        ax.legend(loc="lower left", fontsize=8)
    return path


def latency_cdfs(results: Sequence[RunResult], title: str, path: Path) -> Path:
    """Per class: distribution of the time to the first token and of the 99th percentile gap, log axes."""
    classes = [i for i in range(len(results[0].class_names)) if (results[0].requests.class_id == i).any()]
    with figure(path, len(classes), 2, title, height=2.5) as axes:
        for row, i in enumerate(classes):
            for column, field in enumerate(("ttft_s", "tbt_s")):
                ax: Axes = axes[row, column]
                for result, colour in zip(results, _colours(len(results)), strict=True):
                    rows = result.requests
                    values = getattr(rows, field)[rows.class_id == i]
                    if field == "tbt_s":
                        values = values[values > 0]  # requests of one token have no gap
                    _cdf(ax, values, colour, result.scheduler)
                limit = getattr(results[0].requests, field.replace("_s", "_limit_s"))
                limit_s = float(limit[results[0].requests.class_id == i][0])
                if math.isfinite(limit_s):
                    ax.axvline(limit_s * 1e3, color="black", linestyle="--", linewidth=1)
                what = "time to first token" if column == 0 else "99th percentile gap of a request"
                ax.set(xlabel=f"{what}, ms", ylabel="share of requests", xscale="log", ylim=(0, 1.02))
                ax.set_title(f"{results[0].class_names[i]}: {'TTFT' if column == 0 else 'TBT'}", loc="left")
        if axes[0, 0].lines:
            axes[0, 0].legend(loc="upper left", fontsize=7)
    return path


def kv_over_time(results: Sequence[RunResult], title: str, path: Path) -> Path:
    """KV held by unfinished requests, and the queue, over the time of the run."""
    line: Any = {"linewidth": 1, "drawstyle": "steps-post"}
    with figure(path, 2, 1, title, height=2.3) as axes:
        for result, colour in zip(results, _colours(len(results)), strict=True):
            its = result.iterations
            start = its.start_s - result.requests.arrival_s.min(initial=math.inf)
            axes[0, 0].plot(
                *_thinned(start, its.kv_used_tokens / 1e3), **line, color=colour, label=result.scheduler
            )
            axes[1, 0].plot(*_thinned(start, its.waiting), **line, color=colour)
        axes[0, 0].axhline(results[0].kv_capacity_tokens / 1e3, color="black", linestyle="--", linewidth=1)
        axes[0, 0].set(ylabel="KV in use, thousand tokens", ylim=(0, None))
        axes[0, 0].legend(fontsize=7)
        axes[1, 0].set(xlabel="time, s", ylabel="requests waiting", ylim=(0, None))
    return path


def iteration_times(results: Sequence[RunResult], title: str, path: Path) -> Path:
    """Distribution of iteration times, by share of busy time, against the gap limits of the classes."""
    with figure(path, 1, 1, title) as axes:
        ax: Axes = axes[0, 0]
        for result, colour in zip(results, _colours(len(results)), strict=True):
            order = np.argsort(result.iterations.duration_s)
            time_s = result.iterations.duration_s[order]
            share = np.cumsum(time_s) / max(float(time_s.sum()), 1e-12)
            ax.step(time_s * 1e3, share, where="post", color=colour, label=result.scheduler)
        limits = np.unique(results[0].requests.tbt_limit_s)
        for limit_s in limits[np.isfinite(limits)].tolist():
            ax.axvline(limit_s * 1e3, color="black", linestyle="--", linewidth=1)
        ax.set(xlabel="iteration time, ms (dashed: gap limits)", ylabel="share of busy time in shorter ones")
        ax.set(xscale="log", ylim=(0, 1.02))
        ax.legend(loc="upper left", fontsize=8)
    return path


def compare(results: Sequence[RunResult], folder: Path) -> list[Path]:
    """Pictures of several schedulers on one workload; what was written."""
    first = results[0]
    about = f"{first.workload} on {first.profile}, load {first.load:g}, seed {first.seed}"
    stem = folder / re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{first.workload}-load{first.load:g}")
    return [
        latency_cdfs(results, about, Path(f"{stem}-latency.png")),
        kv_over_time(results, about, Path(f"{stem}-kv.png")),
        iteration_times(results, about, Path(f"{stem}-iterations.png")),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `plot`."""
    flags.add_workload(parser)
    parser.add_argument(
        "--loads", default="0.5,1,1.5,2", help="loads to run, by comma (default: 0.5,1,1.5,2)"
    )
    parser.add_argument("--no-bound", action="store_true", help="leave out the upper bound")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots (default: out)")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Run ours and stock defaults at each load and draw. Raises ValueError naming the flag."""
    ours, shared = flags.split(rest)
    try:
        loads = sorted({float(word) for word in args.loads.split(",")})
    except ValueError:
        raise ValueError(f"--loads: need numbers separated by commas, got {args.loads!r}") from None
    base = flags.spec(args, "stock", shared, "stock defaults")
    pair = [replace(base, scheduler="slo", argv=(*shared, *ours), name="ours"), base]
    specs = [replace(spec, load=load) for load in loads for spec in pair]
    results = run_all(specs, args.jobs, show_progress, not args.no_cache)
    curves: dict[str, Curve] = {spec.name: {} for spec in pair}
    for spec, result in zip(specs, results, strict=True):
        curves[spec.name].setdefault(spec.load, []).append(result.attainment)
    upper: dict[str, Curve] = {}
    if not args.no_bound:
        points = {load: [bound(replace(base, load=load).requests()).attainment] for load in loads}
        upper["upper bound"] = points
    name = Path(args.workload).stem
    written = [attainment_against_load(curves, upper, name, args.out / f"{name}-attainment.png")]
    at = min(range(len(loads)), key=lambda i: abs(loads[i] - args.load))
    written += compare(results[2 * at : 2 * at + 2], args.out)
    for path in written:
        print(f"wrote {path}")
    return 0


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _range(curve: Curve) -> tuple[list[float], list[float], list[float], list[float]]:
    loads = sorted(curve)
    values = [curve[load] for load in loads]
    return loads, [min(v) for v in values], [sum(v) / len(v) for v in values], [max(v) for v in values]


def _cdf(ax: Axes, values: NDArray[np.float64], colour: str, label: str) -> None:
    """Unfinished requests (inf) keep the line below 1."""
    finite = np.sort(values[np.isfinite(values)])
    if len(finite):
        share = np.arange(len(finite) + 1) / len(values)
        finite = np.concatenate((finite[:1], finite))
        ax.step(np.maximum(finite, 1e-5) * 1e3, share, where="post", color=colour, label=label)


def _thinned(x: NDArray[Any], y: NDArray[Any], most: int = 4000) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `most` points: of each run of neighbours the largest, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    size = -(-len(x) // most)
    starts = np.arange(0, len(x), size)
    return x[starts], np.maximum.reduceat(y, starts)
