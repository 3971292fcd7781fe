"""Prompt token ids: arbitrary, but the same for the same seed, request and position.

Requests without prefix blocks share no token at their start, so the radix cache finds nothing between them.
Two requests that name the same block at the same place have the same tokens there. Ids are hashed, not
stored: a prompt exists only while its request lives.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from sglang_slo.twin.workloads.workload import BLOCK_TOKENS, Workload

VOCAB = 1 << 20
EOS_ID = 2
TOKEN = 5  # what the model always says
_FIRST_ID = 8  # ids below are special


def prompt(workload: Workload, i: int) -> array[int]:
    """Token ids of request i's prompt, `array('q')` of its input length."""
    n = int(workload.input_tokens[i])
    blocks = workload.blocks[i]
    if blocks is None:
        ids = hashed(np.array([i], np.uint64), n, workload.seed)[0]
        # Hashes may collide; the request's number as first token keeps plain prompts apart for certain.
        ids[0] = _FIRST_ID + i % (VOCAB // 2 - _FIRST_ID)
    else:
        stream, *names = blocks
        keys = np.array(names, np.uint64) + np.uint64((stream + 1) << 48)
        ids = hashed(keys, BLOCK_TOKENS, workload.seed).reshape(-1)[:n]
        ids = ids // 2 + VOCAB // 2  # the upper half: never a plain prompt's first token
    return array("q", np.ascontiguousarray(ids).tobytes())


def hashed(keys: NDArray[np.uint64], length: int, seed: int) -> NDArray[np.int64]:
    """Ids [len(keys), length] in [_FIRST_ID, VOCAB), a splitmix64 hash of (seed, key, position)."""
    with np.errstate(over="ignore"):
        x = keys[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(length, dtype=np.uint64)[None, :]
        x += np.uint64((seed * 0xD1B54A32D192ED03) & (2**64 - 1))
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x % np.uint64(VOCAB - _FIRST_ID)).astype(np.int64) + _FIRST_ID
