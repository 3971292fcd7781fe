"""Results as a table that a manager can read: one row per scheduler, best first within its group."""

from __future__ import annotations

import math

from sglang_slo.core.slo import GapRule
from sglang_slo.twin.result.run_result import RunResult

Row = tuple[str, RunResult]
RULES = {
    GapRule.EVERY: "every gap within",
    GapRule.PACE: "token i by i times",
    GapRule.P99: "99 of 100 gaps within",
}


def render(rows: list[Row]) -> str:
    """Aligned text. Columns: kept promises in all and per class, goodput, tails, throughput, waste."""
    if not rows:
        return ""
    classes = rows[0][1].class_names
    head = [
        "",
        "kept",
        *classes,
        "good req/s",
        "first token p50/p99",
        "longest pause p99/max",
        "tokens/s",
        "redone",
    ]
    lines = [head] + [[name, *_cells(result, classes)] for name, result in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for number, line in enumerate(lines):
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("-" * len(text[0]))
    return "\n".join(text)


def legend(result: RunResult) -> str:
    """What the numbers mean, and the limits they are judged by."""
    limits = {}
    for i, name in enumerate(result.class_names):
        rows = result.requests.class_id == i
        if rows.any():
            first, gap = result.requests.ttft_limit_s[rows][0], result.requests.tbt_limit_s[rows][0]
            rule = GapRule(int(result.requests.gap_rule[rows][0]))
            limits[name] = f"{name}: first token within {_seconds(first)}, {RULES[rule]} {_seconds(gap)}"
    return (
        f"{len(result.requests.arrival_s)} requests of {result.workload} on {result.profile}, "
        f"load {result.load:g}, seed {result.seed}.\n"
        "kept: share of requests that kept all they declared, gaps by each one's own rule. "
        "longest pause: the longest gap of a request, over all requests. redone: prompt tokens computed again.\n"
        + "; ".join(limits.values())
        + "."
    )


def _cells(result: RunResult, classes: list[str]) -> list[str]:
    m = result.measures()
    return [
        f"{m['attainment']:.1%}",
        *(f"{m['classes'][c]['attainment']:.1%}" if m["classes"][c]["requests"] else "-" for c in classes),
        f"{m['goodput_rps']:.2f}",
        f"{_seconds(m['ttft_s']['p50'])} / {_seconds(m['ttft_s']['p99'])}",
        f"{_seconds(m['longest_pause_s']['p99'])} / {_seconds(m['longest_pause_s']['max'])}",
        f"{m['throughput_tps']:.0f}",
        f"{m['recompute_tax']:.1%}",
    ]


def _seconds(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.3g} s"
