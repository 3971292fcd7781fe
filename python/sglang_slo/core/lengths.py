"""How long an output may get: distributions as quantile grids, bounds at a confidence, what remains.

A predicted length is one row of log quantiles on the fixed grid `QUANTILES`. Between the grid points the cumulative
hazard H = -ln P(L > l) is taken to be linear in ln l, and the last piece goes on for ever (a Pareto tail), so every
question is one inversion of one piecewise linear curve:

    H |               /  <- same slope for ever        l with P(L > l) = 1 - P        : H(l) = ln 1/(1-P)
      |          ____/                                 r with P(L > g+r | L > g) = 1-P: H(g+r) = H(g) + ln 1/(1-P)
      |      ___/
      |_____/________ ln l

Always: 1 <= bound, 1 <= remaining, and neither passes what the client declared. All lengths are in tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

QUANTILES = np.array([0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99])
MEDIAN = 3  # column of the median
MAX_LENGTH_TOKENS = 2**30  # stands for "no declared maximum"

_HAZARD = np.concatenate([[0.0], -np.log1p(-QUANTILES)])  # H at the knots; the first knot is (ln 1, 0)
_MIN_STEP = 1e-8  # least ln l between two knots: keeps the curve invertible where quantiles coincide
_MAX_LOG = math.log(MAX_LENGTH_TOKENS)
# -ln(1 - level) of the eight levels over which an expectation is averaged, float[8, 1]
_LEVEL_HAZARDS = -np.log1p(-(np.arange(8) + 0.5) / 8)[:, None]

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def confidence_from_load(load: float, low: float, high: float) -> float:
    """Confidence P of length bounds at a load (arrival rate / measured capacity), P = a / (1 + b load).

    CacheOPT's form with a and b set by the two ends that a user can name: `high` at load 0, `low` at load 1, and
    never outside of them. NaN (nothing measured yet) counts as no load.
    """
    if not load > 0:
        return high
    return min(high, max(low, high / (1.0 + (high / low - 1.0) * load))) if low > 0 else low


def bound_total_tokens(log_quantiles: Floats, confidence: float, declared_max: Ints) -> Ints:
    """Length that is passed with probability at most 1 - confidence; int64 [n] in [1, declared_max].

    `log_quantiles` [n, Q] natural logs on `QUANTILES`, `declared_max` [n] tokens, `confidence` in [0, 1).
    """
    return remaining_tokens(log_quantiles, np.zeros(len(log_quantiles), np.int64), declared_max, confidence)


def remaining_tokens(log_quantiles: Floats, generated: Ints, declared_max: Ints, confidence: float) -> Ints:
    """Smallest r with P(L > g + r | L > g) <= 1 - confidence; int64 [n], 1 <= r <= max(1, declared_max - g).

    `log_quantiles` [n, Q], `generated` [n] tokens written so far (g), `declared_max` [n] tokens. Raises
    ValueError for a confidence outside [0, 1).
    """
    return remaining_and_expected(log_quantiles, generated, declared_max, confidence)[0]


def expected_remaining_tokens(log_quantiles: Floats, generated: Ints, declared_max: Ints) -> Floats:
    """Mean of what remains given survival, float64 [n], each at least 1: the order in which victims are looked for.

    The mean over eight equally likely levels, each cut at the declared maximum; shapes as `remaining_tokens`.
    """
    return remaining_and_expected(log_quantiles, generated, declared_max, 0.0)[1]


def remaining_and_expected(
    log_quantiles: Floats, generated: Ints, declared_max: Ints, confidence: float
) -> tuple[Ints, Floats]:
    """Both of the above, with what they share done once."""
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence: need a number in [0, 1), got {confidence}")
    knots = _knots(log_quantiles)
    now = _hazard_at(knots, generated)
    most = np.maximum(np.asarray(declared_max, np.int64) - generated, 1)
    # the first level is the bound's, the others are averaged
    levels = np.concatenate([[[-math.log1p(-confidence)]], _LEVEL_HAZARDS])
    left = np.exp(_log_length_at(knots, now + levels)) - generated
    expected = np.clip(left[1:], 1, most).sum(axis=0) / len(_LEVEL_HAZARDS)
    return _whole(left[0], generated, most), expected


def remaining_moments(log_quantiles: Floats, generated: Ints, declared_max: Ints) -> tuple[Floats, Floats]:
    """E[R] and E[R^2] of what remains given survival, float64 [n] each: means over the same eight levels.

    For the KV area of a request, which grows with the square of what it still writes. Shapes as `remaining_tokens`.
    """
    knots = _knots(log_quantiles)
    most = np.maximum(np.asarray(declared_max, np.int64) - generated, 1)
    left = np.exp(_log_length_at(knots, _hazard_at(knots, generated) + _LEVEL_HAZARDS)) - generated
    left = np.clip(left, 1, most)
    return left.mean(axis=0), np.square(left).mean(axis=0)


def declared_only(declared_max: Ints) -> Floats:
    """Log quantiles [n, Q] of requests about which only the declared maximum is known: they are taken at their word."""
    logs = np.log(np.maximum(np.asarray(declared_max, np.float64), 1.0))
    return np.repeat(logs[:, None], len(QUANTILES), axis=1)


def _knots(log_quantiles: Floats) -> Floats:
    """ln l at the ten knots, [n, Q + 1], strictly increasing from ln 1."""
    rows = np.asarray(log_quantiles, np.float64)
    knots = np.concatenate(
        [np.zeros((len(rows), 1)), np.clip(np.nan_to_num(rows, nan=0.0), 0.0, _MAX_LOG)], axis=1
    )
    steps = _MIN_STEP * np.arange(knots.shape[1])
    return np.maximum.accumulate(knots - steps, axis=1) + steps


def _hazard_at(knots: Floats, length: Ints) -> Floats:
    """H(length) [n]; 0 up to one token."""
    x = np.log(np.maximum(length, 1))
    piece = np.clip((knots <= x[:, None]).sum(axis=1) - 1, 0, knots.shape[1] - 2)
    rows = np.arange(len(knots))
    left, right = knots[rows, piece], knots[rows, piece + 1]
    found: Floats = _HAZARD[piece] + (x - left) * (_HAZARD[piece + 1] - _HAZARD[piece]) / (right - left)
    return found


def _log_length_at(knots: Floats, hazard: Floats) -> Floats:
    """Inverse of `_hazard_at`, at most the log of `MAX_LENGTH_TOKENS`; hazard [n] or [m, n], result alike."""
    piece = np.clip(np.searchsorted(_HAZARD, hazard, side="right") - 1, 0, knots.shape[1] - 2)
    rows = np.arange(len(knots))
    left, right = knots[rows, piece], knots[rows, piece + 1]
    x = left + (hazard - _HAZARD[piece]) * (right - left) / (_HAZARD[piece + 1] - _HAZARD[piece])
    found: Floats = np.minimum(x, _MAX_LOG)
    return found


def _whole(remaining: Floats, generated: Ints, most: Ints) -> Ints:
    """Round up to whole tokens in [1, most]; a millionth forgives the logarithm's rounding."""
    whole = np.ceil(remaining - 1e-6 * (generated + remaining)).astype(np.int64)
    return np.clip(whole, 1, most)
