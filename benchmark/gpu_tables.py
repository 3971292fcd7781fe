"""The results of a GPU visit as Markdown, one section for each part that has runs; a part without runs says so."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gpu_results import Getter, Results, Spread, counted, figure, find, idle_share, ratio
from sglang_slo.core.latency import LatencyModel

PARTS = ("start", "serve", "profile", "mix-low", "mix-mid", "mix-high", "pressure", "overhead", "twin")
WITHIN = 0.15  # the twin and reality agree if their ratio is within this of 1
Columns = Sequence[tuple[str, Getter, int]]  # heading, what it shows, digits

SERVE: Columns = (
    ("output tokens/s", figure("result", "output_throughput"), 0),
    ("TTFT p50 ms", figure("result", "median_ttft_ms"), 1),
    ("TTFT p99 ms", figure("result", "p99_ttft_ms"), 1),
    ("TPOT p50 ms", figure("result", "median_tpot_ms"), 2),
    ("ITL p99 ms", figure("result", "p99_itl_ms"), 1),
)
REPLAY: Columns = (
    ("attainment", figure("result", "attainment"), 3),
    ("goodput req/s", figure("result", "goodput_rps"), 2),
    ("tokens/s", figure("result", "throughput_tps"), 0),
    ("TTFT p50 s", figure("result", "ttft_s", "p50"), 3),
    ("TTFT p99 s", figure("result", "ttft_s", "p99"), 3),
    ("TBT p50 ms", figure("result", "tbt_s", "p50", scale=1e3), 1),
    ("TBT p99 ms", figure("result", "tbt_s", "p99", scale=1e3), 1),
    ("errors", figure("result", "notes", "errors"), 0),
)
PRESSURE: Columns = (
    *REPLAY[:2],
    REPLAY[4],
    REPLAY[6],
    ("retracted by stock", counted("num_retracted_requests_total"), 0),
    ("preempted", counted("sglang_slo_preemptions"), 0),
    ("swapped", counted("sglang_slo_swap_ins"), 0),
    ("recomputed tokens", counted("sglang_slo_recomputed_tokens|num_retracted_input_tokens"), 0),
)
OVERHEAD: Columns = (*SERVE[:1], ("device idle share", idle_share, 3))


def report(results: Results) -> str:
    """All sections."""
    sections = [head(results), served(results), profile(results), mix(results), pressure(results),
                overhead(results), twin(results)]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def head(results: Results) -> str:
    """On what, and which parts ran."""
    env = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items())
    lines = [
        f"Device: {env.get('gpu') or 'none'} (`--device {env['device']}`), {env.get('cores')} CPU cores."
    ]
    lines += [f"Versions: {versions}.", "", "| part | state | seconds | note |", "|---|---|---|---|"]
    for part in PARTS:
        entry = results.status.get(part, {"state": "not run"})
        note = str(entry.get("error", "")).splitlines()[:1]
        lines.append(f"| {part} | {entry['state']} | {entry.get('seconds', '')} | {' '.join(note)[:120]} |")
    return "\n".join(lines)


def served(results: Results) -> str:
    """(a)"""
    lines = ["### (a) Start, generate, bench_serving", ""]
    for run in results.runs("start"):
        if "start_s" in run:
            lines.append(f"- {run['arm']}: {run['start_s']:.1f} s from process start to healthy.")
        else:
            same = all(run["equal_to_first"].values())
            lines.append(f"- Greedy output of {run['tokens']} tokens: {'equal' if same else 'NOT equal'}.")
    return "\n".join([*lines, "", table(results, "serve", SERVE)])


def profile(results: Results) -> str:
    """(b)"""
    title = "### (b) Latency profile"
    path = results.folder / "profile" / "profile.json"
    if not path.exists():
        return f"{title}\n\nNot run."
    model = LatencyModel.load(path)
    c = model.coefficients
    rows = [f"| {name} | {getattr(c, name):.4g} |" for name in c.__dataclass_fields__]
    fit = json.dumps(model.meta.get("fit", {}))
    margins = f"{model.margin_extend:.3f} with prefill, {model.margin_decode:.3f} without"
    margin = f"margins (high quantiles of measured over predicted) {margins}"
    tail = f"Residuals of the fit: {fit}; {margin}."
    return "\n".join([title, "", "| coefficient | seconds |", "|---|---|", *rows, "", tail])


def mix(results: Results) -> str:
    """(c)"""
    lines = ["### (c) `mix` at three loads"]
    for level, load in results.levels():
        get = REPLAY[0][1]
        gain = ratio(results.of("mix", "ours", get, level), results.of("mix", "stock", get, level))
        lines += ["", f"Load {load:g}: attainment of ours over stock {_times(gain)}.", ""]
        lines.append(table(results, "mix", REPLAY, level))
    return "\n".join(lines if len(lines) > 1 else [*lines, "", "Not run."])


def pressure(results: Results) -> str:
    """(d)"""
    lines = ["### (d) KV pressure", "", table(results, "pressure", PRESSURE)]
    crossing: dict[str, float] = {}
    for run in results.runs("pressure"):
        crossing.update(find(run.get("status"), "crossing"))
    said = ", ".join(f"{name} {value:g}" for name, value in crossing.items())
    return "\n".join(
        [*lines, "", f"Swap against recompute, measured: {said or 'no crossing length was reported'}."]
    )


def overhead(results: Results) -> str:
    """(e)"""
    get = OVERHEAD[0][1]
    gain = ratio(results.of("overhead", "ours", get), results.of("overhead", "stock", get))
    shown = table(results, "overhead", OVERHEAD)
    return "\n".join(
        ["### (e) Overhead at saturation", "", shown, "", f"Tokens/s, ours over stock: {_times(gain)}."]
    )


def twin(results: Results) -> str:
    """(f)"""
    rows = []
    for run in results.runs("twin"):
        for name, get, _ in (REPLAY[0], REPLAY[3], REPLAY[5]):
            real, said = results.of("mix", run["arm"], get, run["level"]), get(run)
            if real is None or said is None:
                continue
            off = said / real.mid - 1 if real.mid else float("nan")
            verdict = "within 15 %" if abs(off) <= WITHIN else "NOT within 15 %"
            cells = (run["arm"], f"{run['load']:g}", name, real.text(), f"{said:.3f}", f"{off:+.1%}", verdict)
            rows.append(f"| {' | '.join(cells)} |")
    top = ["| arm | load | figure | measured | twin | off by | |", "|---|---|---|---|---|---|---|"]
    return "\n".join(["### (f) The twin against (c)", "", *([*top, *rows] if rows else ["Not run."])])


def table(results: Results, part: str, columns: Columns, level: str | None = None) -> str:
    """One line per arm: median [least, greatest] over its rounds."""
    arms = [arm for arm in results.arms(part) if results.of(part, arm, columns[0][1], level)]
    if not arms:
        return "Not run."
    lines = [f"| arm | {' | '.join(name for name, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms:
        cells = [_cell(results.of(part, arm, get, level), digits) for _, get, digits in columns]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Spread | None, digits: int) -> str:
    return value.text(digits) if value else "-"


def _times(gain: float | None) -> str:
    return f"{gain:.2f}x" if gain is not None else "unknown"
