"""The latency model a server starts with: the given profile, a stored one, or one measured now, in seconds.

Rank 0 decides and measures; the others of its tensor-parallel group run the same passes and take its model,
so all plan alike. A measured profile is kept in the cache folder under everything its figures depend on
(`key`). Without one (measuring failed) serving starts on a cautious guess: online fitting corrects it within
seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.utils import broadcast_pyobj
from sglang.version import __version__ as sglang_version

from sglang_slo.core.fit import fit, guesses, margins, predict_s
from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel, ProfileError
from sglang_slo.core.samples import Samples
from sglang_slo.cpu.demo_model import cache_dir
from sglang_slo.measuring import MEASURE_ENV, describe
from sglang_slo.runtime.sglang import speculation
from sglang_slo.runtime.sglang.settings import resolved

logger = logging.getLogger(__name__)

VERSION = 4  # of what is measured and how: part of the key
GUESS = LatencyModel(Coefficients(2e-3, 1e-3, 5e-5, 0.0, 2e-3, 1e-8), 1.25, 1.25, name="guess")
LARGEST_POOL_OCTAVE = 17  # bits of the size of a pool that holds every case
MEASURE_S = 4.0  # device time of measuring at start-up, about; a pass that has begun is finished
ROUNDS = 3  # of passes of one case
ROUND_S = 0.02  # a round of passes of one case, about
QUANTILE_LEVEL = 0.95  # of the fit's own errors over the measured cases, until online fitting knows better
MOST_QUANTILE = 1.5
MOST_ERROR = 0.25  # median, relative: what fits worse (a host too busy to measure on) is not kept


class NoModelError(ValueError):
    """What was measured tells no latency model."""


def startup_model(scheduler: Any) -> LatencyModel:
    """`--slo-profile`, else the stored profile of this set-up, else measured now, else GUESS.

    Under speculative decoding nothing is measured; a profile of this set-up without it is as good a start as any.
    Called on every rank once all else is built. Raises ProfileError if the given profile cannot be used.
    """
    if scheduler.slo_config.profile is not None:
        return LatencyModel.load(Path(scheduler.slo_config.profile))
    asked = json.loads(os.environ.get(MEASURE_ENV, "{}"))
    mine = key(scheduler)
    model = _from_rank_0(scheduler, None if asked else stored(mine))
    if model is not None:
        return model
    if speculation.on(
        scheduler
    ):  # its graphs are those of verifying: a plain decode of the model is none of them
        logger.info(
            "sglang-slo: speculative decoding: starting with a guess of iteration times, or --slo-profile"
        )
        return GUESS
    try:
        model = measure(scheduler, mine, float(asked.get("seconds", MEASURE_S)))
    except NoModelError as error:  # a machine too busy to measure on
        logger.warning("sglang-slo: starting with a guess of iteration times: %s", error)
        return GUESS
    except Exception:
        logger.exception("sglang-slo: measuring iteration times failed: starting with a guess")
        return GUESS
    if "out" in asked:
        _keep(scheduler, model, Path(asked["out"]))
    elif model.meta["fit"]["median_error"] <= MOST_ERROR:
        _keep(scheduler, model, path_of(mine))
    return model


def measure(scheduler: Any, mine: dict[str, Any], seconds: float) -> LatencyModel:
    """Run the cases, again and again if `seconds` is long, and fit a model; the same one on every rank."""
    from sglang_slo.runtime.latency.measure import Bench

    bench = Bench(scheduler)
    bench.warm_up()
    began = time.perf_counter()

    def pace(pass_s: float) -> tuple[int, int] | None:
        left = seconds - (time.perf_counter() - began)
        passes = min(max(int(ROUND_S / max(pass_s, 1e-6)), 1), 8)
        rounds = ROUNDS if ROUNDS * passes * pass_s < left / 4 else 0
        return _from_rank_0(scheduler, (rounds, passes) if left > 0 else None)

    sweeps = max(int(seconds / MEASURE_S), 1)
    measured = list(bench.run(bench.cases() * sweeps, pace))
    model: LatencyModel | None = None
    if _is_rank_0(scheduler):
        try:
            model = model_of(measured, mine)
            logger.info("sglang-slo: measured\n%s", describe(model))
        except Exception as error:  # the other ranks wait for an answer
            logger.warning(
                "sglang-slo: no latency model fits what was measured: %s",
                error,
                exc_info=not isinstance(error, NoModelError),
            )
    model = _from_rank_0(scheduler, model)
    if model is None:
        raise NoModelError("rank 0 could not fit a latency model")
    return dataclasses.replace(
        model,
        kv_capacity_tokens=int(scheduler.max_total_num_tokens),
        kv_bytes_per_token=_kv_bytes_per_token(scheduler),
    )


def model_of(measured: list[tuple[BatchShape, float]], mine: dict[str, Any]) -> LatencyModel:
    """The model fitted to measured shapes and seconds, its errors in `meta.fit`. NoModelError if too few."""
    samples = Samples.of(measured)
    if samples.extend.sum() < 3 or (~samples.extend).sum() < 2:
        raise NoModelError(f"{len(measured)} cases are too few to fit a latency model")
    coefficients = fit(samples, GUESS.coefficients, prior_spread=3.0, starts=guesses(samples))
    predicted = predict_s(coefficients, samples)
    errors = np.abs(samples.seconds / predicted - 1)
    about = {
        "cases": len(measured),
        "median_error": round(float(np.median(errors)), 4),
        "worst_error": round(float(errors.max()), 4),
    }
    return LatencyModel(
        coefficients,
        *margins(samples, predicted, QUANTILE_LEVEL, MOST_QUANTILE),
        str(mine["model"]),
        measured=True,
        meta={"key": mine, "fit": about},
    )


# -- the stored profile


def key(scheduler: Any) -> dict[str, Any]:
    """Everything the figures depend on; plain JSON values."""
    args, config, runner = (
        resolved(scheduler.server_args),
        scheduler.model_config,
        scheduler.tp_worker.model_runner,
    )
    shape = json.dumps(config.hf_config.to_dict(), sort_keys=True, default=str)
    cuda = torch.cuda.is_available()
    return {
        "version": VERSION,
        "sglang": sglang_version,
        "model": Path(args.model_path).name,
        "model_config": hashlib.sha256(shape.encode()).hexdigest()[:16],
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "tp": args.tp_size,
        # what a small pool cannot hold was not measured
        "pool_octave": min(int(scheduler.max_total_num_tokens).bit_length(), LARGEST_POOL_OCTAVE),
        "dtype": str(config.dtype),
        "quantization": args.quantization,
        "kv_dtype": str(runner.kv_cache_dtype),
        "attention": [args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend],
        "cuda_graph": not args.disable_cuda_graph,
        "overlap": bool(scheduler.enable_overlap),
    }


def path_of(mine: dict[str, Any]) -> Path:
    """Where the profile of this set-up is kept."""
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', mine['model'])[:60]}-{digest}.json"


def stored(mine: dict[str, Any]) -> LatencyModel | None:
    """The stored profile of this set-up, None if there is none that can be used."""
    path = path_of(mine)
    if not path.exists():
        return None
    try:
        model = LatencyModel.load(path)
    except ProfileError as error:
        logger.warning("sglang-slo: %s: measuring anew", error)
        return None
    return model if model.meta.get("key") == mine else None


def _keep(scheduler: Any, model: LatencyModel, path: Path) -> None:
    if not _is_rank_0(scheduler):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    except OSError as error:
        logger.warning("sglang-slo: the measured profile could not be stored: %s", error)


# -- the tensor-parallel group


def _is_rank_0(scheduler: Any) -> bool:
    return scheduler.slo_ranks.tp_rank == 0


def _from_rank_0(scheduler: Any, value: Any) -> Any:
    """Rank 0's `value`, on every rank of the tensor-parallel group."""
    if scheduler.slo_ranks.tp_size == 1:
        return value
    group = scheduler.tp_group
    return broadcast_pyobj([value], group.rank, scheduler.tp_cpu_group, src=group.ranks[0])[0]


def _kv_bytes_per_token(scheduler: Any) -> float:
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    return float(sum(pool.get_kv_size_bytes())) / max(int(pool.size), 1)
