"""Many runs: described, spread over processes, and kept on disk so that none is done twice.

A `Spec` names one run. Its key is a hash of everything the result depends on: the workload's requests and
profile, the scheduler's flags, SGLang's version and this package's source. Kept results lie in the cache
folder as .npz; the least recently used go when the folder passes CACHE_BYTES.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from sglang_slo.cpu.demo_model import cache_dir
from sglang_slo.twin import sources
from sglang_slo.twin.replicas import share_of
from sglang_slo.twin.result.run_result import RunResult
from sglang_slo.twin.workloads.workload import Workload, load_workload

CACHE_BYTES = 1 << 30
GB_PER_JOB = 3.0  # a run's process: the imports of SGLang, one table of request slots, a tree of token ids

Progress = Callable[[int, int, "Spec", RunResult, bool], None]


@dataclass(frozen=True)
class Spec:
    """One run: a workload (name or path) under a scheduler with flags."""

    workload: str
    scheduler: str
    argv: tuple[str, ...] = ()
    load: float = 1.0
    seed: int | None = None
    max_requests: int | None = None
    data: str | None = None
    predictor: str | None = None  # in the place of the workload's
    device: str | None = None  # in the place of the workload's
    share: tuple[int, int, str] | None = None  # (replica, of how many, router): its part of the requests
    name: str = ""

    def requests(self) -> Workload:
        """The workload's requests. Raises WorkloadError."""
        workload = load_workload(
            self.workload,
            load=self.load,
            data=Path(self.data) if self.data else None,
            seed=self.seed,
            max_requests=self.max_requests,
            device=self.device,
        )
        workload = replace(workload, predictor=self.predictor) if self.predictor else workload
        return workload if self.share is None else share_of(workload, *self.share)

    @property
    def title(self) -> str:
        """Its name, or its flags."""
        return self.name or " ".join([self.scheduler, *self.argv])


def run_all(
    specs: Iterable[Spec], jobs: int | None = None, progress: Progress | None = None, keep: bool = True
) -> list[RunResult]:
    """Results in the order of `specs`. `jobs`: processes (None: one per core that has memory for it)."""
    todo = list(specs)
    results: dict[int, RunResult] = {}
    missing: list[int] = []
    for i, spec in enumerate(todo):
        kept = _kept(spec) if keep else None
        if kept is None:
            missing.append(i)
        else:
            results[i] = kept
            _report(progress, results, todo, i, True)
    workers = min(jobs or default_jobs(), len(missing))
    if workers <= 1:
        for i in missing:
            results[i] = _run_one(todo[i])
            _report(progress, results, todo, i, False)
    else:
        running: dict[Future[RunResult], int] = {_pool(workers).submit(_run_one, todo[i]): i for i in missing}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i = running.pop(future)
                results[i] = future.result()
                _report(progress, results, todo, i, False)
    return [results[i] for i in range(len(todo))]


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    # Kept for the next call: a process takes seconds to import SGLang. torch does not survive a fork.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def default_jobs() -> int:
    """One process per core, as long as there is memory for each."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(pages / (GB_PER_JOB * 2**30))))


def show_progress(done: int, total: int, spec: Spec, result: RunResult, kept: bool) -> None:
    """One line to standard error."""
    how = "kept" if kept else f"{result.wall_s:.0f} s"
    text = f"[{done}/{total}] {spec.title}, load {spec.load:g}: {result.attainment:.3f} ({how})"
    print(text, file=sys.stderr, flush=True)


def _report(
    progress: Progress | None, results: dict[int, RunResult], todo: list[Spec], i: int, kept: bool
) -> None:
    if progress is not None:
        progress(len(results), len(todo), todo[i], results[i], kept)


def _run_one(spec: Spec) -> RunResult:
    from sglang_slo.twin.sim.driver import run  # SGLang comes in here: what only reads results stays quick

    result = run(spec.requests(), spec.scheduler, list(spec.argv), spec.title)
    path = _path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    result.write(partial)
    partial.replace(path)
    _forget_oldest(path.parent)
    return result


def _kept(spec: Spec) -> RunResult | None:
    path = _path(spec)
    try:
        result = RunResult.read(path)
    except (OSError, KeyError, ValueError, TypeError):
        return None
    os.utime(path)
    result.scheduler = spec.title  # the name is not part of the key
    return result


def _path(spec: Spec) -> Path:
    return cache_dir() / "twin" / f"{key(spec)}.npz"


def key(spec: Spec) -> str:
    """Hash of all that the result of a run depends on."""
    digest = hashlib.sha256()
    workload = spec.requests()
    for array in (workload.arrival_s, workload.class_id, workload.input_tokens, workload.output_tokens):
        digest.update(array.tobytes())
    rest = (
        workload.blocks,
        workload.limits,
        workload.class_names,
        workload.profile,
        (workload.on.name, repr(getattr(workload.on, "host", None))),
        workload.seed,
        workload.noise_sigma,
        workload.acceptance,
        (workload.clients, workload.staggered),
        (workload.callers, workload.texts, workload.declared_tokens, workload.features),
        workload.declared_max_new_tokens,
        workload.name,
        workload.predictor if spec.scheduler == "slo" else None,
        spec.scheduler,
        spec.argv,
        version("sglang"),
        _source_hash(spec.scheduler == "stock"),
        [_content_hash(Path(word)) for word in spec.argv],
    )
    digest.update(repr(rest).encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=2)
def _source_hash(stock: bool) -> str:
    files = sources.of_stock() if stock else sources.of_ours()
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _content_hash(path: Path) -> str:
    """Of a file or folder that a flag names, such as a profile or a length model."""
    files = (
        sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else [path]
        if path.is_file()
        else []
    )
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() if files else ""


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > CACHE_BYTES:
            path.unlink(missing_ok=True)
