"""What a server's `/slo/status` tells, as the snapshot on which the choice is made.

In between it is plain values, for Ray's way between processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from choice import Room, Snapshot


def plain(status: Mapping[str, Any], seen: Iterable[str]) -> dict[str, Any]:
    """The parts of a status that matter: those of its data-parallel replicas add up. `seen`: requests that they contain."""
    room: dict[str, list[float]] = {}
    waiting, running = 0.0, 0
    for rank in status.get("replicas", ()):
        now = rank.get("now") or {}
        running += int(now.get("running") or 0)
        waiting += float(now.get("backlog_tokens") or 0)
        for name, spare in (now.get("headroom") or {}).items():
            rate, kv = spare.get("tokens_per_s") or 0.0, spare.get("kv_tokens") or 0
            before = room.get(name, [0.0, 0.0])
            room[name] = [before[0] + rate, before[1] + kv]
    ttft_ms = {name: c.get("ttft_ms") for name, c in (status.get("classes") or {}).items()}
    return {
        "alive": True,
        "room": room,
        "ttft_s": {name: ms / 1e3 for name, ms in ttft_ms.items() if ms},
        "waiting_tokens": waiting,
        "running": running,
        "seen": list(seen),
    }


GONE: dict[str, Any] = {"alive": False}


def snapshot(told: Mapping[str, Any] | None) -> Snapshot:
    """From `plain`; of a replica that has not told yet: alive, with room for whatever comes, as nobody was sent there."""
    if not told:
        return Snapshot(room={"default": Room(math.inf, math.inf)})
    return Snapshot(
        alive=bool(told["alive"]),
        room={name: Room(*spare) for name, spare in told.get("room", {}).items()},
        ttft_s=told.get("ttft_s", {}),
        waiting_tokens=told.get("waiting_tokens", 0.0),
        running=told.get("running", 0),
        seen=frozenset(told.get("seen", ())),
    )
