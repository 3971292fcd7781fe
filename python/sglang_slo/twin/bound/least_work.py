"""The device time that a request cannot do without, if it is to be served within its limits.

Every figure here is a lower bound over all schedulers: prompt tokens that any other request could have left
in the prefix cache are charged once for all of them, KV may be moved away between two tokens at no cost, and
batches are as full as the KV cache allows. `bound.py` adds these figures up over intervals of time.

Derivation. A pass of mode m (e: extend, d: decode) with N tokens through the layers, Q query-context products
of prefill, contexts of C tokens in all, U of them not shared with anyone, takes (`core.latency`)
T = t0_m + c_req R + max(c_tok N, w) + c_attn Q + c_kv C with R its requests. For any mix 0 <= a_m <= 1

    T >= t0_m + c_req R + a_m c_tok N + (1 - a_m) w + c_attn Q + c_kv C     a maximum is at least any weighted mean
      =  c_req R + a_m c_tok N + c_attn Q + c_kv C + F_m                    F_m = t0_m + (1 - a_m) w, the fixed part
      >= c_req R + a_m c_tok N + c_attn Q + c_kv C + F_m U / M              U <= M, the KV capacity

which is a sum over the requests in the pass. So a prompt of n tokens behind h costs at least c_req + a_e c_tok n
+ c_attn n (h + n/2) + c_kv (h + n) + F_e n' / M, however it is cut, and a decode token of context u (u' of it its
own) at least c_req + c_kv u + min over m of a_m c_tok + F_m u' / M, whatever it is batched with. Each `Mix` is one
choice of (a_e, a_d): with (1, 1) the layers' compute is counted, with (0, 0) their weights, spread over as many
requests as KV has room for. The last term is the KV area: a request holds u' tokens while the pass runs, and all
that is held in an interval is at most M times its length.

Deadlines. The pass of token k (k = 0 is the first) must end by arrival + ttft + k tbt - (CPU time of handing
the token out) if no gap of the request may be longer than tbt, and by the same time if it reads at that pace. By
the 99th percentile floor((tokens - 1) / 100) gaps may be of any length at all, the very first one included: then
only the first token has a deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_slo.core.attainment import rank_from_top
from sglang_slo.core.latency import Coefficients
from sglang_slo.core.slo import Slo
from sglang_slo.twin.bound.prefixes import SharedRun, shared_runs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PIECES = 6  # parts into which a request's decoding is cut, each with a deadline of its own


@dataclass(frozen=True)
class Mix:
    """Weights of compute against memory in passes with and without prefill; see the derivation above."""

    extend: float
    decode: float


MIXES = (Mix(1.0, 1.0), Mix(1.0, 0.0), Mix(0.5, 0.5), Mix(0.0, 0.0))


@dataclass(frozen=True)
class Jobs:
    """What the bound needs to know of a workload: arrays [n], in order of arrival, and the device."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    limits: list[Slo]  # one per request
    blocks: list[tuple[int, ...] | None]  # ids of the prompt's prefix blocks
    block_tokens: int
    device: Coefficients
    kv_capacity_tokens: int
    before_s: float = 0.0  # CPU time from arrival to the first launch
    after_s: float = 0.0  # CPU time from the end of a pass to its token
    gaps_per_exception: int | None = 100  # one gap in so many may be of any length; None: no gap may
    paced: bool = False  # gaps may be of any length if token k is there by the first + k tbt

    def exceptions(self, i: int) -> int:
        """How many gaps of request i may be longer than its limit."""
        gaps = int(self.output_tokens[i]) - 1
        if self.gaps_per_exception is None:
            return 0
        return rank_from_top(gaps) - 1 if self.gaps_per_exception == 100 else gaps // self.gaps_per_exception


@dataclass(frozen=True)
class Work:
    """Pieces of work: `device_s[:, j]` times (variable `column[j]` minus variable `less[j]`) within [release,
    due].

    Columns 0..n-1 are the requests; the others stand for shared prefixes. For each (a, b) of `links` variable
    a is at least variable b. `less` is -1 where nothing is taken off.
    """

    column: Ints
    less: Ints
    release_s: Floats
    due_s: Floats
    device_s: Floats  # [mixes, pieces]
    begins: NDArray[np.bool_]  # whether a piece is released with its request: intervals begin there
    columns: int
    links: list[tuple[int, int]]
    hopeless: NDArray[np.bool_]  # [n] requests whose limits a device to themselves could not keep


@dataclass(frozen=True)
class _Piece:
    column: int
    release_s: float
    due_s: float
    device_s: Floats  # [mixes]
    less: int = -1
    begins: bool = True


def least_work(jobs: Jobs) -> Work:
    """The work of all requests."""
    runs, shared_tokens = shared_runs(jobs.blocks, jobs.input_tokens, jobs.block_tokens)
    pieces: list[_Piece] = []
    n = len(jobs.arrival_s)
    hopeless = np.zeros(n, bool)
    for i in range(n):
        own = _OneRequest(jobs, i, int(shared_tokens[i]))
        hopeless[i] = own.hopeless()
        pieces.extend(own.pieces())
    links: list[tuple[int, int]] = []
    columns = n
    for run in runs:
        pieces.extend(_run_pieces(run, jobs, columns, links))
        columns += len(run.users)
    finite = [p for p in pieces if math.isfinite(p.due_s)]
    return Work(
        column=np.array([p.column for p in finite], np.int64),
        less=np.array([p.less for p in finite], np.int64),
        release_s=np.array([p.release_s for p in finite]),
        due_s=np.array([p.due_s for p in finite]),
        device_s=np.array([p.device_s for p in finite]).reshape(-1, len(MIXES)).T.copy(),
        begins=np.array([p.begins for p in finite], bool),
        columns=columns,
        links=links,
        hopeless=hopeless,
    )


def _run_pieces(run: SharedRun, jobs: Jobs, first: int, links: list[tuple[int, int]]) -> Iterator[_Piece]:
    """A variable per user, in order of deadline: how far the run must be computed by then.

    It is at least the user's own and the one before, so it grows by what the deadlines up to there add.
    Whoever is the first to come may have it computed: that is the release.
    """
    layers = sum(jobs.device.c_tok * tokens for _, tokens in run.parts)
    attention = sum(_attention_s(jobs.device, start, tokens) for start, tokens in run.parts)
    device = np.array([mix.extend * layers + attention for mix in MIXES])
    release = float(jobs.arrival_s[list(run.users)].min()) + jobs.before_s
    by_deadline = sorted(run.users, key=lambda i: (_due_s(jobs, i, 0), i))
    for column, i in enumerate(by_deadline, first):
        links.append((column, i))
        if column > first:
            links.append((column, column - 1))
        less = column - 1 if column > first else -1
        yield _Piece(column, release, _due_s(jobs, i, 0), device, less)


def _due_s(jobs: Jobs, i: int, token: int) -> float:
    """When the pass of a token must have ended, s; infinity if nothing was promised."""
    slo = jobs.limits[i]
    gaps_s = token * slo.tbt_s if token else 0.0
    return float(jobs.arrival_s[i]) + slo.ttft_s + gaps_s - jobs.after_s


def _attention_s(device: Coefficients, history: int, new: int) -> float:
    return device.c_attn * new * (history + new / 2)


class _OneRequest:
    """Least work and least times of one request; `shared` prompt tokens are charged elsewhere."""

    def __init__(self, jobs: Jobs, i: int, shared: int) -> None:
        self.jobs, self.i = jobs, i
        self.inputs, self.outputs = int(jobs.input_tokens[i]), int(jobs.output_tokens[i])
        self.private = self.inputs - shared
        self.slo = jobs.limits[i]
        device = jobs.device
        self.attention_s = _attention_s(device, shared, self.private) + device.c_kv * self.inputs
        self.first_s = (
            device.t0_extend + device.c_req + self.attention_s
        )  # the shortest pass of the whole prompt
        self.first_s += max(device.c_tok * self.private, device.w)
        self.least_t0_s = min(device.t0_extend, device.t0_decode)

    def hopeless(self) -> bool:
        """True if its own work alone, in the fewest and shortest passes, already breaks a limit.

        First token: one pass of all uncached tokens. Gaps: two tokens of a request are at least one pass
        apart.
        """
        d, jobs = self.jobs.device, self.jobs
        if jobs.before_s + self.first_s + jobs.after_s > self.slo.ttft_s + 1e-9:
            return True
        contexts = self.inputs + np.arange(1, self.outputs)
        least_gap_s = self.least_t0_s + d.c_req + max(d.c_tok, d.w) + d.c_kv * contexts
        if jobs.paced:
            turns_s = self.slo.tbt_s * np.arange(1, self.outputs)
            broken = int((np.cumsum(least_gap_s) > turns_s + 1e-9).sum())
        else:
            broken = int((least_gap_s > self.slo.tbt_s + 1e-9).sum())
        return broken > jobs.exceptions(self.i) or self.inputs + self.outputs - 1 > jobs.kv_capacity_tokens

    def pieces(self) -> Iterator[_Piece]:
        """The prompt with the first token, then groups of tokens."""
        jobs, d = self.jobs, self.jobs.device
        start = float(jobs.arrival_s[self.i]) + jobs.before_s
        first = [
            d.c_req
            + mix.extend * d.c_tok * self.private
            + self.attention_s
            + (d.t0_extend + (1 - mix.extend) * d.w) * self.private / jobs.kv_capacity_tokens
            for mix in MIXES
        ]
        yield _Piece(self.i, start, _due_s(jobs, self.i, 0), np.array(first))
        if self.outputs < 2 or jobs.exceptions(self.i) > 0 or math.isinf(self.slo.tbt_s):
            return
        tokens = np.arange(1, self.outputs)
        costs = np.array([self._token_s(mix, tokens) for mix in MIXES])
        # Token k is of a pass after those of the first token and of k - 1 others.
        first_out_s = start + self.first_s
        pass_s = self.least_t0_s + d.c_req + max(d.c_tok, d.w) + d.c_kv * self.inputs
        for part in np.array_split(np.arange(len(tokens)), min(PIECES, len(tokens))):
            due = _due_s(jobs, self.i, int(tokens[part[-1]]))
            release = first_out_s + (int(tokens[part[0]]) - 1) * pass_s
            yield _Piece(self.i, release, due, costs[:, part].sum(axis=1), begins=False)

    def _token_s(self, mix: Mix, tokens: Ints) -> Floats:
        """Least share of a pass for each of `tokens` (1: the second token), s."""
        d, capacity = self.jobs.device, self.jobs.kv_capacity_tokens
        context, own = self.inputs + tokens, self.private + tokens

        def share(t0: float, a: float) -> Floats:
            fixed = t0 + (1 - a) * d.w
            return a * d.c_tok + fixed * own / capacity

        return (
            d.c_req
            + d.c_kv * context
            + np.minimum(share(d.t0_extend, mix.extend), share(d.t0_decode, mix.decode))
        )
