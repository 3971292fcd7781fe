"""Attainment and goodput of a run of SGLang's own benchmark, which has neither.

    python -m sglang.bench_serving ... --output-details --output-file run.jsonl
    python benchmark/score_bench_serving.py run.jsonl --ttft-ms 500 --tbt-ms 40

Reads every line of the file (one line a run) and judges each request as the server would: by what was asked for
with the flags, and by every rule of the field. A failed request is a missed one. Times are the client's. Of a
chunk that carried k tokens bench_serving's native backend makes k equal gaps: they are put together again, as a
burst is one delivery. Its OpenAI backends make one gap, of unknown size: tokens are shared out evenly over them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_slo.core.attainment import (
    REASONS,
    RULES,
    Deliveries,
    deliveries_of,
    kept_by_rule,
    p99_s,
    reasons_of,
)
from sglang_slo.core.slo import Slo, SloClass

NEEDED = ("ttfts", "itls", "output_lens", "errors", "duration")


class DetailsError(ValueError):
    """A file that cannot be scored; the message names file, line and field."""


@dataclass(frozen=True)
class Score:
    """One run, scored. Rates are per second of the run's own duration."""

    requests: int
    completed: int
    attainment: float
    attainment_by_rule: dict[str, float]
    misses: dict[str, int]  # by reason; a request may have several
    longest_pause_p99_s: float
    longest_pause_max_s: float
    goodput_rps: float
    token_goodput_tps: float
    throughput_tps: float


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, checked. Raises DetailsError."""
    runs = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DetailsError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            run = json.loads(line)
        except ValueError as error:
            raise DetailsError(f"{path}:{number}: not JSON: {error}") from error
        _check(run, f"{path}:{number}")
        runs.append(run)
    if not runs:
        raise DetailsError(f"{path}: no runs in it")
    return runs


def _check(run: Any, where: str) -> None:
    if not isinstance(run, dict):
        raise DetailsError(f"{where}: need an object, got {type(run).__name__}")
    for field in NEEDED:
        if field not in run:
            raise DetailsError(f"{where}: {field}: missing; was bench_serving run with --output-details?")
    lengths = {field: len(run[field]) for field in NEEDED[:-1]}
    if len(set(lengths.values())) > 1:
        raise DetailsError(f"{where}: lists of different lengths: {lengths}")


def stream(ttft_s: float, gaps_s: list[float], tokens: int, slo: Slo) -> Deliveries:
    """The deliveries of one request, arrival at 0, from bench_serving's gaps."""
    sizes: list[int] = []
    spans_s: list[float] = []
    before_s = -1.0
    for gap_s in gaps_s:
        if gap_s == before_s:  # to the last bit: parts of one chunk
            spans_s[-1] += gap_s
            sizes[-1] += 1
        else:
            spans_s.append(gap_s)
            sizes.append(1)
        before_s = gap_s
    times = ttft_s + np.concatenate(([0.0], np.cumsum(spans_s)))
    share = (tokens - 1) / len(gaps_s) if gaps_s else 0.0  # above 1: chunks of unknown size
    counts = np.concatenate(([1.0], np.array(sizes) * max(share, 0.0)))
    return deliveries_of(times, counts, slo)


def score(run: dict[str, Any], slo: Slo) -> Score:
    """Judge every request of a run by the same limits."""
    kept = tokens_kept = tokens = done = 0
    by_rule, misses = dict.fromkeys(RULES, 0), dict.fromkeys(REASONS, 0)
    pauses_s: list[float] = []
    rows = zip(run["ttfts"], run["itls"], run["output_lens"], run["errors"], strict=True)
    for ttft_s, gaps_s, length, error in rows:
        if error or not length:
            misses["error"] += 1
            continue
        done += 1
        tokens += length
        out = stream(float(ttft_s), gaps_s, length, slo)
        pauses_s.append(out.max_gap_s)
        figures = out.figures(0.0)
        for rule, ok in kept_by_rule(slo, figures).items():
            by_rule[rule] += bool(ok)
        reasons = reasons_of(slo, figures)
        for reason in reasons:
            misses[reason] += 1
        if not reasons:
            kept += 1
            tokens_kept += length
    n, span = len(run["ttfts"]), float(run["duration"])
    return Score(
        requests=n,
        completed=done,
        attainment=kept / n if n else 0.0,
        attainment_by_rule={rule: count / n if n else 0.0 for rule, count in by_rule.items()},
        misses={reason: count for reason, count in misses.items() if count},
        longest_pause_p99_s=p99_s(pauses_s),
        longest_pause_max_s=max(pauses_s, default=0.0),
        goodput_rps=kept / span if span > 0 else 0.0,
        token_goodput_tps=tokens_kept / span if span > 0 else 0.0,
        throughput_tps=tokens / span if span > 0 else 0.0,
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="--output-file of bench_serving, with --output-details")
    parser.add_argument("--ttft-ms", type=float, help="limit on the time to first token (default: none)")
    parser.add_argument("--tbt-ms", type=float, help="limit on every gap between deliveries (default: none)")
    parser.add_argument("--tpot-ms", type=float, help="limit on the mean time per token (default: none)")
    parser.add_argument("--e2e-ms", type=float, help="limit on the whole request (default: none)")
    parser.add_argument("--max-pause-ms", type=float, help="with --percentile 99 (default: 10 x --tbt-ms)")
    meaning = parser.add_mutually_exclusive_group()
    meaning.add_argument("--pace", action="store_true", help="--tbt-ms is the pace of a reader")
    meaning.add_argument("--percentile", type=int, choices=[99], help="99: 1 %% of gaps may pass --tbt-ms")
    parser.add_argument("--json", action="store_true", help="one line per run")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print a score per run; returns the exit status."""
    parser = _arguments()
    args = parser.parse_args(argv)
    limits = ("ttft_ms", "tbt_ms", "tpot_ms", "e2e_ms", "max_pause_ms")
    for name in limits:
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: need milliseconds above 0, got {value}")
    if args.tbt_ms is None and (args.pace or args.percentile):
        parser.error("--pace and --percentile: need --tbt-ms, whose meaning they are")
    declared = SloClass(
        **{name: getattr(args, name) for name in limits}, pace=args.pace, percentile=args.percentile
    )
    try:
        scores = [score(run, declared.slo("scored")) for run in read_runs(args.file)]
    except DetailsError as error:
        print(f"score_bench_serving.py: {error}", file=sys.stderr)
        return 2
    for s in scores:
        print(json.dumps(asdict(s)) if args.json else _line(s))
    return 0


def _line(s: Score) -> str:
    rules = ", ".join(f"{rule} {share:.3f}" for rule, share in s.attainment_by_rule.items())
    misses = ", ".join(f"{reason} {count}" for reason, count in s.misses.items()) or "none"
    return (
        f"{s.completed}/{s.requests} completed, attainment {s.attainment:.3f} (by rule: {rules}; misses: {misses}), "
        f"longest pause p99 {s.longest_pause_p99_s:.3g} s, max {s.longest_pause_max_s:.3g} s, goodput "
        f"{s.goodput_rps:.2f} req/s, {s.token_goodput_tps:.0f} of {s.throughput_tps:.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
