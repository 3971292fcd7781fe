"""Fits the latency model to measured iterations, robustly and fast enough to do it while serving.

The model is T = t0(mode) + c_req * requests + max(c_tok * new, w) + c_attn * pairs + c_kv * context, linear in
its seven coefficients once it is known which side of the maximum an iteration is on, its regime. So two steps
alternate: every sample is put into the regime that the coefficients at hand predict for it, then the
coefficients are fitted with the samples' regimes fixed. A
sample counts by its *relative* error (5 ms matter as much as 200 ms), and less the further off it is (Huber,
1964), so that a stall of the host does not bend the model. Coefficients are never negative. What the samples
do not tell apart stays where the prior has it: each coefficient is pulled there with the weight that the
samples' noise leaves it. The same samples and prior give the same coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sglang_slo.core.latency import Coefficients
from sglang_slo.core.samples import Floats, Samples

Mask = NDArray[np.bool_]

ROUNDS = 12  # of assigning regimes and fitting; it settles in three to six
HUBER = 1.345  # in robust standard deviations: 95 % efficient on normal errors (Huber, 1964)
PRIOR_SPREAD = 0.25  # a profile may be this far off (relative)
LEAST_SPREAD = 2e-3  # relative; errors below it are all the same to the fit
TAIL = 8  # samples beyond a quantile that make it worth counting
EXACT = 1e-9  # relative; no fit needs to be better


def predict_s(c: Coefficients, samples: Samples) -> Floats:
    """`LatencyModel.iteration_s` for arrays; float[n], seconds."""
    fixed = np.where(samples.extend, c.t0_extend, c.t0_decode) + c.c_req * samples.requests
    layers = np.maximum(c.c_tok * samples.new_tokens, c.w)
    found: np.ndarray = fixed + layers + (c.c_attn * samples.pairs + c.c_kv * samples.context_tokens)
    return found


def fit(
    samples: Samples,
    prior: Coefficients,
    prior_spread: float = PRIOR_SPREAD,
    starts: Sequence[Coefficients] = (),
) -> Coefficients:
    """Coefficients of least robust relative error; `prior` if there are no samples.

    `prior_spread` is how far off the prior's coefficients may be, relative, one standard deviation. The
    regimes are first taken from `prior`, then from each of `starts` (for when the prior is no more than a
    guess); the best end wins, the first one if they are equal. Cost: about 0.1 ms a round for 512 samples.
    """
    if len(samples) == 0:
        return prior
    scale = _scales(samples, prior)
    best, least = prior, np.inf
    for start in (prior, *starts):
        found, loss = _alternate(samples, start, np.array(astuple(prior)), scale, prior_spread)
        if loss < least * (1 - 1e-9):
            best, least = found, loss
    return best


def guesses(samples: Samples) -> list[Coefficients]:
    """Starting points from the samples alone: prefill bound by compute, decode by either; all by memory."""
    seconds = float(np.median(samples.seconds))
    tokens = max(float(samples.new_tokens.max()), 1.0)
    context = max(float(samples.context_tokens.max()), 1.0)
    c_tok = float(samples.seconds.max()) / tokens
    usual = Coefficients(seconds / 4, seconds / 4, c_tok, 0.0, seconds / 4, seconds / context)
    compute = Coefficients(seconds / 4, seconds / 4, c_tok, 0.0, 0.0, 0.0)
    memory = Coefficients(
        seconds / 4, seconds / 4, 0.0, 0.0, seconds / 4, float(samples.seconds.max()) / context
    )
    return [usual, compute, memory]


def margins(samples: Samples, predicted: Floats, level: float, most: float = 2.0) -> tuple[float, float]:
    """The margins of iterations with prefill and of decodes alone: a quantile of measured / predicted each.

    Decodes alone are most of the traffic, and easy to predict: among them the errors of those with prefill would not
    show. They have no less than all together have, so that what is learnt of the device of late counts for both.
    A kind of which there is no sample has what all have.
    """
    ratios = samples.seconds / predicted
    overall = residual_quantile(ratios, level, most)
    extend, decode = ratios[samples.extend], ratios[~samples.extend]
    margin_extend = residual_quantile(extend, level, most) if len(extend) else overall
    return margin_extend, max(overall, residual_quantile(decode, level, most))


def residual_quantile(ratios: Floats, level: float, most: float = 2.0) -> float:
    """The `level` quantile of measured/predicted, within [1, most].

    Counted where at least TAIL of the ratios lie beyond it. With fewer, the tail is the larger of what was
    seen and of what a lognormal with the ratios' median and robust spread would have: exp(median + z sigma).
    At least 1: a budget is never planned longer than the prediction. At most `most`: rare stalls of the host,
    which no budget can prevent, must not throttle every iteration.
    """
    if len(ratios) == 0:
        return 1.0
    quantile = float(np.quantile(ratios, level, method="higher"))
    if len(ratios) * (1 - level) < TAIL:
        logs = np.log(np.maximum(ratios, 1e-9))
        middle = float(np.median(logs))
        sigma = 1.4826 * float(np.median(np.abs(logs - middle)))
        quantile = max(quantile, math.exp(middle + NormalDist().inv_cdf(level) * sigma))
    return round(min(max(quantile, 1.0), most), 4)


def _columns(samples: Samples, compute_bound: Mask) -> Floats:
    """The design matrix float[n, 7] with the regimes fixed, in the order of `Coefficients`."""
    return np.column_stack(
        (
            samples.extend,
            ~samples.extend,
            samples.new_tokens * compute_bound,
            samples.pairs,
            ~compute_bound,
            samples.context_tokens,
            samples.requests,
        )
    ).astype(np.float64)


def _scales(samples: Samples, prior: Coefficients) -> Floats:
    """A typical size of each coefficient, float[7]: the prior's, or what would explain a tenth of the time.

    The design matrix is taken in both regimes: it is not known yet which one a coefficient will be fitted in.
    """
    everything = np.ones(len(samples), bool)
    compute, memory = _columns(samples, everything), _columns(samples, ~everything)
    reach = np.maximum(np.abs(compute).mean(0), np.abs(memory).mean(0))
    tenth = 0.1 * samples.seconds.mean() / np.maximum(reach, 1e-12)
    given = np.array(astuple(prior))
    return np.where(given > 0, given, tenth)


def _alternate(
    samples: Samples, start: Coefficients, prior: Floats, scale: Floats, prior_spread: float
) -> tuple[Coefficients, float]:
    """Assign regimes and fit by turns from `start`; the best of all rounds, and its mean relative error."""
    best, least, at, worse = start, np.inf, start, 0
    for _ in range(ROUNDS):
        predicted = np.maximum(predict_s(at, samples), 1e-9)
        error = np.abs(samples.seconds / predicted - 1)
        loss = float(np.average(error, weights=samples.weight))
        if loss < least * (1 - 1e-3):
            best, least, worse = at, loss, 0
        else:
            worse += 1
        if worse == 2 or least < EXACT:
            break
        # 1.4826 median |e| is the standard deviation if the errors are normal
        spread = max(1.4826 * float(np.median(error)), LEAST_SPREAD)
        huber = np.minimum(1.0, HUBER * spread / np.maximum(error, EXACT))
        columns = _columns(samples, at.c_tok * samples.new_tokens >= at.w)
        root_weight = np.sqrt(samples.weight * huber) / predicted
        pull = (spread / prior_spread) ** 2
        at = Coefficients(*_solve(columns, samples.seconds, root_weight, prior, scale, pull).tolist())
    return best, least


def _solve(
    columns: Floats, seconds: Floats, root_weight: Floats, prior: Floats, scale: Floats, pull: float
) -> Floats:
    """Weighted least squares with coefficients of at least zero, pulled towards the prior; float[7].

    In units of `scale`, x = theta / scale: minimise |A x - b|^2 + pull |x - prior / scale|^2. With errors of
    variance s^2 and a prior of relative variance p^2 the most probable x has pull = s^2 / p^2. The normal
    matrix A'A + pull I = L L' is 7 x 7, and the same x minimises |L' x - L^-1 (A'b + pull prior / scale)|.
    """
    a, b = columns * scale * root_weight[:, None], seconds * root_weight
    lower = np.linalg.cholesky(a.T @ a + pull * np.eye(len(scale)))
    x, _ = nnls(lower.T, np.linalg.solve(lower, a.T @ b + pull * prior / scale))
    found: np.ndarray = x * scale
    return found
