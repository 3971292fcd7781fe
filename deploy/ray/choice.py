"""Which replica a request goes to: one that can still keep its limits, and of those the one that begins soonest.

Pure: what replicas told and what was sent since goes in, an order of replicas comes out; no Ray, no network, no clock. A
replica tells its headroom by class: prefill tokens a second beside its load, within the limits of that class, and KV. Both
are already less what waits there, and times the share of the class that attained lately (observe/gauges.py).

    rate [tokens/s] = headroom - unseen prompt tokens / BACKLOG_S      unseen: sent there, not yet in what it told
    kv   [tokens]   = headroom - unseen prompts and outputs
    keeps           = prompt <= rate x TTFT limit  and  prompt + output <= kv
    begins in [s]   = (prompt - bonus) / rate                          bonus: of a prefix that it has, at most MOST_BONUS

`BACKLOG_S` is the time within which the replica itself plans to have done with what waits, so that a request weighs the same
before and after it is told of. `keeps` counts the whole prompt: a cached prefix may be gone, and no limit is staked on it.
Where no replica keeps the limits, the one with the least work before the request is the least bad.

Always: two arrivals never take the same room; what is sent in vain weighs for `FORGET_S` at most; the order is the same for
the same past, whatever the process.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

BACKLOG_S = 1.0  # as in runtime/report/gauges.py
MOST_BONUS = 0.8  # of a prompt
FORGET_S = 20.0  # what a replica does not tell of in so long never came there
BLOCK_CHARS = 256  # the prefix of a prompt is known by blocks of so many characters
MOST_BLOCKS = 20_000  # remembered for each replica
DEFAULT_CLASS = "default"  # of servers, for requests that say none


@dataclass(frozen=True)
class Room:
    """Headroom of one replica for one class."""

    tokens_per_s: float  # further prefill
    kv_tokens: float


@dataclass(frozen=True)
class Snapshot:
    """What one replica told last. `seen`: ids of requests that these figures contain."""

    alive: bool = True
    room: Mapping[str, Room] = field(default_factory=dict)  # by class
    ttft_s: Mapping[str, float] = field(default_factory=dict)  # declared, by class
    waiting_tokens: float = 0.0  # prefill that waits
    running: int = 0
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ask:
    """A request as far as the choice needs it. `blocks`: a hash for each beginning of the prompt, shortest first."""

    id: str
    prompt_tokens: int
    output_tokens: int
    slo_class: str = DEFAULT_CLASS
    ttft_s: float | None = None  # None: what its class declares
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """What a replica would be to one request."""

    name: str
    keeps: bool
    begins_s: float
    before_tokens: float  # prefill work before its first token, its own included
    busy: int  # requests

    @property
    def rank(self) -> tuple[bool, float, int, str]:
        """Smaller is better."""
        return (not self.keeps, self.begins_s if self.keeps else self.before_tokens, self.busy, self.name)


def prefix_blocks(prompt: str) -> tuple[int, ...]:
    """The hashes of a prompt's beginnings, one a block; each depends on all text before its end."""
    ends = range(BLOCK_CHARS, len(prompt) + 1, BLOCK_CHARS)
    found, so_far = [], hashlib.blake2b(digest_size=8)
    for end in ends:
        so_far.update(prompt[end - BLOCK_CHARS : end].encode("utf-8", "surrogatepass"))
        found.append(int.from_bytes(so_far.copy().digest(), "big"))
    return tuple(found)


class Choice:
    """The choice between replicas, and its memory of what was sent where since they told of themselves."""

    def __init__(self) -> None:
        self._sent: dict[str, dict[str, tuple[Ask, float]]] = {}  # replica -> request id -> it, and when
        self._prefixes: dict[str, OrderedDict[int, None]] = {}  # replica -> blocks, latest last

    def order(
        self, ask: Ask, snapshots: Mapping[str, Snapshot], tried: Collection[str], now_s: float
    ) -> list[str]:
        """The replicas that live and were not tried, best first; none: nobody is left. Changes nothing that counts."""
        self._forget(snapshots, now_s)
        left = {name: s for name, s in snapshots.items() if s.alive and name not in tried}
        return [
            place.name
            for place in sorted((self.place(ask, n, s) for n, s in left.items()), key=lambda p: p.rank)
        ]

    def sent(self, ask: Ask, name: str, now_s: float) -> None:
        """Note that a request goes to this replica, and to no other of which it was noted before."""
        for others in self._sent.values():
            others.pop(ask.id, None)
        self._sent.setdefault(name, {})[ask.id] = (ask, now_s)
        known = self._prefixes.setdefault(name, OrderedDict())
        for block in ask.blocks:
            known[block] = None
            known.move_to_end(block)
        while len(known) > MOST_BLOCKS:
            known.popitem(last=False)

    def place(self, ask: Ask, name: str, told: Snapshot) -> Place:
        """What this replica would be to the request."""
        unseen = [it for it, _ in self._sent.get(name, {}).values()]
        prompts = sum(it.prompt_tokens for it in unseen)
        room = told.room.get(ask.slo_class) or told.room.get(DEFAULT_CLASS) or Room(0.0, 0.0)
        rate = room.tokens_per_s - prompts / BACKLOG_S
        kv = room.kv_tokens - prompts - sum(it.output_tokens for it in unseen)
        limit_s = told.ttft_s.get(ask.slo_class, math.inf) if ask.ttft_s is None else ask.ttft_s
        fits = ask.prompt_tokens + ask.output_tokens <= kv
        in_time = rate > 0 and ask.prompt_tokens <= rate * limit_s
        work = ask.prompt_tokens - self.bonus_tokens(ask, name)
        return Place(
            name,
            keeps=fits and in_time,
            begins_s=work / rate if rate > 0 else math.inf,
            before_tokens=told.waiting_tokens + prompts + work,
            busy=told.running + len(unseen),
        )

    def bonus_tokens(self, ask: Ask, name: str) -> float:
        """Of the prompt, what this replica was sent before and so may have cached; bounded."""
        known: Collection[int] = self._prefixes.get(name, ())
        count = 0
        for block in ask.blocks:
            if block not in known:
                break
            count += 1
        share = count / len(ask.blocks) if ask.blocks else 0.0
        return min(share, MOST_BONUS) * ask.prompt_tokens

    def _forget(self, snapshots: Mapping[str, Snapshot], now_s: float) -> None:
        """Drop what replicas tell of now, what is too old, and replicas that are gone."""
        for name in [*self._sent]:
            told = snapshots.get(name)
            if told is None or not told.alive:
                del self._sent[name]
                continue
            self._sent[name] = {
                rid: (ask, at_s)
                for rid, (ask, at_s) in self._sent[name].items()
                if rid not in told.seen and now_s - at_s < FORGET_S
            }
        for name in [*self._prefixes]:
            if name not in snapshots or not snapshots[name].alive:
                del self._prefixes[name]  # whoever comes back has an empty cache
