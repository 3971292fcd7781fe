"""The time an iteration may take, who decodes in it, and how much prefill fits beside them (AccelGen A1).

        last token     predicted end of the          end of the iteration
        of a request   iteration in flight (base)    planned here
    ────────┼──────────────────┼──────────────────────────┼────────▶ time
            │◀──────── gap limit x (1 - margin) ─────────▶│
                               │◀─────── allowance ──────▶│

The gap that counts runs from one iteration's end to another's, so allowances count from `base`, not from now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sglang_slo.core.latency import BatchShape, LatencyModel, decode_shape


def allowances_s(last_token_s: np.ndarray, tbt_s: np.ndarray, ready_s: float, margin: float) -> np.ndarray:
    """Seconds from `ready_s` within which each decode must end; float[n], inf: no limit. `margin`: share left unused."""
    return last_token_s + tbt_s * (1 - margin) - ready_s


@dataclass(frozen=True, slots=True)
class DecodeChoice:
    """Which of the decoding requests take part: positions into the arrays given, their count and context."""

    positions: np.ndarray | None  # None: all of them
    requests: int
    context_tokens: int
    allowance_s: float  # the smallest among those who take part
    verified: int = 1  # tokens that each computes, in a batch of their own

    @property
    def shape(self) -> BatchShape:
        """Their shape as a batch of their own."""
        return decode_shape(self.requests, self.context_tokens, verified=self.verified)

    @property
    def mixed_shape(self) -> BatchShape:
        """Their shape beside prefill."""
        return decode_shape(self.requests, self.context_tokens, beside_prefill=True)


def choose_decodes(
    allowance_s: np.ndarray,
    context_tokens: np.ndarray,
    model: LatencyModel,
    may_sit_out: bool,
    verified: int = 1,
) -> DecodeChoice:
    """Everyone, unless the decode alone would pass the tightest allowance; then the looser ones sit this one out.

    Taken by allowance, tightest first: the longest such prefix whose decode ends within the tightest allowance.
    A looser request's allowance shrinks while it sits out, so it comes first before its own limit passes.
    At least one request decodes. `verified`: tokens that each computes (speculative decoding).

    Only if that helps: in such turns, `count` at a time, the one at place j of the order has its token after
    floor(j / count) + 1 iterations. Where one of them would be late by its own allowance, everyone decodes: what all share
    of an iteration (its fixed cost, the weights) is then paid once instead of once a turn.
    """
    total = int(context_tokens.sum())
    everyone = DecodeChoice(None, len(allowance_s), total, float(allowance_s.min()), verified)
    if not may_sit_out or everyone.allowance_s == math.inf:
        return everyone
    if model.safe_iteration_s(everyone.shape) <= everyone.allowance_s:
        return everyone
    order = np.argsort(allowance_s, kind="stable")
    contexts = np.cumsum(context_tokens[order])
    limit = max(everyone.allowance_s, 0.0)
    low, high = 1, len(order)
    while low < high:  # largest count that still fits; cost grows with the count
        middle = (low + high + 1) // 2
        shape = decode_shape(middle, int(contexts[middle - 1]), verified=verified)
        fits = model.safe_iteration_s(shape) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    # those whose limit has passed or is about to cannot be helped by leaving the others out any further
    due = int(np.searchsorted(allowance_s[order], limit, side="right"))
    count = max(low, min(due, len(order)))
    turn_s = model.safe_iteration_s(decode_shape(count, int(contexts[count - 1]), verified=verified))
    waits_s = turn_s * (np.arange(count, len(order)) // count + 1)
    if (allowance_s[order[count:]] < waits_s).any():
        return everyone
    return DecodeChoice(order[:count], count, int(contexts[count - 1]), everyone.allowance_s, verified)


class DecodeLoad:
    """Share of time that decoding takes if each request gets a token just within its limit; the admission test.

    Every iteration pays t0 + w, at the rate of the tightest limit L; request i adds its own traffic once per its
    limit l_i:  U = (t0 + w) / L + sum_i (c_req + c_kv * context_i) / l_i.  U <= 1 is necessary for all limits to hold (each
    term is time that nothing else can use), as in rate-monotonic analysis. A newcomer that would push U past
    `most` stays out, unless nobody with a limit decodes.
    """

    def __init__(
        self, tbt_s: np.ndarray, context_tokens: np.ndarray, model: LatencyModel, most: float
    ) -> None:
        self._model, self._most = model, most
        self._tightest_s = float(tbt_s.min()) if len(tbt_s) else math.inf
        c = model.coefficients
        self._each = float(((c.c_req + c.c_kv * context_tokens) / tbt_s).sum())

    def utilisation(self, tbt_s: float = math.inf, context_tokens: int = 0) -> float:
        """U, with one more request if one is given."""
        c = self._model.coefficients
        tightest_s = min(self._tightest_s, tbt_s)
        return (c.t0_decode + c.w) / tightest_s + self._each + (c.c_req + c.c_kv * context_tokens) / tbt_s

    def admits(self, tbt_s: float, context_tokens: int) -> bool:
        """Whether a request with this limit and context may join."""
        if self._tightest_s == math.inf or tbt_s == math.inf:
            return True
        return self.utilisation(tbt_s, context_tokens) <= self._most

    def add(self, tbt_s: float, context_tokens: int) -> None:
        """Charge a request that joined."""
        c = self._model.coefficients
        self._each += (c.c_req + c.c_kv * context_tokens) / tbt_s
        self._tightest_s = min(self._tightest_s, tbt_s)


@dataclass(frozen=True, slots=True)
class Budget:
    """One iteration's form: with the decodes (`mixed`) or prefill alone, and the seconds it may take."""

    mixed: bool
    time_s: float
    base: BatchShape  # what is in the batch before any prefill

    def tokens(self, model: LatencyModel, history_tokens: int = 0) -> int:
        """Largest prefill chunk behind `history_tokens` that still fits."""
        return model.largest_safe_chunk(self.base, history_tokens, self.time_s)


def iteration_budget(
    decodes: DecodeChoice | None, model: LatencyModel, cap_s: float, mix: str, backlog_tokens: int
) -> Budget:
    """The iteration's time and form: mixed or apart, whichever lets more prefill through inside the limits.

    Apart, the decodes wait for the prefill and then take an iteration of their own, so both must fit into the
    allowance. With all `backlog_tokens` fitting either way, the form that is done sooner wins. `mix` is auto,
    always or never. `cap_s` bounds every iteration, so that an arrival never waits long for its first chance.
    """
    if decodes is None:
        return Budget(False, cap_s, BatchShape(True))
    time_s = min(max(decodes.allowance_s, 0.0), cap_s)
    mixed = Budget(True, time_s, decodes.mixed_shape)
    if mix == "always":
        return mixed
    decode_s = model.safe_iteration_s(decodes.shape)
    apart = Budget(False, max(time_s - decode_s, 0.0), BatchShape(True))
    if mix == "never":
        return apart
    in_mixed = min(mixed.tokens(model), backlog_tokens)
    in_apart = min(apart.tokens(model), backlog_tokens)
    if in_mixed != in_apart:
        return mixed if in_mixed > in_apart else apart
    mixed_s = model.iteration_s(mixed.base.with_chunk(0, in_mixed))
    apart_s = model.iteration_s(apart.base.with_chunk(0, in_apart)) + decode_s
    return mixed if mixed_s <= apart_s else apart
