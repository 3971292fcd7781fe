"""Figures with their spread, and tables of them in Markdown: what the results page is made of.

Every figure stands for several seeds (or rounds); it is printed as its mean with the range, never the mean
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_slo.twin.result.run_result import RunResult


@dataclass(frozen=True)
class Measure:
    """A figure of a run: its name, how to read it from `RunResult.measures()`, and how to print it.

    `better`: 1 if more is better, -1 if less is. `least`: differences up to this are taken for none.
    """

    name: str
    read: Callable[[dict[str, Any]], float]
    unit: str
    better: int = 1
    least: float = 0.0


MEASURES = (
    Measure("attainment", lambda m: m["attainment"], "", 1, 0.005),
    Measure("goodput, req/s", lambda m: m["goodput_rps"], " /s", 1, 0.02),
    Measure("throughput, tokens/s", lambda m: m["throughput_tps"], " /s", 1, 1.0),
    Measure("first token, median", lambda m: m["ttft_s"]["p50"], " s", -1, 0.001),
    Measure("first token, p99", lambda m: m["ttft_s"]["p99"], " s", -1, 0.01),
    Measure("gap (p99 of a request), median", lambda m: m["tbt_s"]["p50"], " s", -1, 0.001),
    Measure("gap (p99 of a request), p99", lambda m: m["tbt_s"]["p99"], " s", -1, 0.001),
    Measure("mean gap, median", lambda m: m["tpot_s"]["p50"], " s", -1, 0.0005),
    Measure("prompt tokens computed again", lambda m: m["recompute_tax"], "", -1, 0.001),
    Measure("preemptions", lambda m: float(m["retractions"]), "", -1, 0.5),
    Measure("KV in use, mean", lambda m: m["kv_use"]["mean"], "", 0),
)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(lowest, mean, highest). Raises ValueError if there is none."""
    if not values:
        raise ValueError("no value to take the spread of")
    return min(values), sum(values) / len(values), max(values)


def share_with_spread(values: Sequence[float]) -> str:
    """Mean and range of shares: "0.913 (0.905-0.921)"; a single value stands alone."""
    low, mean, high = spread(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({low:.3f}-{high:.3f})"


def with_spread(values: Sequence[float], unit: str = "") -> str:
    """Mean and range to three digits."""
    low, mean, high = spread(values)
    if len(values) == 1:
        return f"{mean:.3g}{unit}"
    return f"{mean:.3g}{unit} ({low:.3g}-{high:.3g})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def classes_table(runs: dict[str, list[RunResult]]) -> str:
    """Attainment in all and per class, one row per scheduler; each list holds one result per seed."""
    first = next(iter(runs.values()))[0]
    names = [c for i, c in enumerate(first.class_names) if (first.requests.class_id == i).any()]
    rows = []
    for scheduler, results in runs.items():
        measures = [r.measures() for r in results]
        cells = [share_with_spread([m["classes"][c]["attainment"] for m in measures]) for c in names]
        rows.append([scheduler, share_with_spread([m["attainment"] for m in measures]), *cells])
    return markdown_table(["", "all", *names], rows)


def measures_table(runs: dict[str, list[RunResult]]) -> str:
    """Every measure, one row each, one column per scheduler."""
    read = {name: [r.measures() for r in results] for name, results in runs.items()}
    rows = [
        [m.name, *(with_spread([m.read(one) for one in of], m.unit) for of in read.values())]
        for m in MEASURES
    ]
    return markdown_table(["", *runs], rows)


def what_got_worse(ours: list[RunResult], other: list[RunResult]) -> list[str]:
    """Measures, in all and attainment per class, in which `ours` is worse than `other`; seeds in the same order."""
    mine, theirs = [r.measures() for r in ours], [r.measures() for r in other]
    worse = []
    for m in MEASURES:
        a, b = [m.read(x) for x in mine], [m.read(x) for x in theirs]
        if m.better * (spread(b)[1] - spread(a)[1]) > m.least:
            worse.append(f"{m.name}: {with_spread(a, m.unit)} against {with_spread(b, m.unit)}")
    for name in ours[0].class_names:
        if not mine[0]["classes"][name]["requests"]:
            continue
        a = [x["classes"][name]["attainment"] for x in mine]
        b = [x["classes"][name]["attainment"] for x in theirs]
        if spread(b)[1] - spread(a)[1] > MEASURES[0].least:
            worse.append(f"attainment of {name}: {share_with_spread(a)} against {share_with_spread(b)}")
    return worse
