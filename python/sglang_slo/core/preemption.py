"""Who leaves when KV runs short, by which way out, and when it has to be back (CacheOPT C4, C5).

Victims leave in the order of CacheOPT's C4. Each leaves by the cheapest way: its KV stays in the radix tree
and may be lost there, or goes to host memory and back, or is computed again. Which of them is cheapest is
read off the latency model, so every rank chooses alike. Nobody is preempted more than a given number of
times. Everything here is a pure function of its arguments. Times are seconds, sizes tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.slo import BEST_EFFORT_BUCKET

LONGEST_LEAD = 8  # iterations: victims are never chosen earlier than this before the KV runs out

LONGEST_CONTEXT = 1e9  # tokens: a crossing beyond it is never met


class WayOut(str, Enum):
    """Where a victim's KV goes: into the radix tree, evictable; to host memory; nowhere."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


# -- when


def growth_tokens(remaining: np.ndarray, iterations: int) -> int:
    """KV that running requests may grow by within so many iterations: one token each until its bound, at
    least one.

    `remaining` int[n], bounded output still to come. What they free when they end is not counted.
    """
    return int(np.clip(remaining, 1, iterations).sum())


def lead_iterations(swap_out_s: float, iteration_s: float) -> int:
    """How many iterations ahead to choose victims, so that copying one out hides behind compute; 1 to
    LONGEST_LEAD.
    """
    if swap_out_s <= 0:
        return 1
    return min(1 + math.ceil(swap_out_s / max(iteration_s, 1e-6)), LONGEST_LEAD)


# -- who


def may_miss(gaps: np.ndarray, missed_gaps: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """How many more gaps each request may miss and still attain; int[n], negative: it cannot attain any more.

    The 99th percentile of G gaps by nearest rank is the one at place floor(G / 100) + 1 from the longest
    (`attainment.rank_from_top`), so floor(G / 100) of them may be too long. G = gaps so far + those
    predicted.
    """
    return (gaps + remaining) // 100 - missed_gaps


def protection(bucket: np.ndarray, can_attain: np.ndarray) -> np.ndarray:
    """Tightness buckets for choosing victims; int[n]. A limit that is lost already protects nobody."""
    return np.where(can_attain, bucket, BEST_EFFORT_BUCKET)


def victim_order(
    bucket: np.ndarray, remaining: np.ndarray, held: np.ndarray, seq: np.ndarray, allowed: np.ndarray
) -> np.ndarray:
    """Positions of the allowed requests, first victim first; int[k].

    Loosest TBT-limit bucket first, then the longest predicted remaining output (in powers of two, so that the
    next key gets its say), then the least KV held, then the latest arrival. All arrays are of length n;
    `allowed` bool[n].
    """
    positions = np.flatnonzero(allowed)
    length = np.floor(np.log2(np.maximum(remaining[positions], 1)))
    order = np.lexsort((-seq[positions], held[positions], -length, -bucket[positions]))
    return positions[order]


def latest_first(seq: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Who came last leaves first, whatever it costs; int[k]. `seq`, `allowed` as in `victim_order`."""
    positions = np.flatnonzero(allowed)
    return positions[np.argsort(-seq[positions])]


def victims(order: np.ndarray, freed: np.ndarray, need_tokens: int) -> np.ndarray:
    """The fewest first ones of `order` that together free `need_tokens`; all of them if that is not enough.

    `freed` int[n]: what each request frees by leaving; `order` indexes it. Returns int[k].
    """
    if need_tokens <= 0:
        return order[:0]
    count = int(np.searchsorted(np.cumsum(freed[order]), need_tokens)) + 1
    return order[:count]


# -- which way


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of work that each way out is expected to cause; inf: not possible."""

    keep_s: float
    swap_s: float
    recompute_s: float


def swap_s(model: LatencyModel, tokens: int) -> float:
    """Seconds to copy `tokens` of KV to the host and back: 2 (overhead + bytes / bandwidth)."""
    return 2 * (model.swap_overhead_s + tokens * model.kv_bytes_per_token / model.swap_bytes_per_s)


def costs(
    model: LatencyModel, context: int, shared: int, prompt_cached: int, room: int, host_room: int
) -> Costs:
    """What each way out of a victim is expected to cost.

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


def way_out(costs: Costs, mode: str) -> WayOut:
    """The cheapest way that `mode` allows: auto, keep, swap or recompute; a swap that is not possible is a
    recompute.

    At equal cost, recompute before keep before swap: it leaves the least behind.
    """
    if mode == "keep":
        return WayOut.KEEP
    if mode == "swap":
        return WayOut.SWAP if costs.swap_s < math.inf else WayOut.RECOMPUTE
    if mode == "recompute" or costs.recompute_s <= min(costs.keep_s, costs.swap_s):
        return WayOut.RECOMPUTE
    return WayOut.KEEP if costs.keep_s <= costs.swap_s else WayOut.SWAP


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


# -- back again


def return_by_s(last_token_s: float, tbt_s: float, spare_gaps: int) -> float:
    """When a preempted request should be back, seconds: its deadline in the queue; inf: when its turn comes.

    `spare_gaps` as of `may_miss`, before this gap. Without one to spare, it is due before its gap limit passes. With
    one, a longer wait costs nothing that was promised, and one that cannot attain any more has nothing to lose:
    both stand in the line of the lost, which has its guaranteed share.
    """
    return last_token_s + tbt_s if spare_gaps == 0 else math.inf


class Turn(Enum):
    """Whether a swapped request goes before those who wait for prefill."""

    NOT_YET = "not yet"
    SPARE = "spare"  # it may have what those in a hurry do not need
    HASTY = "hasty"  # its own deadline can still be kept, and is the nearest
    OVERDUE = "overdue"  # it has stood so long that it need leave nothing to others


def turn(
    deadline_s: float,
    waiting_deadline_s: np.ndarray,
    start_s: float,
    since_s: float,
    work_s: float,
    share: float,
    overdue_s: float,
    seq: int,
    held_up_by_seq: float,
) -> Turn:
    """Whether it is a swapped request's turn.

    It is at once (hasty) if its deadline can still be kept and is the nearest of those that can (`waiting_deadline_s`,
    float[n]). Else it is one of the lost and takes what is spare, if nobody is in a hurry or by their guaranteed share:
    once it has stood at the head, since `since_s`, for the time that `work_s`, computing it again, would take at that
    share of the machine. After `overdue_s` there it is overdue. `start_s`: when the next iteration can start.

    A lost request that waits for prefill and that nobody overtakes any more (`held_up_by_seq`, its arrival number; inf:
    there is none) is not overtaken from the host either: of two that are overdue, the one that came first goes first.
    """
    winnable = waiting_deadline_s[(waiting_deadline_s >= start_s) & np.isfinite(waiting_deadline_s)]
    nearest = float(winnable.min(initial=math.inf))
    if math.isfinite(deadline_s) and start_s <= deadline_s <= nearest:
        return Turn.HASTY
    stood_s = start_s - since_s
    if share > 0 and stood_s >= overdue_s and seq < held_up_by_seq:
        return Turn.OVERDUE
    if math.isfinite(held_up_by_seq):
        return Turn.NOT_YET
    spare = len(winnable) == 0 or (share > 0 and stood_s >= work_s / share)
    return Turn.SPARE if spare else Turn.NOT_YET
