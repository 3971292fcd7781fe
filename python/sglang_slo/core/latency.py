"""How long an iteration takes, and its inverse: how much prefill fits into a given time.

    T = t0(mode) + c_req * requests + max(c_tok * new, w) + c_attn * pairs + c_kv * context
        fixed      each request       layers: compute       attention: prefill's, and reading KV
                                      beside the weights

`new` tokens go through the layers (decodes count one each), which takes as long as computing them or as reading
the weights once (`w`), whichever is longer; attention comes on top of it, layer by layer. `pairs` = sum over
prefill chunks of n * (history + n/2), the query-context products; `context` = all tokens whose KV is read;
`c_req` = what a request costs whatever its length (kernels that work request by request, sampling). A lone
decode batch has its own t0. All coefficients are seconds (per token, pair or request), all at least zero.
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
from numpy.typing import NDArray

MOST_TOKENS = 10**9  # a chunk without a limit
VERSION = 2  # of the form of T, in a profile's file: 1 hid attention behind compute or weights
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the latency of one iteration depends on. `extend`: the batch holds at least one prefill chunk.

    `load_s`: KV is loaded from host memory for so long beside it, layer by layer ahead of the compute.
    """

    extend: bool
    new_tokens: int = 0
    pairs: float = 0.0
    context_tokens: int = 0
    requests: int = 0
    load_s: float = 0.0

    def with_chunk(self, history_tokens: int, new_tokens: int) -> BatchShape:
        """This batch with one more prefill chunk of `new_tokens` behind `history_tokens` in the cache."""
        return BatchShape(
            True,
            self.new_tokens + new_tokens,
            self.pairs + new_tokens * (history_tokens + new_tokens / 2),
            self.context_tokens + history_tokens + new_tokens,
            self.requests + 1,
            self.load_s,
        )

    def loading(self, seconds: float) -> BatchShape:
        """This batch while so much longer is loaded from the host."""
        return replace(self, load_s=self.load_s + seconds)


def decode_shape(
    requests: int, context_tokens: int, beside_prefill: bool = False, verified: int = 1
) -> BatchShape:
    """A batch of `requests` decodes that together read `context_tokens` of KV, alone or for chunks to be added.

    `verified`: tokens that each computes alone (speculative decoding); beside prefill each computes one.
    """
    new_tokens = requests if beside_prefill else requests * verified
    return BatchShape(beside_prefill, new_tokens, 0.0, context_tokens, requests)


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
    """Coefficients, how far measured iterations exceed them, and where they come from.

    The margins are high quantiles of measured / predicted, of iterations with prefill and of decodes alone:
    `iteration_s` multiplies by nothing, `safe_iteration_s` by the margin of its kind, so that a budget holds
    for all but the tail.
    """

    coefficients: Coefficients
    margin_extend: float = 1.0
    margin_decode: float = 1.0
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
        fixed = (c.t0_extend if shape.extend else c.t0_decode) + c.c_req * shape.requests
        layers = max(c.c_tok * shape.new_tokens, c.w)
        return max(fixed + layers + (c.c_attn * shape.pairs + c.c_kv * shape.context_tokens), shape.load_s)

    def margin(self, shape: BatchShape) -> float:
        """By how much an iteration of this kind may exceed its prediction, but for the tail; a factor >= 1."""
        return self.margin_extend if shape.extend else self.margin_decode

    def safe_iteration_s(self, shape: BatchShape) -> float:
        """Seconds that an iteration of this shape exceeds only in the tail of the residuals."""
        return self.iteration_s(shape) * self.margin(shape)

    def safe_decode_s_array(self, requests: np.ndarray, context_tokens: np.ndarray) -> Floats:
        """`safe_iteration_s(decode_shape(...))` for arrays of n batches of decodes alone; float[n]."""
        c = self.coefficients
        layers = np.maximum(c.c_tok * requests, c.w)
        fixed = c.t0_decode + c.c_req * requests
        return np.asarray((fixed + layers + c.c_kv * context_tokens) * self.margin_decode)

    def copy_s(self, tokens: int) -> float:
        """Seconds to copy the KV of so many tokens to host memory or back: overhead + bytes / bandwidth."""
        return self.swap_overhead_s + tokens * self.kv_bytes_per_token / self.swap_bytes_per_s

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
        """
        return self._largest(base, history_tokens, time_s, 1.0)

    def largest_safe_chunk(self, base: BatchShape, history_tokens: int, time_s: float) -> int:
        """`largest_chunk` by `safe_iteration_s`, as exact."""
        return self._largest(base, history_tokens, time_s, self.margin_extend)

    def _largest(self, base: BatchShape, history_tokens: int, time_s: float, margin: float) -> int:
        """Most n with margin * T(n) <= time_s.

        With h = history and b = time_s / margin - t0 - c_req (requests0 + 1) - c_attn pairs0
        - c_kv (context0 + h), what is left beside all that is there before the chunk,

            max(c_tok (new0 + n), w) + c_attn (h n + n^2 / 2) + c_kv n  <=  b

        holds if it holds for either side of the max, so n is the smaller root of two quadratics:

            c_attn/2 n^2 + (c_attn h + c_kv + c_tok) n  <=  b - c_tok new0
            c_attn/2 n^2 + (c_attn h + c_kv) n          <=  b - w
        """
        if time_s == math.inf:
            return MOST_TOKENS
        c = self.coefficients
        b = time_s / margin - c.t0_extend - c.c_req * (base.requests + 1)
        b -= c.c_attn * base.pairs + c.c_kv * (base.context_tokens + history_tokens)
        a2, a1 = c.c_attn / 2, c.c_attn * history_tokens + c.c_kv
        computed = _root(a2, a1 + c.c_tok, b - c.c_tok * base.new_tokens)
        near = int(min(computed, _root(a2, a1, b - c.w), MOST_TOKENS))
        return _last_true(
            lambda n: self.iteration_s(base.with_chunk(history_tokens, n)) * margin <= time_s,
            near,
            MOST_TOKENS,
        )

    def saturating_tokens(self) -> int:
        """Tokens beyond which a larger prefill gains under 2 % of throughput: fixed cost / 2 % of c_tok."""
        c = self.coefficients
        return max(int(c.t0_extend / (0.02 * max(c.c_tok, 1e-9))), 256)

    def scaled(self, factor: float) -> LatencyModel:
        """The same model with every coefficient multiplied: for tests of a wrong profile."""
        c = {k: v * factor for k, v in asdict(self.coefficients).items()}
        return replace(self, coefficients=Coefficients(**c))

    def to_dict(self) -> dict[str, Any]:
        """The profile as its file holds it."""
        return {"version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")  # replicas may write at the same time
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
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
        version = raw.get("version", 1)  # the first form had no such field
        if version != VERSION:
            raise ProfileError(
                f"profile {where}: version: need {VERSION} (attention is added, not hidden), got {version!r}; "
                "measure it again with `python -m sglang_slo.profile`"
            )
        names = Coefficients.__dataclass_fields__
        for name in names:
            value = raw["coefficients"].get(name, OPTIONAL.get(name))
            if not _number_of(0)(value):
                raise ProfileError(
                    f"profile {where}: coefficients.{name}: need seconds of at least 0, got {value!r}"
                )
        extra = set(raw["coefficients"]) - set(names)
        unknown = extra | (set(raw) - set(LatencyModel.__dataclass_fields__) - {"version"})
        if unknown:
            raise ProfileError(f"profile {where}: unknown field {sorted(unknown)[0]!r}")
        rest = {k: v for k, v in raw.items() if k not in ("coefficients", "version")}
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
    "margin_extend": ("a number of at least 1", _number_of(1)),
    "margin_decode": ("a number of at least 1", _number_of(1)),
    "name": ("text", lambda value: isinstance(value, str)),
    "kv_capacity_tokens": ("a number of tokens of at least 0", _number_of(0)),
    "measured": ("true or false", lambda value: isinstance(value, bool)),
    "swap_bytes_per_s": ("a number above 0", _number_of(0, strictly=True)),
    "swap_overhead_s": ("seconds of at least 0", _number_of(0)),
    "kv_bytes_per_token": ("a number above 0", _number_of(0, strictly=True)),
    "meta": ("an object", lambda value: isinstance(value, dict)),
}


def _root(a2: float, a1: float, a0: float) -> float:
    """The largest n >= 0 with a2 n^2 + a1 n <= a0, for a2, a1 >= 0; 0 if there is none, inf if there is no largest.

    The numerically stable form: no cancellation for small a2.
    """
    if a0 <= 0:
        return 0.0
    below = a1 + math.sqrt(a1 * a1 + 4 * a2 * a0)
    return 2 * a0 / below if below > 0 else math.inf


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
