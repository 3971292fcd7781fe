"""Which prompt tokens several requests have in common: the runs of a prefix tree used by more than one
request.

    r0  [A][B][C ]           run A: r0 r1 r2     run B: r0 r1     the rest is private
    r1  [A][B][D    ]
    r2  [A][E]               a run holds the tokens that all its users have there, at the same positions

A prompt's last token is always its own: a scheduler computes at least that one to have an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Neighbours in the tree may begin with equal tokens by accident of the vocabulary: not charged to anyone.
ACCIDENT_TOKENS = 1


@dataclass(frozen=True)
class SharedRun:
    """Prompt tokens that are the same for all `users` (request numbers, at least 2) and no one else.

    `parts`: (position of the first token, number of tokens), one per block.
    """

    parts: tuple[tuple[int, int], ...]
    users: tuple[int, ...]


def shared_runs(
    blocks: list[tuple[int, ...] | None], input_tokens: NDArray[np.int64], block_tokens: int
) -> tuple[list[SharedRun], NDArray[np.int64]]:
    """The shared runs, and how many tokens of each request are not its own to compute, [n].

    `blocks[i]` begins with the stream's number, which sets streams apart; None: nothing shared.
    """
    users: dict[tuple[int, ...], list[int]] = {}  # path from the root -> who goes there
    for i, path in enumerate(blocks):
        # The place where the last token lies counts only if the prompt has tokens there besides that one.
        for depth in range(_whole(path, int(input_tokens[i]), block_tokens)):
            users.setdefault(path[: depth + 2], []).append(i)  # type: ignore[index]
    shared = np.zeros(len(blocks), np.int64)
    parts: dict[
        tuple[int, ...], list[tuple[int, int]]
    ] = {}  # who shares what: one path for each set of users
    for path, who in users.items():
        start = (len(path) - 2) * block_tokens
        if len(who) < 2:
            continue
        ends = [min(start + block_tokens, int(input_tokens[i]) - 1) for i in who]
        shared[who] = np.maximum(shared[who], ends)
        tokens = min(ends) - start - ACCIDENT_TOKENS
        if tokens > 0:
            parts.setdefault(tuple(who), []).append((start, tokens))
    alone = [i for i, path in enumerate(blocks) if path is not None]
    spare = input_tokens[alone] - 1 - shared[alone]
    shared[alone] += np.clip(spare, 0, ACCIDENT_TOKENS)
    return [SharedRun(tuple(p), who) for who, p in parts.items()], shared


def _whole(path: tuple[int, ...] | None, input_tokens: int, block_tokens: int) -> int:
    """How many blocks of the prompt hold a token that is not its last."""
    if path is None:
        return 0
    return min(len(path) - 1, -(-(input_tokens - 1) // block_tokens))
