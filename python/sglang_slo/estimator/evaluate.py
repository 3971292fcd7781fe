"""Cross-validation by prompt: how far off, how well covered, and how many tokens the bounds set aside.

Each fold's model never saw the fold's prompts; neither did its calibration, which comes from predictions that inner
folds made for prompts left out of *their* fit. The constant it is compared with is each model's median (and 0.9
quantile) on the same training rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.calibration import Calibration
from sglang_slo.core.lengths import MAX_LENGTH_TOKENS, MEDIAN, QUANTILES, Floats, bound_total_tokens
from sglang_slo.estimator.data import Data, DataError
from sglang_slo.estimator.model import fit

FOLDS, INNER_FOLDS = 5, 3
CONFIDENCES = (0.5, 0.8, 0.9, 0.95)
BOUNDS = ("conformal", "hoeffding")
MIN_PROMPTS = 60
P90 = 6  # column of the 0.9 quantile


@dataclass
class Result:
    """Held-out figures of every row: `point` [n] and `p90` [n] tokens, the constants likewise, `bounds[name][P]` [n]."""

    lengths: Floats
    point: Floats
    point_constant: Floats
    p90: Floats
    p90_constant: Floats
    bounds: dict[str, dict[str, NDArray[np.integer]]]
    top_features: list[tuple[str, float]]


def cross_validate(data: Data, seed: int = 0, folds: int = FOLDS) -> Result:
    """Held-out predictions and bounds for every row of `data`. Raises DataError for too few prompts."""
    prompts = int(data.prompt.max()) + 1
    if prompts < MIN_PROMPTS:
        raise DataError(f"need at least {MIN_PROMPTS} different prompts to cross-validate, got {prompts}")
    n = len(data.lengths_tokens)
    zeros = [np.zeros(n) for _ in range(4)]
    result = Result(data.lengths_tokens, zeros[0], zeros[1], zeros[2], zeros[3], _empty_bounds(n), [])
    fold_of = _folds(prompts, folds, seed)[data.prompt]
    gains: dict[str, float] = {}
    for fold in range(folds):
        train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        model = fit(data.rows[train], data.lengths_tokens[train], seed)
        calibration = _calibrated(data, train, seed)
        raw = model.predict(data.rows[test])
        result.point[test] = np.exp(raw[:, MEDIAN])
        result.p90[test] = np.exp(calibration.apply(raw)[:, P90])
        result.point_constant[test] = _constant(data, train, test, 0.5)
        result.p90_constant[test] = _constant(data, train, test, 0.9)
        for bound in BOUNDS:
            issued = calibration.apply(raw, bound)
            for p in CONFIDENCES:
                tokens = bound_total_tokens(issued, p, np.full(len(test), MAX_LENGTH_TOKENS))
                result.bounds[bound][str(p)][test] = tokens
        for name, share in model.top_features(40):
            gains[name] = gains.get(name, 0.0) + share / folds
    result.top_features = sorted(gains.items(), key=lambda kv: -kv[1])[:12]
    return result


def report(data: Data, result: Result) -> dict[str, Any]:
    """The figures of a cross-validation as JSON-ready values; lengths in tokens."""
    y = result.lengths
    mae, constant = _mae(y, result.point), _mae(y, result.point_constant)
    pin, pin_constant = _pinball(y, result.p90, 0.9), _pinball(y, result.p90_constant, 0.9)
    return {
        "rows": len(y),
        "prompts": int(data.prompt.max()) + 1,
        "models": sorted({str(m) for m in data.models}),
        "chars_per_token": 4,
        "mae_tokens": mae,
        "mae_tokens_constant": constant,
        "mae_gain": 1 - mae / max(constant, 1e-9),
        "pinball_90": pin,
        "pinball_90_constant": pin_constant,
        "pinball_90_gain": 1 - pin / max(pin_constant, 1e-9),
        "mean_output_tokens": float(y.mean()),
        "coverage": {b: {p: float((y <= t).mean()) for p, t in v.items()} for b, v in result.bounds.items()},
        "reserved_tokens": {b: {p: float(t.mean()) for p, t in v.items()} for b, v in result.bounds.items()},
        "top_features": {name: round(share, 4) for name, share in result.top_features},
    }


def plot(result: Result, path: Path) -> None:
    """Calibration PNG: coverage against P, and tokens set aside against P, for both bounds. Raises OSError."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    left.plot([0.45, 1], [0.45, 1], color="grey", linewidth=0.8, label="exact")
    for bound, by_p in result.bounds.items():
        at = [float(p) for p in by_p]
        left.plot(at, [(result.lengths <= t).mean() for t in by_p.values()], marker="o", label=bound)
        right.plot(at, [t.mean() for t in by_p.values()], marker="o", label=bound)
    right.axhline(result.lengths.mean(), color="grey", linewidth=0.8, label="mean length")
    left.set(xlabel="confidence P", ylabel="share of lengths within the bound")
    right.set(xlabel="confidence P", ylabel="tokens set aside, mean")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _calibrated(data: Data, train: NDArray[np.intp], seed: int) -> Calibration:
    """Calibration from what inner folds' models said about training prompts they had not seen."""
    names, prompt = np.unique(data.prompt[train], return_inverse=True)
    fold_of = _folds(len(names), INNER_FOLDS, seed + 1)[prompt]
    raw = np.zeros((len(train), len(QUANTILES)))
    for fold in range(INNER_FOLDS):
        inside, outside = train[fold_of != fold], train[fold_of == fold]
        raw[fold_of == fold] = fit(data.rows[inside], data.lengths_tokens[inside], seed).predict(
            data.rows[outside]
        )
    calibration = Calibration(window=len(train))
    calibration.seed(raw, np.log(np.maximum(data.lengths_tokens[train], 1.0)))
    return calibration


def _folds(n: int, folds: int, seed: int) -> NDArray[np.intp]:
    """Fold [n] of each of n prompts, by chance, of equal size."""
    return np.random.default_rng(seed).permutation(n) % folds


def _constant(data: Data, train: NDArray[np.intp], test: NDArray[np.intp], level: float) -> Floats:
    """Each test row's model's quantile on the training rows (everybody's for a model not among them)."""
    everybody = float(np.quantile(data.lengths_tokens[train], level))
    out = np.full(len(test), everybody)
    for model in np.unique(data.models[test]):
        mine = data.lengths_tokens[train][data.models[train] == model]
        if len(mine):
            out[data.models[test] == model] = np.quantile(mine, level)
    return out


def _empty_bounds(n: int) -> dict[str, dict[str, NDArray[np.integer]]]:
    return {bound: {str(p): np.zeros(n, np.int64) for p in CONFIDENCES} for bound in BOUNDS}


def _mae(y: Floats, prediction: Floats) -> float:
    return float(np.abs(y - prediction).mean())


def _pinball(y: Floats, prediction: Floats, level: float) -> float:
    miss = y - prediction
    return float(np.maximum(level * miss, (level - 1) * miss).mean())
