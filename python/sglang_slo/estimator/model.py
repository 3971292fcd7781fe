"""The length model: quantiles of the log length by boosted trees, helped by a text head and typical lengths.

`fit` learns from finished requests, `LengthModel.predict` gives raw log quantiles [n, Q] (calibration is another
step, `core.calibration`). The trees predict the log of length over what is typical of the request's model, all
quantiles of `core.lengths.QUANTILES` at once. Same rows, same seed: same model, bit for bit (one thread).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

from sglang_slo.core.lengths import QUANTILES
from sglang_slo.estimator import head as text_head
from sglang_slo.estimator.features import DENSE_COLUMNS, HEAD_GRAMS, UNIGRAM_BINS, Rows
from sglang_slo.estimator.head import TextHead
from sglang_slo.estimator.typical import Typical

WORD_COLUMNS = 16  # hashed words that the trees see one by one
EARLY_STOP_SHARE = 0.15  # of prompts, held out to choose the number of rounds
OFFSET_SHARE = 0.7  # of the head's answer that the trees start from
MAX_ROUNDS, PATIENCE = 160, 15
COLUMNS = (
    *DENSE_COLUMNS,
    *("head", "own head", "group median", "group spread", "class median", "class spread"),
    *(f"word {i}" for i in range(WORD_COLUMNS)),
)
PARAMS = {
    "objective": "reg:quantileerror",
    "quantile_alpha": QUANTILES.tolist(),
    "tree_method": "hist",
    "max_bin": 32,
    "max_depth": 4,
    "eta": 0.05,
    "min_child_weight": 20.0,
    "subsample": 0.7,
    "colsample_bytree": 0.25,
    "nthread": 1,
    "verbosity": 0,
}

Floats = NDArray[np.floating]


@dataclass
class LengthModel:
    """A fitted model. `rows` it was fitted on, `rounds` of boosting; the rest as its modules say."""

    booster: xgb.Booster
    head: TextHead
    typical: Typical
    rows: int
    rounds: int

    def predict(self, rows: Rows) -> Floats:
        """Raw log quantiles float64 [n, Q], monotone along a row."""
        if len(rows) == 0:
            return np.zeros((0, len(QUANTILES)))
        answers = self.head.predict(rows)
        columns = _columns(rows, answers, self.typical)
        out = self.booster.inplace_predict(columns).reshape(len(rows), len(QUANTILES))
        out = out + (self.typical.group_median(rows["group"]) + _offset(answers))[:, None]
        return np.asarray(np.maximum.accumulate(np.maximum(out, 0.0), axis=1), np.float64)

    def top_features(self, n: int = 12) -> list[tuple[str, float]]:
        """The n columns with the largest share of the gain."""
        gain = self.booster.get_score(importance_type="total_gain")
        total = sum(float(v) for v in gain.values()) or 1.0
        shares = {COLUMNS[int(k[1:])]: float(v) / total for k, v in gain.items()}
        return sorted(shares.items(), key=lambda kv: -kv[1])[:n]


def fit(rows: Rows, lengths_tokens: Floats, seed: int = 0, max_rounds: int = MAX_ROUNDS) -> LengthModel:
    """Learn from `rows` [n] with output lengths [n] in tokens, n >= 32. Raises ValueError for fewer rows."""
    if len(rows) < 32 or len(rows) != len(lengths_tokens):
        raise ValueError(
            f"rows: need at least 32 with as many lengths, got {len(rows)} and {len(lengths_tokens)}"
        )
    logs = np.log(np.maximum(np.asarray(lengths_tokens, np.float64), 1.0))
    typical = Typical.fit(rows, logs)
    centre = typical.group_median(rows["group"])
    head, answers = text_head.fit(rows, np.exp(logs - centre), seed)
    columns = _columns(rows, answers, typical)
    weight = np.clip(answers[:, 0] ** 2, 0.1, 4.0)  # a token of error counts the same whatever the length
    held = _held_out(rows["prompt"], seed)
    booster, rounds = _boost(columns, logs - centre - _offset(answers), weight, held, seed, max_rounds)
    return LengthModel(booster, head, typical, len(rows), rounds)


def _boost(
    columns: NDArray[np.float32],
    target: Floats,
    weight: Floats,
    held: NDArray[np.bool_],
    seed: int,
    most: int,
) -> tuple[xgb.Booster, int]:
    """Find the number of rounds on the held-out prompts, then fit all rows with that many."""
    params = {**PARAMS, "seed": seed}
    train = xgb.QuantileDMatrix(columns[~held], target[~held], weight=weight[~held], max_bin=32)
    check = xgb.QuantileDMatrix(columns[held], target[held], weight=weight[held], ref=train, max_bin=32)
    trial = xgb.train(
        params, train, most, evals=[(check, "held")], early_stopping_rounds=PATIENCE, verbose_eval=False
    )
    rounds = max(10, trial.best_iteration + 1)
    whole = xgb.QuantileDMatrix(columns, target, weight=weight, max_bin=32)
    booster = xgb.train(params, whole, rounds)
    booster.set_param({"nthread": 1})
    return booster, rounds


def _offset(answers: Floats) -> Floats:
    """What the head says [n] in log units over the typical length: the trees start from there."""
    found: np.ndarray = OFFSET_SHARE * 2 * np.log(np.maximum(answers.mean(axis=1), 0.1))
    return found


def _held_out(prompt: NDArray[np.uint64], seed: int) -> NDArray[np.bool_]:
    """Which rows [n] to stop by: whole prompts, so that no prompt is on both sides."""
    names, inverse = np.unique(prompt, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = order < max(1, int(EARLY_STOP_SHARE * len(names)))
    held = chosen[inverse]
    if held.all() or not held.any() or len(names) < 8:  # prompts that repeat: fall back to rows
        held = np.arange(len(prompt)) % 7 == 3
    return np.asarray(held, bool)


def _columns(rows: Rows, answers: Floats, typical: Typical) -> NDArray[np.float32]:
    """What the trees see, float32 [n, len(COLUMNS)]."""
    grams = np.ascontiguousarray(rows["grams"][:, :HEAD_GRAMS]).ravel()
    there = np.flatnonzero(grams < UNIGRAM_BINS)
    flat = there // HEAD_GRAMS * WORD_COLUMNS + grams[there] % WORD_COLUMNS
    words = np.bincount(flat, minlength=len(rows) * WORD_COLUMNS).reshape(len(rows), WORD_COLUMNS)
    parts = [rows["dense"], answers, typical.columns(rows), words]
    return np.concatenate([np.asarray(p, np.float32) for p in parts], axis=1)


def pinball(log_quantiles: Floats, lengths_tokens: Floats, column: int | None = None) -> float:
    """Mean pinball loss in tokens: of one column of `QUANTILES`, or over all."""
    lengths = np.asarray(lengths_tokens, np.float64)[:, None]
    miss = lengths - np.exp(log_quantiles)
    loss = np.maximum(QUANTILES * miss, (QUANTILES - 1) * miss)
    return float(loss.mean() if column is None else loss[:, column].mean())
