"""`compare`: ours, ours with each part off, stock SGLang as it comes, and the best stock of a grid.

The grid is fcfs/lpm/priority x mixed on/off x chunk 256..8192 x conservativeness 0.3/1.0. Not all is run:
  - lpm is fcfs where no prompt shares a prefix (no cached token under fcfs: all prefix lengths tie);
  - priority is fcfs where all requests are of one class;
  - conservativeness 0.3, preemption by priority, and newer releases' interval between prefills only on top of the
    four best: they move admission alone, little beside the rest.
Queue policies of newer releases are tried where the installed one has them.
The first two lose nothing; `--full-grid` runs everything. `--quick-grid` runs chunk 256, 512, 1024, 2048 and 8192 under
fcfs, lpm and priority with the best two of these, and 0.3 with the best one. The winner has the best attainment, then
goodput.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from sglang_slo.twin import flags
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.result.table import Row, legend, render
from sglang_slo.twin.runs import Spec, run_all, show_progress

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
# 256 wins where gap limits are tight (chat70b), 1024 where prompts are long and shared (agent)
QUICK_CHUNKS = (256, 512, 1024, 2048, 8192)
POLICIES = ("fcfs", "lpm", "priority")
# Of upstream's newer releases: tried where the installed one has them.
NEWER_POLICIES = ("hrrn", "shortest-prefill-first")
# One at a time on top of the best settings, where the installed release has the flag.
REFINEMENTS: dict[str, tuple[str, ...]] = {
    "loose": ("--schedule-conservativeness", "0.3"),
    "preempting": ("--priority-scheduling-preemption-threshold", "0"),
    "interval 2": ("--prefill-decode-interval", "2"),
    "interval 8": ("--prefill-decode-interval", "8"),
}
FINALISTS = 4
# Each part of ours, switched off (or to its alternatives) alone.
PARTS = {
    "chunk fixed": ("--slo-chunk", "fixed"),
    "order stock": ("--slo-order", "stock"),
    "packing greedy": ("--slo-packing", "greedy"),
    "mix always": ("--slo-mix", "always"),
    "mix never": ("--slo-mix", "never"),
    "park off": ("--slo-park", "off"),
    "decode buckets off": ("--slo-decode-buckets", "off"),
    "length mean": ("--slo-length", "mean"),
    "length none": ("--slo-length", "none"),
    "bound hoeffding": ("--slo-bound", "hoeffding"),
    "kv full": ("--slo-kv", "full"),
    "kv stock": ("--slo-kv", "stock"),
    "lookahead off": ("--slo-lookahead-tokens", str(1 << 30)),
    "arrival reserve off": ("--slo-arrival-reserve", "0"),
    "reserve fixed": ("--slo-reserve-ceiling", "0.01"),
    "victims latest": ("--slo-victims", "latest"),
    "preempt recompute": ("--slo-preempt", "recompute"),
    "preempt stock": ("--slo-preempt", "stock"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compare`."""
    flags.add_workload(parser)
    parser.add_argument("--no-parts", action="store_true", help="leave out ours with each part off")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--full-grid", action="store_true", help="run every setting of the stock grid")
    grid.add_argument("--quick-grid", action="store_true", help="run some 15 settings of the stock grid")
    parser.add_argument("--bound", action="store_true", help="also what no scheduler can exceed (minutes)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots (default: out)")


def command(args: argparse.Namespace, rest: list[str]) -> int:
    """Run and print. `rest`: further flags, --slo-* ones for ours and the others for everybody."""
    ours, shared = flags.split(rest)
    base = flags.spec(args, "stock", shared)
    show = show_progress
    slo = [replace(base, scheduler="slo", argv=(*shared, *ours), name="ours")]
    if not args.no_parts:
        slo += [
            replace(slo[0], argv=(*slo[0].argv, *off), name=f"ours, {name}") for name, off in PARTS.items()
        ]
    results = run_all([replace(base, name="stock defaults"), *slo], args.jobs, show, not args.no_cache)
    extent = "full" if args.full_grid else "quick" if args.quick_grid else "usual"
    grid = best_stock(base, args.jobs, extent, keep=not args.no_cache)
    best = max(grid, key=merit)
    rows: list[Row] = [
        (slo[0].name, results[1]),
        (f"best stock: {best.scheduler.removeprefix('stock ')}", best),
        ("stock defaults", results[0]),
        *((r.scheduler, r) for r in results[2:]),
    ]
    if args.json:
        for result in [*results, *grid]:
            print(result.to_json())
        return 0
    print(render(rows))
    print(
        f"\n{legend(best)}\nBest of {len(grid)} stock settings by attainment; see --help for which are tried."
    )
    _plot([result for _, result in rows[:3]], args.out)
    return 0


def best_stock(
    base: Spec, jobs: int | None = None, extent: str = "usual", keep: bool = True
) -> list[RunResult]:
    """Results of the stock grid on the workload of `base`, in the order they were run. `extent`: full, usual, quick."""
    full, quick = extent == "full", extent == "quick"
    known, newer = stock_has()
    chunks = QUICK_CHUNKS if quick else CHUNKS
    settings = [(mixed, chunk) for mixed in (True, False) for chunk in chunks]
    first = [_setting(base, "fcfs", mixed, chunk) for mixed, chunk in settings]
    results = run_all(first, jobs, show_progress, keep)
    policies = [*POLICIES[1:], *(p for p in NEWER_POLICIES if p in newer)]
    if not full and not any(r.requests.cached_tokens.any() for r in results):
        policies.remove("lpm")
    if not full and len(set(results[0].requests.class_id.tolist())) == 1:
        policies.remove("priority")
    if quick:
        settings = [settings[i] for i in _best_first(results)[:2]]
    second = [_setting(base, p, mixed, chunk) for p in policies for mixed, chunk in settings]
    results += run_all(second, jobs, show_progress, keep)
    specs = first + second
    order = _best_first(results)
    finalists = order if full else order[: 1 if quick else FINALISTS]
    third = [
        replace(specs[i], argv=(*specs[i].argv, *more), name=f"{specs[i].name} {name}")
        for i in finalists
        for name, more in REFINEMENTS.items()
        if more[0] in known and (name != "preempting" or "--enable-priority-scheduling" in specs[i].argv)
    ]
    return results + run_all(third, jobs, show_progress, keep)


@lru_cache(maxsize=1)
def stock_has() -> tuple[frozenset[str], frozenset[str]]:
    """Flags and queue policies of the SGLang that is installed."""
    import sglang_slo.twin.platform as twin_platform

    twin_platform.settle()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    return frozenset(actions), frozenset(actions["--schedule-policy"].choices or ())


def _best_first(results: list[RunResult]) -> list[int]:
    return sorted(range(len(results)), key=lambda i: merit(results[i]), reverse=True)


def _setting(base: Spec, policy: str, mixed: bool, chunk: int) -> Spec:
    argv = ["--chunked-prefill-size", str(chunk)]
    # Priority is a switch over fcfs order in SGLang, not a policy of its own.
    argv += ["--enable-priority-scheduling"] if policy == "priority" else ["--schedule-policy", policy]
    argv += ["--enable-mixed-chunk"] if mixed else []
    name = f"stock {policy} {'mixed ' if mixed else ''}{chunk}"
    return replace(base, argv=(*base.argv, *argv), name=name)


def merit(result: RunResult) -> tuple[float, float]:
    """By which a setting is the best: attainment, then goodput."""
    return result.attainment, result.goodput_rps


def _plot(results: list[RunResult], folder: Path) -> None:
    try:
        plot = importlib.import_module("sglang_slo.twin.plot")
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return
    for path in plot.compare(results, folder):
        print(f"wrote {path}")
