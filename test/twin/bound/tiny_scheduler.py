"""The best any scheduler could do on a handful of tiny requests, by trying everything.

A pass may hold any chunk of any arrived request's prompt and any decode; its time is the latency formula's.
KV is moved between device and host for nothing, everything ever computed stays cached, and a request may take
up what others computed at any moment: whatever a real scheduler can do, this one can.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from sglang_slo.core.slo import Slo
from sglang_slo.twin.bound.least_work import Jobs

MOST_STATES = 10_000  # looked at; few of what is drawn have more, but these have very many


@dataclass(frozen=True)
class _Request:
    """Progress of one request. `tokens` produced, the last at `last_s`; `spent` gaps were too long."""

    tokens: int = 0
    last_s: float = 0.0
    first_s: float = 0.0
    spent: int = 0
    lost: bool = False


@dataclass(frozen=True)
class _State:
    now_s: float
    requests: tuple[_Request, ...]
    computed: frozenset[tuple[object, ...]]  # prompt tokens whose KV exists, by place in the prefix tree


def best_attained(jobs: Jobs) -> int:
    """Most requests that attain under any schedule; where there are too many to try, under those that were tried."""
    return _Search(jobs).best()


def some_schedule(jobs: Jobs, rng: random.Random) -> list[tuple[float, list[float]]]:
    """(TTFT, gaps) of each request in a schedule that chance made; every request gets all its tokens."""
    search = _Search(replace(jobs, limits=[Slo()] * len(jobs.limits)))
    state = _State(0.0, tuple(_Request() for _ in range(search.n)), frozenset())
    out: list[list[float]] = [[] for _ in range(search.n)]
    eager = rng.choice([0.3, 0.7, 1.0])
    while any(len(o) < n for o, n in zip(out, jobs.output_tokens.tolist(), strict=True)):
        options = search.options(state)
        choice = tuple(_pick(o, rng, eager) for o in options)
        after = search.after_pass(state, choice) if any(choice) else None
        if after is None:
            later = [a + jobs.before_s for a in jobs.arrival_s.tolist() if a + jobs.before_s > state.now_s]
            state = replace(state, now_s=min(later)) if later and rng.random() < 0.3 else state
            eager *= 0.9  # too much at once: take less
            continue
        for i, (was, now) in enumerate(zip(state.requests, after.requests, strict=True)):
            if now.tokens > was.tokens:
                out[i].append(now.last_s)
        state = after
    return [
        (o[0] - a, [y - x for x, y in itertools.pairwise(o)])
        for o, a in zip(out, jobs.arrival_s.tolist(), strict=True)
    ]


def _pick(options: list[int], rng: random.Random, eager: float) -> int:
    """Most of the time all that can be done, else anything."""
    return options[-1] if rng.random() < eager else rng.choice(options)


class _Search:
    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.n = len(jobs.arrival_s)
        self.from_here = lru_cache(maxsize=None)(self._from_here)

    def best(self) -> int:
        return self.from_here(_State(0.0, tuple(_Request() for _ in range(self.n)), frozenset()))

    def _key(self, i: int, position: int) -> tuple[object, ...]:
        blocks = self.jobs.blocks[i]
        if blocks is None or position == self.jobs.input_tokens[i] - 1:
            return ("own", i, position)
        return (*blocks[: 2 + position // self.jobs.block_tokens], position)

    def _missing(self, state: _State, i: int) -> int:
        """Prompt tokens of request i not computed yet: from the first gap on, as a cache keeps prefixes."""
        length = int(self.jobs.input_tokens[i])
        return next((length - p for p in range(length) if self._key(i, p) not in state.computed), 0)

    def _from_here(self, state: _State) -> int:
        done = [not r.lost and r.tokens == self.jobs.output_tokens[i] for i, r in enumerate(state.requests)]
        if all(d or r.lost for d, r in zip(done, state.requests, strict=True)):
            return sum(done)
        if self.from_here.cache_info().currsize > MOST_STATES:
            return 0
        best = 0
        for after in self._next_states(state):
            alive = sum(not r.lost for r in after.requests)
            if alive > best:
                best = max(best, self.from_here(after))
        return best

    def _next_states(self, state: _State) -> Iterator[_State]:
        later = [a + self.jobs.before_s for a in self.jobs.arrival_s.tolist()]
        waits = [a for a in later if a > state.now_s]
        if waits:
            yield self._judged(replace(state, now_s=min(waits)))
        for choice in itertools.product(*self.options(state)):
            if any(choice):
                after = self.after_pass(state, choice)
                if after is not None:
                    yield self._judged(after)
        if not waits:
            lost = tuple(replace(r, lost=r.lost or r.tokens < o) for r, o in self._with_lengths(state))
            yield replace(state, requests=lost)

    def options(self, state: _State) -> list[list[int]]:
        """What a pass may do for each request: 0 nothing, n tokens of its prompt, -1 a decode."""
        later = [a + self.jobs.before_s for a in self.jobs.arrival_s.tolist()]
        options = []
        for i, request in enumerate(state.requests):
            over = request.lost and self.jobs.blocks[i] is None
            if later[i] > state.now_s or over or request.tokens == self.jobs.output_tokens[i]:
                options.append([0])
            elif request.tokens:
                options.append([0, -1])  # decode
            else:
                options.append(list(range(self._missing(state, i) + 1)))
        return options

    def _with_lengths(self, state: _State) -> Iterator[tuple[_Request, int]]:
        return zip(state.requests, self.jobs.output_tokens.tolist(), strict=True)

    def after_pass(self, state: _State, choice: tuple[int, ...]) -> _State | None:
        """The state after one pass, or None if it does not fit the KV capacity."""
        d = self.jobs.device
        new, pairs, context, computed = 0, 0.0, 0, set(state.computed)
        held: set[tuple[object, ...]] = set()
        first: list[int] = []
        for i, n in enumerate(choice):
            if not n:
                continue
            length = int(self.jobs.input_tokens[i])
            new += max(n, 1)
            if n < 0:
                reach, outputs = length, state.requests[i].tokens
            else:
                history = length - self._missing(state, i)
                reach, outputs = history + n, 0
                pairs += n * (history + n / 2)
                computed |= {self._key(i, p) for p in range(history, reach)}
                if reach == length:
                    first.append(i)
            context += reach + outputs
            held |= {self._key(i, p) for p in range(reach)} | {("out", i, k) for k in range(outputs)}
        if len(held) > self.jobs.kv_capacity_tokens:
            return None
        t0 = d.t0_extend if any(n > 0 for n in choice) else d.t0_decode
        t0 += d.c_req * sum(n != 0 for n in choice)
        time_s = t0 + max(d.c_tok * new, d.w) + d.c_attn * pairs + d.c_kv * context
        now = state.now_s + time_s
        got = [n < 0 or i in first for i, n in enumerate(choice)]
        requests = tuple(self._token(r, i, now) if got[i] else r for i, r in enumerate(state.requests))
        return _State(now, requests, frozenset(computed))

    def _token(self, request: _Request, i: int, now_s: float) -> _Request:
        out, slo = now_s + self.jobs.after_s, self.jobs.limits[i]
        if not request.tokens:
            lost = out > self.jobs.arrival_s[i] + slo.ttft_s + 1e-9
            first_s = out if self.jobs.paced else 0.0  # states that differ in nothing that counts are one
            return replace(request, tokens=1, last_s=out, first_s=first_s, lost=request.lost or lost)
        due = request.first_s + request.tokens * slo.tbt_s if self.jobs.paced else request.last_s + slo.tbt_s
        spent = request.spent + (out > due + 1e-9)
        lost = request.lost or spent > self.jobs.exceptions(i)
        last_s = 0.0 if self.jobs.paced else out
        return replace(request, tokens=request.tokens + 1, last_s=last_s, spent=spent, lost=lost)

    def _judged(self, state: _State) -> _State:
        """Mark as lost who can no longer have the first token in time, to cut the search short."""
        requests = tuple(
            replace(r, lost=True)
            if not r.tokens and state.now_s > self.jobs.arrival_s[i] + self.jobs.limits[i].ttft_s + 1e-9
            else r
            for i, r in enumerate(state.requests)
        )
        return replace(state, requests=requests)
