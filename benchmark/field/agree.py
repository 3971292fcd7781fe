"""Our verdict and the field's on the same requests: guidellm, inference-perf and aiperf against the real server.

    scripts/run.sh -- benchmark/field/agree.py --write docs/goodput.md

Each tool sends a mixed load at limits on TTFT and on the mean time per token (`tpot_ms`), which it tells our server in
headers or bodies, and counts the requests that kept both by its own clock; the server's request log has our verdict on
each of the same requests. The page shows both counts, and both sides' figures of every request they disagree about.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from field.tools import program_of, run, version_of
from servers import end_cleanly, server
from sglang_slo.cpu.demo_model import demo_model_path

REQUESTS, RATE_RPS = 60, 3.0
INPUT, SPREAD, OUTPUT = 250, 120, 24  # tokens: mean, standard deviation, mean
TTFT_MS, TPOT_MS = 1500.0, 50.0
RUN_S = 200.0
READ_AT = 20  # limits of each kind at which the same requests are read again


@dataclass(frozen=True)
class Seen:
    """One request as one side saw it. Times in ms; None: it has no such figure."""

    start_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    tokens: float | None
    kept: bool


@dataclass(frozen=True)
class Compared:
    """One tool's run: what it counted, what we counted, and every request, ours beside theirs, by start."""

    tool: str
    theirs: int
    ours: int
    pairs: list[tuple[Seen, Seen]]

    @property
    def apart(self) -> list[tuple[Seen, Seen]]:
        """Those on which the verdicts differ."""
        return [(a, b) for a, b in self.pairs if a.kept != b.kept]


def kept(ttft_ms: float | None, tpot_ms: float | None) -> bool:
    """Whether both limits were kept, as all three tools read them: a figure that is missing keeps nothing."""
    return ttft_ms is not None and tpot_ms is not None and ttft_ms <= TTFT_MS and tpot_ms <= TPOT_MS


def guidellm(url: str, folder: Path) -> tuple[int, list[Seen]]:
    """guidellm's count and requests."""
    headers = {"x-slo-ttft-ms": f"{TTFT_MS:g}", "x-slo-tpot-ms": f"{TPOT_MS:g}"}
    backend = {"kind": "openai_http", "target": url, "model": "demo", "request_format": "/v1/completions"}
    backend["extras"] = {"headers": headers}  # type: ignore[assignment]
    data = {"kind": "synthetic_text", "prompt_tokens": INPUT, "prompt_tokens_stdev": SPREAD}
    data |= {"prompt_tokens_min": 50, "prompt_tokens_max": 800, "output_tokens": OUTPUT}
    slo = {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS}
    command = [*program_of("guidellm"), "run", "--disable-console", "--backend", json.dumps(backend)]
    command += ["--profile", json.dumps({"kind": "poisson", "rate": [RATE_RPS]})]
    command += ["--constraint", json.dumps({"kind": "max_requests", "count": REQUESTS})]
    command += ["--data", json.dumps(data), "--metrics", json.dumps({"kind": "generative", "slo": slo})]
    tokenizer = {"kind": "hf_auto", "model": str(demo_model_path())}
    command += ["--tokenizer", json.dumps(tokenizer)]
    command += ["--output", json.dumps({"kind": "json", "path": str(folder / "guidellm.json")})]
    run(command, folder / "guidellm.log", RUN_S)
    [bench] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    rows = bench["requests"]["successful"]
    seen = [
        Seen(
            row["info"]["timings"]["request_start"],
            row["time_to_first_token_ms"],
            row["inter_token_latency_ms"],
            row["output_tokens"],
            kept(row["time_to_first_token_ms"], row["inter_token_latency_ms"]),
        )
        for row in rows
    ]
    metrics = bench["metrics"]
    return round(metrics["slo_attainment"] * metrics["slo_determined_requests"]), seen


def inference_perf(url: str, folder: Path) -> tuple[int, list[Seen]]:
    """inference-perf's count and requests; its own header names are ours."""
    lengths = {"min": 50, "max": 800, "mean": INPUT, "std_dev": SPREAD, "total_count": REQUESTS}
    outputs = {"min": OUTPUT - 8, "max": OUTPUT + 8, "mean": OUTPUT, "std_dev": 4, "total_count": REQUESTS}
    headers = {"x-slo-ttft-ms": f"{TTFT_MS:g}", "x-slo-tpot-ms": f"{TPOT_MS:g}"}
    report = {"per_request": True, "per_request_fields": {"computed_metrics": True}}
    report |= {"use_server_output_tokens": True}
    stage = {"rate": RATE_RPS, "duration": round(REQUESTS / RATE_RPS)}
    config = {
        "api": {"type": "completion", "streaming": True, "headers": headers},
        "server": {"type": "sglang", "model_name": "demo", "base_url": url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(demo_model_path())},
        "data": {"type": "random", "input_distribution": lengths, "output_distribution": outputs},
        "load": {"type": "poisson", "stages": [stage], "num_workers": 1},
        "report": {"request_lifecycle": report},
        "storage": {"local_storage": {"path": str(folder / "inference-perf")}},
    }
    (folder / "inference-perf.yaml").write_text(json.dumps(config))
    command = [*program_of("inference-perf"), "-c", str(folder / "inference-perf.yaml")]
    run(command, folder / "inference-perf.log", RUN_S)
    reports = folder / "inference-perf"
    summary = json.loads((reports / "summary_lifecycle_metrics.json").read_text())
    seen = []
    for row in json.loads((reports / "per_request_lifecycle_metrics.json").read_text()):
        figures = row["computed_metrics"]
        ttft, tpot = (_ms(figures[name]) for name in ("time_to_first_token", "time_per_output_token"))
        seen.append(Seen(row["start_time"], ttft, tpot, figures["output_tokens"], kept(ttft, tpot)))
    return _good_of(summary), seen


def aiperf(url: str, folder: Path) -> tuple[int, list[Seen]]:
    """aiperf's count and requests. Its `-H` makes numbers of headers' values and refuses them, so: in the body."""
    body = {"slo": {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS}, "ignore_eos": True}
    command = [*program_of("aiperf"), "profile", "--model", "demo", "--url", url, "--streaming"]
    command += ["--endpoint-type", "completions", "--tokenizer", str(demo_model_path())]
    command += ["--isl", str(INPUT), "--isl-stddev", str(SPREAD), "--osl", str(OUTPUT)]
    command += ["--request-rate", str(RATE_RPS), "--request-count", str(REQUESTS), "--random-seed", "1"]
    command += ["--extra-inputs", json.dumps(body), "--use-legacy-max-tokens", "--use-server-token-count"]
    command += ["--goodput", f"time_to_first_token:{TTFT_MS:g} inter_token_latency:{TPOT_MS:g}"]
    command += ["--artifact-dir", str(folder / "aiperf"), "--ui", "none"]
    # offline it takes a tokenizer's folder for a name
    run(command, folder / "aiperf.log", RUN_S, {"HF_HUB_OFFLINE": ""})
    summary = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    seen = []
    for line in (folder / "aiperf" / "profile_export.jsonl").read_text().splitlines():
        row = json.loads(line)
        figures = {name: entry["value"] for name, entry in row["metrics"].items()}
        ttft, tpot = figures.get("time_to_first_token"), figures.get("inter_token_latency")
        start_s = row["metadata"]["request_start_ns"] / 1e9
        seen.append(Seen(start_s, ttft, tpot, figures.get("output_sequence_length"), kept(ttft, tpot)))
    return int(summary["good_request_count"]["avg"]), seen


TOOLS: dict[str, Callable[[str, Path], tuple[int, list[Seen]]]] = {
    "guidellm": guidellm,
    "inference-perf": inference_perf,
    "aiperf": aiperf,
}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _good_of(summary: Any) -> int:
    """The number of good requests in inference-perf's report."""
    return int(summary["successes"]["goodput_metrics"]["good_requests"])


def ours(log: Path, skip: int, patience_s: float = 20.0) -> list[Seen]:
    """The requests of the server's log after the first `skip` that came with these limits."""
    deadline, rows = time.monotonic() + patience_s, []
    while time.monotonic() < deadline:
        rows = [json.loads(line) for line in log.read_text().splitlines()][skip:]
        rows = [row for row in rows if row["ttft_limit_s"] == TTFT_MS / 1e3]
        if len(rows) >= REQUESTS:
            break
        time.sleep(0.5)
    return [
        Seen(row["arrival_s"], _ms(row["ttft_s"]), _ms(row["tpot_s"]), row["output_tokens"], row["attained"])
        for row in rows
    ]


def by_start(seen: list[Seen]) -> list[Seen]:
    """In the order in which they were sent."""
    return sorted(seen, key=lambda one: one.start_s)


def measure(folder: Path, tools: list[str]) -> list[Compared]:
    """Each tool's run against one server."""
    log, found = folder / "requests.jsonl", []
    flags = ["--served-model-name", "demo", "--slo-request-log", str(log), "--sleep-on-idle"]
    with server("slo", flags, folder / "server.log") as url:
        for tool in tools:
            skip = len(log.read_text().splitlines()) if log.exists() else 0
            count, theirs = TOOLS[tool](url, folder)
            mine = ours(log, skip)
            print(tool, count, len(theirs), sum(s.kept for s in mine), len(mine), file=sys.stderr, flush=True)
            pairs = list(zip(by_start(mine), by_start(theirs), strict=False))
            name = version_of(tool)
            found.append(Compared(name, count, sum(s.kept for s in mine), pairs))
            (folder / f"{tool}.compared.json").write_text(json.dumps(asdict(found[-1])))
            if len(theirs) != len(mine):
                print(
                    f"{tool}: {len(theirs)} requests in its report, {len(mine)} in our log", file=sys.stderr
                )
    return found


def kept_results(folder: Path) -> list[Compared]:
    """What was compared in this folder, now or before; each tool's newest run."""
    found = []
    for tool in TOOLS:
        file = folder / f"{tool}.compared.json"
        if file.exists():
            raw = json.loads(file.read_text())
            raw["pairs"] = [(Seen(**a), Seen(**b)) for a, b in raw["pairs"]]
            found.append(Compared(**raw))
    return found


def table(found: list[Compared]) -> str:
    """Both counts, one line a tool."""
    lines = ["| tool | requests | kept, it says | kept, we say | apart |", "|---|---|---|---|---|"]
    lines += [f"| {c.tool} | {len(c.pairs)} | {c.theirs} | {c.ours} | {len(c.apart)} |" for c in found]
    return "\n".join(lines)


def apart(found: list[Compared]) -> str:
    """Both sides' figures of the requests on which they differ."""
    rows = [(c.tool, a, b) for c in found for a, b in c.apart]
    if not rows:
        return "No request was judged differently in this run."
    lines = ["| tool | TTFT, ours / theirs, ms | mean per token, ours / theirs, ms | tokens, ours / theirs |"]
    lines.append("|---|---|---|---|")
    for tool, a, b in rows:
        cells = [f"{_f(x)} / {_f(y)}" for x, y in ((a.ttft_ms, b.ttft_ms), (a.tpot_ms, b.tpot_ms))]
        lines.append(f"| {tool} | {cells[0]} | {cells[1]} | {_f(a.tokens)} / {_f(b.tokens)} |")
    return "\n".join(lines)


def offsets(found: list[Compared]) -> str:
    """What the client's clock sees more than the server's: median and largest, by tool."""
    lines = ["| tool | TTFT, theirs - ours, median / largest, ms | mean per token, median / largest, ms |"]
    lines.append("|---|---|---|")
    for c in found:
        cells = []
        for name in ("ttft_ms", "tpot_ms"):
            more = sorted(
                getattr(b, name) - getattr(a, name)
                for a, b in c.pairs
                if getattr(a, name) is not None and getattr(b, name) is not None
            )
            cells.append(f"{more[len(more) // 2]:.2f} / {more[-1]:.2f}" if more else "–")
        lines.append(f"| {c.tool} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _good(seen: Sequence[Seen], ttft_ms: float, tpot_ms: float) -> int:
    return sum(
        one.ttft_ms is not None
        and one.tpot_ms is not None
        and one.ttft_ms <= ttft_ms
        and one.tpot_ms <= tpot_ms
        for one in seen
    )


def _spread(values: list[float], parts: int) -> list[float]:
    """Limits spread over `values`, none nearer than 1 % to one of them: requests that ran together have the same times."""
    ordered = sorted(values)
    between = [(a + b) / 2 for a, b in pairwise(ordered) if b - a > 0.02 * b]
    return [between[k * len(between) // parts] for k in range(parts)] if between else ordered[:1]


def readings(found: list[Compared]) -> str:
    """The same requests read at other limits, by the figures that each side recorded: both counts."""
    lines = ["| tool | TTFT, mean per token, ms | kept, theirs / ours |", "|---|---|---|"]
    for c in found:
        ours, theirs = ([pair[side] for pair in c.pairs] for side in (0, 1))
        ttfts = _spread([s.ttft_ms for s in ours if s.ttft_ms is not None], READ_AT)
        tpots = _spread([s.tpot_ms for s in ours if s.tpot_ms is not None], READ_AT)
        off = [abs(_good(theirs, a, b) - _good(ours, a, b)) for a in ttfts for b in tpots]
        for k in (READ_AT // 4, READ_AT // 2, 3 * READ_AT // 4):
            a, b = ttfts[k % len(ttfts)], tpots[k % len(tpots)]
            lines.append(f"| {c.tool} | {a:.5g}, {b:.4g} | {_good(theirs, a, b)} / {_good(ours, a, b)} |")
        one = sum(d <= 1 for d in off) / len(off)
        lines.append(
            f"| {c.tool} | all {len(off)} pairs | within one in {one:.1%}, furthest apart {max(off)} |"
        )
    return "\n".join(lines)


def _f(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def page(found: list[Compared]) -> str:
    """The page of the docs."""
    text = Path(__file__).with_name("goodput.in.md").read_text()
    load = f"{REQUESTS} requests, Poisson arrivals at {RATE_RPS:g}/s, "
    load += f"prompts of {INPUT} ± {SPREAD} tokens, {OUTPUT} tokens out"
    busy = f"with a load average of {os.getloadavg()[1]:.0f}"
    fill = {
        "when": f"{time.strftime('%Y-%m-%d')}, demo model, {os.cpu_count()} CPU cores ({platform.machine()}) {busy}",
        "load": load,
        "limits": f"TTFT {TTFT_MS:g} ms, mean per token {TPOT_MS:g} ms",
        "table": table(found),
        "apart": apart(found),
        "offsets": offsets(found),
        "readings": readings(found),
    }
    for name, value in fill.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def main() -> int:
    """Entry point; returns the exit status: 1 if a count differs by more than one request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the page of the docs here")
    parser.add_argument("--out", type=Path, default=Path("out/agree"), help="folder for logs and reports")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="run only this one (default: all)")
    args = parser.parse_args()
    end_cleanly()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "requests.jsonl").unlink(missing_ok=True)
    measure(args.out.resolve(), args.tool or list(TOOLS))
    found = kept_results(args.out.resolve())
    print("\n\n".join((table(found), readings(found), apart(found), offsets(found))))
    if args.write:
        args.write.write_text(page(found))
    return int(any(abs(c.theirs - c.ours) > 1 for c in found))


if __name__ == "__main__":
    sys.exit(main())
