"""How long an iteration takes, and its inverse: how much prefill fits into a given time.

    T = t0(mode) + c_req * requests + max(c_tok * new + c_attn * pairs,  w + c_kv * context)
        fixed      each request       compute                        memory traffic

`new` tokens go through the layers (decodes count one each); `pairs` = sum over prefill chunks of
n * (history + n/2), the query-context products of attention; `context` = all tokens whose KV is read; `w` =
reading the weights once; `c_req` = what a request costs whatever its length (kernels that work request by
request, sampling). A lone decode batch has its own t0. All coefficients are seconds (per token, pair or
request), all at least zero.
The same JSON profile drives the server and the twin.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

MOST_TOKENS = 10**9  # a chunk without a limit


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the latency of one iteration depends on. `extend`: the batch holds at least one prefill chunk."""

    extend: bool
    new_tokens: int = 0
    pairs: float = 0.0
    context_tokens: int = 0
    requests: int = 0

    def with_chunk(self, history_tokens: int, new_tokens: int) -> BatchShape:
        """This batch with one more prefill chunk of `new_tokens` behind `history_tokens` in the cache."""
        return BatchShape(
            True,
            self.new_tokens + new_tokens,
            self.pairs + new_tokens * (history_tokens + new_tokens / 2),
            self.context_tokens + history_tokens + new_tokens,
            self.requests + 1,
        )


def decode_shape(requests: int, context_tokens: int, beside_prefill: bool = False) -> BatchShape:
    """A batch of `requests` decodes that together read `context_tokens` of KV, alone or for chunks to be added."""
    return BatchShape(beside_prefill, requests, 0.0, context_tokens, requests)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The seven numbers of the model, in seconds (per token, pair, request)."""

    t0_extend: float
    t0_decode: float
    c_tok: float
    c_attn: float
    w: float
    c_kv: float
    c_req: float = 0.0


@dataclass(frozen=True)
class LatencyModel:
    """Coefficients, the spread of their residuals, and where they come from.

    `residual_quantile` is a high quantile of measured/predicted; `iteration_s` multiplies by nothing,
    `safe_iteration_s` by it, so that a budget holds for all but the tail.
    """

    coefficients: Coefficients
    residual_quantile: float = 1.0
    name: str = "unnamed"
    kv_capacity_tokens: int = 0
    measured: bool = False
    swap_bytes_per_s: float = 25e9
    swap_overhead_s: float = 5e-4
    kv_bytes_per_token: float = 131072.0
    meta: dict[str, Any] = field(default_factory=dict)

    def iteration_s(self, shape: BatchShape) -> float:
        """Predicted seconds of an iteration of this shape."""
        c = self.coefficients
        compute = c.c_tok * shape.new_tokens + c.c_attn * shape.pairs
        memory = c.w + c.c_kv * shape.context_tokens
        fixed = (c.t0_extend if shape.extend else c.t0_decode) + c.c_req * shape.requests
        return fixed + max(compute, memory)

    def safe_iteration_s(self, shape: BatchShape) -> float:
        """Seconds that an iteration of this shape exceeds only in the tail of the residuals."""
        return self.iteration_s(shape) * self.residual_quantile

    def prefill_s(self, history_tokens: int, new_tokens: int) -> float:
        """Compute time that a prefill adds, seconds, without the fixed part of its iterations."""
        c = self.coefficients
        return c.c_tok * new_tokens + c.c_attn * new_tokens * (history_tokens + new_tokens / 2)

    def prefill_s_array(self, history_tokens: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        """`prefill_s` for arrays of n requests; float[n]."""
        c = self.coefficients
        return new_tokens * (c.c_tok + c.c_attn * (history_tokens + 0.5 * new_tokens))

    def largest_chunk(self, base: BatchShape, history_tokens: int, time_s: float) -> int:
        """Most tokens n so that `base` with a chunk of n behind `history_tokens` is predicted to fit.

        Exact: iteration_s(n) <= time_s < iteration_s(n + 1); 0 if not even one token fits.
        From t0 + c_req (requests0 + 1) + max(compute, memory) <= time_s both sides are solved alone, with
        b = time_s - t0 - c_req (requests0 + 1):
        compute  c_attn/2 n^2 + (c_tok + c_attn h) n + (c_tok new0 + c_attn pairs0) <= b     (quadratic in n)
        memory   w + c_kv (context0 + h + n) <= b                                            (linear in n)
        """
        if time_s == math.inf:
            return MOST_TOKENS
        c = self.coefficients
        b = time_s - c.t0_extend - c.c_req * (base.requests + 1)
        a2, a1 = c.c_attn / 2, c.c_tok + c.c_attn * history_tokens
        a0 = c.c_tok * base.new_tokens + c.c_attn * base.pairs - b
        compute = memory = math.inf
        if a0 >= 0:
            compute = 0.0
        elif a1 > 0 or a2 > 0:
            # the numerically stable root of a2 n^2 + a1 n + a0 = 0 (no cancellation for small a2)
            compute = -2 * a0 / (a1 + math.sqrt(a1 * a1 - 4 * a2 * a0))
        if c.c_kv > 0:
            memory = (b - c.w) / c.c_kv - base.context_tokens - history_tokens
        elif c.w > b:
            memory = 0.0
        near = int(max(min(compute, memory, MOST_TOKENS), 0))
        return _last_true(
            lambda n: self.iteration_s(base.with_chunk(history_tokens, n)) <= time_s, near, MOST_TOKENS
        )

    def saturating_tokens(self) -> int:
        """Tokens beyond which a larger prefill gains under 2 % of throughput: fixed cost / 2 % of c_tok."""
        c = self.coefficients
        return max(int(c.t0_extend / (0.02 * max(c.c_tok, 1e-9))), 256)

    def scaled(self, factor: float) -> LatencyModel:
        """The same model with every coefficient multiplied: for tests of a wrong profile."""
        c = {k: v * factor for k, v in asdict(self.coefficients).items()}
        return replace(self, coefficients=Coefficients(**c))

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")  # replicas may write at the same time
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> LatencyModel:
        """Read a profile. Raises ProfileError naming the file and the field."""
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ProfileError(f"profile {path}: {error}") from error
        return LatencyModel.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: Any, where: str) -> LatencyModel:
        """Check and build. Raises ProfileError naming the field."""
        if not isinstance(raw, dict) or not isinstance(raw.get("coefficients"), dict):
            raise ProfileError(f"profile {where}: need an object with `coefficients`")
        names = Coefficients.__dataclass_fields__
        for name in names:
            value = raw["coefficients"].get(name, OPTIONAL.get(name))
            if not _number_of(0)(value):
                raise ProfileError(
                    f"profile {where}: coefficients.{name}: need seconds of at least 0, got {value!r}"
                )
        extra = set(raw["coefficients"]) - set(names)
        unknown = extra | (set(raw) - set(LatencyModel.__dataclass_fields__))
        if unknown:
            raise ProfileError(f"profile {where}: unknown field {sorted(unknown)[0]!r}")
        rest = {k: v for k, v in raw.items() if k != "coefficients"}
        for name, value in rest.items():
            accepted, good = FIELDS[name]
            if not good(value):
                raise ProfileError(f"profile {where}: {name}: need {accepted}, got {value!r}")
        return LatencyModel(Coefficients(**raw["coefficients"]), **rest)


def _number_of(low: float, strictly: bool = False) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value > low if strictly else value >= low

    return good


# Coefficients that a profile file may leave out, and what they are then.
OPTIONAL = {f.name: f.default for f in fields(Coefficients) if f.default is not MISSING}
# What a profile file may hold beside the coefficients: what is accepted, in words and as a test.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "residual_quantile": ("a number of at least 1", _number_of(1)),
    "name": ("text", lambda value: isinstance(value, str)),
    "kv_capacity_tokens": ("a number of tokens of at least 0", _number_of(0)),
    "measured": ("true or false", lambda value: isinstance(value, bool)),
    "swap_bytes_per_s": ("a number above 0", _number_of(0, strictly=True)),
    "swap_overhead_s": ("seconds of at least 0", _number_of(0)),
    "kv_bytes_per_token": ("a number above 0", _number_of(0, strictly=True)),
    "meta": ("an object", lambda value: isinstance(value, dict)),
}


def _last_true(fits: Callable[[int], bool], near: int, most: int) -> int:
    """The last n in [0, most] up to which `fits` is true (0 if not even 1 does), looked for around `near`.

    Rounding moves the solution of an equation by a token or, where a coefficient is tiny, by many: the step
    doubles until the end is between `low` (true) and `high` (false), then halves.
    """
    low, high, step = 0, most + 1, 1
    if near > 0 and not fits(near):
        high = near
        while high - step > 0 and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(high - step, 0)
    else:
        low = near
        while low + step <= most and fits(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class ProfileError(ValueError):
    """A latency profile that cannot be used."""
