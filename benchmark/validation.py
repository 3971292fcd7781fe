"""Makes VALIDATION.md and its picture from the lines that `twin validate --out` wrote.

python -m sglang_slo.twin validate --model Llama-3.1-8B --system h200_sxm --fit --out FILE
python benchmark/validation.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

HERE = Path(__file__).parent
MEASURES = {
    "request": "whole request",
    "tpot": "time per token",
    "ttft": "first token",
    "throughput": "throughput",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
HEAD = """# The twin against real serving runs

Stock SGLang in the twin, on kernels measured on real GPUs (`aiconfigurator-core`), beside serving runs on real GPUs that
come with the same package and that nobody here made. Each is a closed loop: so many clients, fixed lengths, the next
request as the last one ends. Two constants of the host (time per pass, time per request in it) are fitted on the runs of
one half (by a hash of their id); every error below is of the other half. Device time: measured kernels. Virtual time.

![real against twin](plots/validation.png)

"""
TAIL = """
## How to read it

- *Whole request* and *throughput* are what the twin decides by; they do not depend on how the clients started.
- *First token* and *time per token* share the whole request between them, and how they do depends on whether clients
  are in step: all start at once and stay in waves, or they are spread. The real runs do not say. In the twin, spread
  clients never wait for each other's prompts (first tokens too early, tokens too slow); clients in step wait for all
  (the other way round). Real ones lie between. So neither is a fair test of the twin by itself, and no third constant is
  fitted for it.
- How clients start was chosen per set from how long the real first tokens take: Qwen's are those of a wave (the whole
  wave's prompts before them), Llama's are neither. It is a choice, so the first two measures are the ones to trust.
- The run that is far off (Qwen3-32B in 16 bits on a single H100, 16 clients) is short of KV: weights take 61 of 80 GiB.
  There the first token waits 29 s on the real GPU and 1.4 s in the twin, while the time per token agrees within 14 %.
  Likely the real server had a smaller pool: how much memory it was given is not recorded. Where KV is what is short,
  say `--mem-fraction-static`, and do not trust a default.
- The fitted constants stand for what kernels alone lack: launches, sampling, the host's share that is not hidden.
  They are of the version and system they were fitted on, and are used for every measured device (`twin/data/host.json`).

## What is not covered

- Kernels are of SGLang 0.5.14 and 0.5.16 (0.5.10 on A100), the runs of 0.5.1 to 0.5.9.
- Runs with more output tokens than said above were left out to keep the time of the check bounded
  (`--most-tokens` takes them in), and of some sets only each so-manieth run was taken (`--every`).
- Models with experts on other GPUs than their attention, pipelines, and prefill apart from decode.
- Prefix caching, mixed chunks and open arrivals: no run has them.
"""


def main() -> None:
    """Write the page and the picture."""
    sets = [_read(path) for path in sorted((HERE / "results" / "validation").glob("*.jsonl"))]
    (HERE / "VALIDATION.md").write_text(HEAD + "\n".join(_section(*one) for one in sets) + TAIL)
    _draw(sets, HERE / "plots" / "validation.png")


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in rows if "id" in r], next(r for r in rows if "errors" in r and "id" not in r)


def _section(runs: list[dict[str, Any]], whole: dict[str, Any]) -> str:
    host, left_out = whole["host"], whole["left_out"]
    lines = [
        f"## {whole['model']} on {whole['system']}, clients {whole['start'].replace('_', ' ')}",
        "",
        f"Fitted on {whole['fitted_on']} runs, judged on {whole['judged_on']} others. "
        f"Host: {host['iteration_s'] * 1e3:.2f} ms a pass, {host['request_s'] * 1e6:.1f} us a request in it. "
        f"Left out: {', '.join(f'{n} {why}' for why, n in left_out.items()) or 'none'}.",
        "",
        "| error of | median | 90th percentile | median, signed |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, title in MEASURES.items():
        e = whole["errors"][name]
        lines.append(f"| {title} | {e['median']:.1%} | {e['p90']:.1%} | {e['bias']:+.1%} |")
    lines += [
        "",
        "| tokens in x out, clients, GPUs | request real | twin | token real | twin | first real | twin |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in runs:
        real, twin = r["real"], r["twin"]
        lines.append(
            f"| {r['isl']} x {r['osl']}, {r['clients']}, {r['tp']} | {real['request_ms'] / 1e3:.2f} s "
            f"| {twin['request_ms'] / 1e3:.2f} s | {real['tpot_ms']:.1f} ms | {twin['tpot_ms']:.1f} ms "
            f"| {real['ttft_ms']:.0f} ms | {twin['ttft_ms']:.0f} ms |"
        )
    return "\n".join([*lines, ""])


def _draw(sets: list[tuple[list[dict[str, Any]], dict[str, Any]]], path: Path) -> None:
    drawn = Figure(figsize=(12, 4), layout="constrained")
    for ax, (field, title) in zip(
        drawn.subplots(1, 3),
        (("request_ms", "whole request"), ("tpot_ms", "time per token"), ("ttft_ms", "first token")),
        strict=True,
    ):
        ends = []
        for (runs, whole), colour in zip(sets, COLOURS, strict=False):
            real, twin = [r["real"][field] for r in runs], [r["twin"][field] for r in runs]
            label = f"{whole['model']} on {whole['system']}, clients {whole['start'].replace('_', ' ')}"
            ax.scatter(real, twin, s=22, color=colour, label=label)
            ends += real + twin
        low, high = 0.8 * min(ends), 1.25 * max(ends)
        ax.plot((low, high), (low, high), color="black", linewidth=1)
        ax.fill_between(
            (low, high), (0.88 * low, 0.88 * high), (1.12 * low, 1.12 * high), color="black", alpha=0.1
        )
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=title)
        ax.set(xlabel="real GPU, ms", ylabel="twin on measured kernels, ms")
        ax.grid(color="#dddddd", linewidth=0.6)
    drawn.axes[0].legend(fontsize=7, loc="upper left")
    drawn.suptitle("Each dot a run that was not fitted to; line: equal, grey: within 12 %", fontsize=11)
    drawn.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
