"""When KV runs short, and what each way of preempting a request costs (CacheOPT C5).

A victim's KV stays in the radix tree and may be lost there, or goes to host memory and back, or is computed again.
Which of them is cheapest is read off the latency model, so every rank chooses alike. Times are seconds, sizes tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from sglang_slo.core import pages
from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.steps import DecodeStep

LONGEST_LEAD = 8  # iterations: victims are never chosen earlier than this before the KV runs out

LONGEST_CONTEXT = 1e9  # tokens: a crossing beyond it is never met


class PreemptMode(str, Enum):
    """Where a victim's KV goes: into the radix tree, evictable; to host memory; nowhere."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


# -- when


def most_growth_tokens(step: DecodeStep, page: int = 1) -> int:
    """KV that no request takes more than within `LONGEST_LEAD` iterations, in whole pages."""
    return pages.whole(LONGEST_LEAD * step.verified_tokens + step.spare_tokens, page)


def lead_iterations(swap_out_s: float, iteration_s: float) -> int:
    """How many iterations ahead to choose victims, so that copying one out hides behind compute; 1 to
    LONGEST_LEAD.
    """
    if swap_out_s <= 0:
        return 1
    return min(1 + math.ceil(swap_out_s / max(iteration_s, 1e-6)), LONGEST_LEAD)


# -- how


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of work that each mode is expected to cause; inf: not possible."""

    keep_s: float
    swap_s: float
    recompute_s: float

    def among(self, keep: bool, swap: bool, recompute: bool) -> Costs:
        """These costs where only some modes are right for the request."""
        return Costs(
            self.keep_s if keep else math.inf,
            self.swap_s if swap else math.inf,
            self.recompute_s if recompute else math.inf,
        )


def swap_s(model: LatencyModel, tokens: int) -> float:
    """Seconds to copy `tokens` of KV to the host and back."""
    return 2 * model.copy_s(tokens)


def costs(
    model: LatencyModel, context: int, shared: int, prompt_cached: int, room: int, host_room: int
) -> Costs:
    """What each mode of preempting a victim is expected to cost.

    `context`: its KV; of these the first `shared` are held by others too and stay whatever happens, and the
    first `prompt_cached` are in the radix tree already, where they remain until evicted. `room`: what the
    radix tree can still hold at the peak of those who stay. What does not fit is evicted, leaves first, so
    what is left is a prefix:

        0        shared        prompt_cached             context
        |--stays--|--in the tree--|--inserted by keep-only--|
        |         |<---- at most room tokens survive ----->|
    """
    kept = min(shared + max(room, 0), context)
    keep = model.prefill_s(kept, context - kept)
    kept = min(kept, max(prompt_cached, shared))
    recompute = model.prefill_s(kept, context - kept)
    swap = swap_s(model, context) if context <= host_room else math.inf
    return Costs(keep, swap, recompute)


def preempt_mode(costs: Costs, asked: str) -> PreemptMode:
    """The cheapest mode that `asked` allows: auto, keep, swap or recompute. One that is not possible (inf) gives way to
    computing again, or to the cheapest that is possible.

    At equal cost, recompute before keep before swap: it leaves the least behind.
    """
    seconds = {
        PreemptMode.RECOMPUTE: costs.recompute_s,
        PreemptMode.KEEP: costs.keep_s,
        PreemptMode.SWAP: costs.swap_s,
    }
    if asked != "auto":
        for mode in (PreemptMode(asked), PreemptMode.RECOMPUTE):
            if seconds[mode] < math.inf:
                return mode
    return min(seconds, key=lambda mode: seconds[mode])


def crossing_tokens(model: LatencyModel) -> float:
    """Context beyond which swapping is cheaper than computing everything again, tokens; inf: never.

    Recompute c_tok n + c_attn n^2 / 2 meets swap 2 (o + n b) at the positive root of
    (c_attn / 2) n^2 + (c_tok - 2 b) n - 2 o = 0, with o the overhead and b seconds per token.
    """
    c = model.coefficients
    a2 = c.c_attn / 2
    a1 = c.c_tok - 2 * model.kv_bytes_per_token / model.swap_bytes_per_s
    overhead = 2 * model.swap_overhead_s
    if a1 <= 0 and a2 == 0:
        return math.inf
    root = math.sqrt(a1 * a1 + 4 * a2 * overhead)
    # without cancellation either way
    crossing = 2 * overhead / (a1 + root) if a1 > 0 else (root - a1) / (2 * a2)
    return crossing if crossing < LONGEST_CONTEXT else math.inf
