"""Lets waiting requests notice a prefix that was cached after they came.

Requests whose prompts begin alike form a group, by their first `SHARED_TOKENS` tokens, or as many as fill a page. When
one of a group has been computed, those of the group that still wait are looked up again, a bounded number at each
planning. What they then need not compute makes some of them feasible again that were given up, and costs others less
than was thought.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING

from sglang_slo.core import pages

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

SHARED_TOKENS = 32  # SGLang's own threshold for sharing within a batch
LOOK_UPS = 32  # of waiting requests at one planning


class PrefixGroups:
    """Waiting requests by how their prompts begin. Groups have numbers from 1 on; 0: too short to share anything.

    The tree keeps whole pages: prompts that begin alike for less than one share nothing.
    """

    def __init__(self, page_tokens: int = 1) -> None:
        self._shared_tokens = pages.whole(SHARED_TOKENS, page_tokens)
        self._numbers: dict[Hashable, int] = {}
        self._keys: dict[int, Hashable] = {}
        self._members: dict[int, dict[str, Req]] = {}
        self._stale: dict[str, Req] = {}  # to be looked up again, in order
        self._next = 1

    def opened(self, req: Req) -> int:
        """A request has come; the number of its group."""
        ids = req.origin_input_ids
        if len(ids) <= self._shared_tokens:
            return 0
        salt = getattr(req, "cache_salt", None)  # newer releases'
        key = (bytes(memoryview(ids)[: self._shared_tokens]), req.extra_key, req.lora_id, salt)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._next
            self._keys[number], self._members[number] = key, {}
            self._next += 1
        self._members[number][req.rid] = req
        return number

    def closed(self, rid: str, number: int) -> None:
        """A request has ended."""
        self._stale.pop(rid, None)
        members = self._members.get(number)
        if members is None:
            return
        members.pop(rid, None)
        if not members:
            del self._members[number]
            del self._numbers[self._keys.pop(number)]

    def computed(self, reqs: Iterable[tuple[Req, int]], waits: Callable[[Req], bool]) -> None:
        """KV of these requests, each with its group's number, is in the cache now."""
        for req, number in reqs:
            for other in self._members.get(number, {}).values():
                if other is not req and waits(other):
                    self._stale[other.rid] = other

    def stale(self) -> list[Req]:
        """The next few to be looked up again."""
        return [self._stale.pop(rid) for rid in list(self._stale)[:LOOK_UPS]]

    def __len__(self) -> int:
        return len(self._members)
