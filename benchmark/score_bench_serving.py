"""Attainment and goodput of a run of SGLang's own benchmark, which has neither.

    python -m sglang.bench_serving ... --output-details --output-file run.jsonl
    python benchmark/score_bench_serving.py run.jsonl --ttft-ms 500 --tbt-ms 40

Reads every line of the file (one line a run) and judges each request by the project's definition: time to
first token, and 99th percentile gap. A failed request is a missed one. Times are the client's: of a chunk
that carried several tokens bench_serving's native backend makes equal gaps, its OpenAI backends one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_slo.core.attainment import missed, p99_s
from sglang_slo.core.slo import Slo, limit_s

NEEDED = ("ttfts", "itls", "output_lens", "errors", "duration")


class DetailsError(ValueError):
    """A file that cannot be scored; the message names file, line and field."""


@dataclass(frozen=True)
class Score:
    """One run, scored. Rates are per second of the run's own duration."""

    requests: int
    completed: int
    attainment: float
    ttft_attainment: float
    tbt_attainment: float
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


def score(run: dict[str, Any], slo: Slo) -> Score:
    """Judge every request of a run by one pair of limits."""
    kept = first_kept = gaps_kept = tokens_kept = tokens = done = 0
    rows = zip(run["ttfts"], run["itls"], run["output_lens"], run["errors"], strict=True)
    for ttft_s, gaps_s, length, error in rows:
        if error or not length:
            continue
        done += 1
        tokens += length
        what = missed(slo, float(ttft_s), p99_s(gaps_s))
        first_kept += what in (None, "tbt")
        gaps_kept += what in (None, "ttft")
        if what is None:
            kept += 1
            tokens_kept += length
    n, span = len(run["ttfts"]), float(run["duration"])
    return Score(
        requests=n,
        completed=done,
        attainment=kept / n if n else 0.0,
        ttft_attainment=first_kept / n if n else 0.0,
        tbt_attainment=gaps_kept / n if n else 0.0,
        goodput_rps=kept / span if span > 0 else 0.0,
        token_goodput_tps=tokens_kept / span if span > 0 else 0.0,
        throughput_tps=tokens / span if span > 0 else 0.0,
    )


def main(argv: list[str] | None = None) -> int:
    """Print a score per run; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="--output-file of bench_serving, with --output-details")
    parser.add_argument("--ttft-ms", type=float, help="limit on the time to first token (default: none)")
    parser.add_argument("--tbt-ms", type=float, help="limit on the 99th percentile gap (default: none)")
    parser.add_argument("--json", action="store_true", help="one line per run")
    args = parser.parse_args(argv)
    for name in ("ttft_ms", "tbt_ms"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: need milliseconds above 0, got {value}")
    try:
        scores = [
            score(run, Slo(limit_s(args.ttft_ms), limit_s(args.tbt_ms))) for run in read_runs(args.file)
        ]
    except DetailsError as error:
        print(f"score_bench_serving.py: {error}", file=sys.stderr)
        return 2
    for s in scores:
        if args.json:
            print(json.dumps(asdict(s)))
        else:
            print(
                f"{s.completed}/{s.requests} completed, attainment {s.attainment:.3f} "
                f"(first token {s.ttft_attainment:.3f}, gaps {s.tbt_attainment:.3f}), goodput "
                f"{s.goodput_rps:.2f} req/s, {s.token_goodput_tps:.0f} of {s.throughput_tps:.0f} tokens/s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
