"""Ours beside stock settings, every gap counted, in the twin; each run's figures as one JSON row.

    python benchmark/strict.py --data FOLDER --out benchmark/results/strict.json       # all of TABLE, an hour or two
    python benchmark/strict.py --data FOLDER --only reason --seeds 7 --out rows.json

    python benchmark/strict.py --page benchmark/results/strict.json > benchmark/RESULTS.md

A row that is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sglang_slo.twin.bound.upper_bound import bound
from sglang_slo.twin.runs import Spec, run_all

# measured kernels; without a device: the workload's modelled profile
H200 = "meta-llama/Meta-Llama-3.1-8B,h200_sxm"
H200_70B = "meta-llama/Meta-Llama-3.1-70B,h200_sxm,quant=fp8_block"


@dataclass(frozen=True)
class Cell:
    """One workload at one load. `stock`: settings of stock SGLang that have been best near there."""

    workload: str
    load: float
    stock: tuple[tuple[str, ...], ...]
    max_requests: int | None = None
    device: str | None = None
    ours: tuple[tuple[str, ...], ...] = ((),)
    seeds: int = 3


def _stock(policy: str, chunk: int, *more: str) -> tuple[str, ...]:
    order = ("--enable-priority-scheduling",) if policy == "priority" else ("--schedule-policy", policy)
    return (*order, "--chunked-prefill-size", str(chunk), *more)


MIXED, LOOSE = "--enable-mixed-chunk", ("--schedule-conservativeness", "0.3")
KV_SHORT = (
    _stock("fcfs", 256, MIXED, *LOOSE),
    _stock("fcfs", 256, MIXED),
    _stock("fcfs", 512, MIXED, *LOOSE),
    _stock("lpm", 2048),
)
LATENCY = (_stock("priority", 512, MIXED), _stock("lpm", 512, MIXED), _stock("lpm", 1024, MIXED))
NEITHER = (_stock("lpm", 2048), _stock("fcfs", 8192))
WAITS = tuple(("--slo-lost-wait-s", str(s)) for s in (300, 600))
HOST_KV = ("--slo-host-kv-gb", "40")
TABLE = (
    Cell("reason", 0.5, KV_SHORT, ours=((), *WAITS)),
    Cell("reason", 1.0, KV_SHORT, ours=((), *WAITS)),
    Cell("reason-pace", 0.5, KV_SHORT, ours=((), HOST_KV)),
    Cell("reason-pace", 1.0, KV_SHORT, ours=((), HOST_KV)),
    Cell("mix", 2.0, LATENCY, 1500, H200),
    Cell("mix", 1.0, LATENCY, 1500, H200),
    Cell("agent", 1.0, LATENCY, 700, H200),
    Cell("agent", 1.5, LATENCY, 700, H200),
    Cell("r1", 0.6, KV_SHORT[:1], seeds=1),
    Cell("chat70b", 0.5, LATENCY, device=H200_70B, seeds=1),
    Cell("chat70b", 0.5, LATENCY, seeds=1),
    Cell("overload", 1.0, LATENCY[:2], seeds=1),
    Cell("cached", 1.0, NEITHER, seeds=1),
    Cell("tight", 1.0, LATENCY[:2], ours=((), ("--slo-decode-buckets", "off")), seeds=1),
    Cell("alpaca", 1.0, KV_SHORT[:2], seeds=1),
)


def specs(cell: Cell, seeds: list[int], data: str | None) -> list[Spec]:
    """The runs of one cell: ours on all seeds, stock's settings on the first, and its best is left to the reader."""
    common = (cell.max_requests, data)
    wanted = [("slo", argv, seed) for argv in cell.ours for seed in seeds[: cell.seeds if not argv else 1]]
    wanted += [("stock", argv, seeds[0]) for argv in cell.stock]
    return [
        Spec(cell.workload, scheduler, argv, cell.load, seed, *common, device=cell.device)
        for scheduler, argv, seed in wanted
    ]


def row(spec: Spec, measures: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one run: its figures, and the day."""
    classes = {name: figures["attainment"] for name, figures in measures["classes"].items()}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "workload": spec.workload,
        "load": spec.load,
        "seed": spec.seed,
        "requests": spec.max_requests,
        "device": spec.device or measures["profile"] + " (modelled)",
        "scheduler": spec.scheduler,
        "argv": list(spec.argv),
        "attainment": measures["attainment"],
        "bound": bound(spec.requests()).attainment if spec.scheduler == "slo" else None,
        "by_rule": measures["attainment_by_rule"],
        "classes": classes,
        "misses": measures["misses"],
        "longest_pause_s": measures["longest_pause_s"],
        "preemptions": measures["preemptions"],
        "recompute_tax": measures["recompute_tax"],
        "throughput_tokens_per_s": measures["throughput_tps"],
    }


HEAD = """# Results

Made by `python benchmark/strict.py --page benchmark/results/strict.json`; do not edit. Runs of the twin: the real
scheduler classes of SGLang in virtual time, stock's and ours, with radix cache, allocator and retraction real.

**Kept** is by what each request declared: its first token, and every single gap between deliveries (`reason-pace`: each token
by the time that a reader at 100 ms a token needs it). Behind it stands the gap limit read by other rules, and the longest
pause: the longest gap of a request, 99th percentile and maximum over the requests of a run.

Devices: kernels measured on the GPU named (aiconfigurator-core), where no "modelled" stands; what is modelled is a
latency formula of our own making. **Nothing here was measured on a GPU by us.** Ours: mean over the seeds with the range.
Stock: the best, on the first seed, of the settings listed in `benchmark/strict.py`, a handful that have been best near
there, not a full search. The bound: no scheduler attains more (`sglang_slo.twin bound`), whatever it knows of the future.
A line with a day was run with SGLang 0.5.23; one without, with 0.5.17, before the twin charged the time that planning
takes, and before later changes of the code.
Capacities, ablations and predictors have not been run under this rule.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The results page from kept rows."""
    text = [HEAD]
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for r in rows:
        cells.setdefault((r["workload"], r["load"], r["device"]), []).append(r)
    for (workload, load, device), found in cells.items():
        text += [f"\n## {workload}, load {load:g}\n", f"{device}; {_requests(found[0])}.\n", *_table(found)]
    return "\n".join(text) + "\n"


def _requests(r: dict[str, Any]) -> str:
    return f"the first {r['requests']} requests" if r["requests"] else "all requests of the workload"


def _table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | seeds | kept | every gap / p99 / mean | pause p99 / max, s | preemptions | redone | tokens/s | run |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in found:
        if r["scheduler"] == "slo":
            groups.setdefault(tuple(r["argv"]), []).append(r)
    for argv, same in groups.items():
        lines.append(_line("ours " + " ".join(argv), same))
    stock = [r for r in found if r["scheduler"] == "stock"]
    if stock:
        best = max(stock, key=lambda r: r["attainment"])
        lines.append(_line(f"best of {len(stock)} stock: " + " ".join(best["argv"]), [best]))
    bounds = [(r["attainment"], r["bound"]) for r in next(iter(groups.values()), []) if r.get("bound")]
    if bounds:
        shares = ", ".join(f"{ours / most:.3f} of {most:.3f}" for ours, most in bounds)
        lines.append(f"\nOurs of the bound, by seed: {shares}.")
    classes = next(iter(groups.values()))[0]["classes"] if groups else {}
    if len(classes) > 1:
        by_class = ", ".join(f"{name} {share:.3f}" for name, share in classes.items())
        lines.append(f"\nOurs by class, first seed: {by_class}.")
    return lines


def _line(name: str, same: list[dict[str, Any]]) -> str:
    def mean(key: Any) -> float:
        return sum(key(r) for r in same) / len(same)

    shares = [r["attainment"] for r in same]
    spread = f" ({min(shares):.3f}-{max(shares):.3f})" if len(same) > 1 else ""
    cells = [
        name.strip(),
        ", ".join(str(r["seed"]) for r in same),
        f"{mean(lambda r: r['attainment']):.3f}{spread}",
        " / ".join(
            f"{sum(r['by_rule'][rule] for r in same) / len(same):.3f}" for rule in ("every", "p99", "mean")
        ),
        f"{mean(lambda r: r['longest_pause_s']['p99']):.3g} / {max(r['longest_pause_s']['max'] for r in same):.3g}",
        f"{mean(lambda r: r['preemptions']):.0f}",
        f"{mean(lambda r: r['recompute_tax']):.0%}",
        f"{mean(lambda r: r['throughput_tokens_per_s']):.0f}",
        max(r.get("date", "") for r in same),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Run what is not in the file yet, and keep each row as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with the traces")
    parser.add_argument("--out", type=Path, help="file that rows are kept in")
    parser.add_argument("--page", type=Path, help="print the page of this file instead")
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--seeds", default="7,8,9")
    args = parser.parse_args()
    if args.page:
        print(page(json.loads(args.page.read_text())), end="")
        return 0
    if not args.out:
        parser.error("--out: needed to keep rows in")
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    seeds = [int(s) for s in args.seeds.split(",")]
    known = {
        (r["workload"], r["load"], r["seed"], r["scheduler"], tuple(r["argv"]), "modelled" in r["device"])
        for r in rows
    }
    for cell in TABLE:
        if args.only and cell.workload != args.only:
            continue
        for spec in specs(cell, seeds, args.data):
            if (spec.workload, spec.load, spec.seed, spec.scheduler, spec.argv, spec.device is None) in known:
                continue
            [result] = run_all([spec], 1)
            rows.append(row(spec, result.measures()))
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                f"{spec.title} {spec.workload} {spec.load} seed {spec.seed}: {result.attainment:.3f}",
                file=sys.stderr,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
