"""How many requests came with limits and without, by endpoint: limits that are lost on the way become visible.

Counted where they pass the door, in this HTTP process. `offline`: not over HTTP.
"""

from __future__ import annotations

MAX_ENDPOINTS = 64  # more would mean that somebody makes up paths

_counts: dict[str, list[int]] = {}


def note(endpoint: str, limited: bool) -> None:
    """One request passed."""
    if endpoint not in _counts and len(_counts) >= MAX_ENDPOINTS:
        endpoint = "others"
    _counts.setdefault(endpoint, [0, 0])[limited] += 1


def snapshot() -> dict[str, dict[str, int]]:
    """Endpoint to its counts since the start of this process."""
    return {name: {"with_limits": w, "without_limits": wo} for name, (wo, w) in sorted(_counts.items())}
