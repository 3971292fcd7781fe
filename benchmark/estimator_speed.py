"""What knowing lengths costs: arrivals, refreshes, finishes, a round of learning, and a million finished requests.

    python benchmark/estimator_speed.py [--stream 1000000] [--json]

Times are medians of several, with the 10th and 90th percentile, of one thread, in milliseconds of CPU time (another
process on the core does not count) and of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from sglang_slo.config import SloConfig
from sglang_slo.core.lengths import QUANTILES, remaining_tokens
from sglang_slo.estimator import store
from sglang_slo.estimator.features import ROW, ArrivalFeatures, encode
from sglang_slo.estimator.service import LengthService
from sglang_slo.estimator.training import offline

WORDS = [
    "write",
    "explain",
    "describe",
    "list",
    "summarize",
    "code",
    "python",
    "essay",
    "short",
    "detailed",
    "how",
    "what",
    "why",
    "river",
    "bridge",
    "trade",
    "music",
    "chess",
    "cheese",
    "engine",
    "garden",
    "comet",
    "pottery",
    "sailing",
    "optics",
    "the",
    "a",
    "of",
    "in",
    "and",
    "to",
    "for",
    "with",
    "about",
    "on",
    "numbers",
    "words",
]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stream", type=int, default=100_000, help="finished requests in the memory test")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        service, learning = trained(Path(folder))
        figures["fit 2000 requests"] = learning
        figures["predict 256 arrivals"] = timed(lambda: requests(256), service.predict)
        figures["predict 1 arrival"] = timed(lambda: requests(1), service.predict)
        figures["finish 1 request"] = timed(
            lambda: predicted(service, 1)[0], lambda r: service.finished(r, 100)
        )
        figures["remaining of 512"] = timed(
            running, lambda made: remaining_tokens(made[0], made[1], made[2], 0.9)
        )
        figures["million"] = stream(service, options.stream, Path(folder))
    if options.json:
        print(json.dumps(figures))
        return
    for name, values in figures.items():
        print(f"{name:24}" + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))


def requests(n: int, seed: int | None = None) -> list[ArrivalFeatures]:
    """Prompts of 10 to 60 words."""
    rng = np.random.default_rng(seed)
    return [ArrivalFeatures(2048, text=" ".join(rng.choice(WORDS, rng.integers(10, 60)))) for _ in range(n)]


def predicted(service: LengthService, n: int) -> list[ArrivalFeatures]:
    """Requests that have been asked about."""
    made = requests(n)
    service.predict(made)
    return made


def running() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """512 running requests: log quantiles, tokens so far, declared maxima."""
    rng = np.random.default_rng()
    logs = np.sort(rng.normal(5, 1, (512, len(QUANTILES))), axis=1)
    return logs, rng.integers(0, 2000, 512), np.full(512, 8192)


def trained(folder: Path) -> tuple[LengthService, dict[str, float]]:
    """A service with a model of 2,000 requests, and what fitting it cost."""
    made = requests(2000, seed=0)
    lengths = np.exp(np.random.default_rng(1).normal(5, 0.6, 2000))
    rows = encode(made)
    begin = time.process_time()
    saved = offline(rows, lengths, seed=0)
    seconds = time.process_time() - begin
    store.save(folder / store.CURRENT, saved)
    service = LengthService(SloConfig(), trainer="inline", store_dir=folder)
    service.learn = False
    return service, {"cpu_s": seconds, "file_kb": (folder / store.CURRENT).stat().st_size / 1024}


def timed(prepare: Callable, work: Callable, repeats: int = 41) -> dict[str, float]:
    """Milliseconds of `work(prepare())`."""
    cpu, wall = [], []
    for _ in range(repeats):
        subject = prepare()
        begin = time.process_time(), time.perf_counter()
        work(subject)
        cpu.append(1e3 * (time.process_time() - begin[0]))
        wall.append(1e3 * (time.perf_counter() - begin[1]))
    low, middle, high = np.quantile(cpu, [0.1, 0.5, 0.9])
    return {"cpu_ms": middle, "p10": low, "p90": high, "wall_ms": float(np.median(wall))}


def stream(service: LengthService, n: int, folder: Path) -> dict[str, float]:
    """Memory and disk before and after n finished requests."""
    service.learn = True
    service.poll = lambda now_s: None  # type: ignore[method-assign]
    row = np.zeros(1, ROW).tobytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    disk = sum(p.stat().st_size for p in folder.iterdir())
    begin = time.process_time()
    for i in range(n):
        request = ArrivalFeatures(100, slo_class=f"class {i % 1000}", caller=f"caller {i % 50_000}")
        request.row, request.raw, request.source = row, np.full(len(QUANTILES), 4.0), service._source
        request.issued = request.raw
        service.finished(request, 10 + i % 90)
    return {
        "requests": n,
        "cpu_us_each": 1e6 * (time.process_time() - begin) / n,
        "memory_grew_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "disk_grew_kb": (sum(p.stat().st_size for p in folder.iterdir()) - disk) / 1024,
        "kept": len(service.reservoir),
    }


if __name__ == "__main__":
    main()
