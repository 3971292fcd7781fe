"""Speculative decoding as this SGLang has it: which algorithms, how much a step computes, and what it is given KV for.

Newer releases say of each algorithm whether its decodes may share a batch with prefill; older ones never mix them.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache import allocation_sizing
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

TELLS_OF_MIXING = hasattr(SpeculativeAlgorithm, "supports_mixed_chunk")
COVERED = TELLS_OF_MIXING  # whether it is scheduled by deadline on this release


def on(scheduler: Any) -> bool:
    """Whether this scheduler's decodes give bursts."""
    return not scheduler.spec_algorithm.is_none()


def mixes(scheduler: Any) -> bool:
    """Whether its decodes may share a batch with prefill; each then computes one token, and gives it."""
    algorithm = scheduler.spec_algorithm
    if algorithm.is_none():
        return True
    return TELLS_OF_MIXING and bool(algorithm.supports_mixed_chunk())


def step(scheduler: Any) -> tuple[int, int]:
    """Tokens that a decode of one request verifies, and slots that it has behind what is known to be computed."""
    if not on(scheduler):
        return 1, 1
    verified = allocation_sizing.max_speculative_num_draft_tokens()
    return int(verified or 1), int(allocation_sizing.get_alloc_reserve_per_decode())
