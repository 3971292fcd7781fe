"""Who is served next: by deadline those who can still meet it, and behind them, with a share of their own, the others.

Feasible is decided as a set. Walk the waiting requests in deadline order, add up their work, and whenever the sum
passes a deadline drop the largest job so far: Moore's rule, which leaves the fewest late jobs on one machine
(J. M. Moore, Management Science 15(1), 1968). What is dropped counts as infeasible for now and is looked at again in the
next iteration. The infeasible, and requests without a limit, wait in one first-come line that keeps a guaranteed share
of the tokens (`FairShareQueue`), so that none of them waits longer than the work ahead of it over that share of the
throughput. Where KV is short, tokens are not what they wait for: there, one that has waited for `--slo-lost-wait-s` is
not overtaken any more.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.table import RequestTable

# Moore's rule looks at so many requests at most, the ones with the nearest deadlines: those behind are not
# reached within an iteration anyway, and planning stays under a millisecond with thousands waiting.
MOORE_WINDOW = 256
CRITICAL_SHARE = 0.5  # of a first-token limit, at most, is left to a critical request
CRITICAL_S = 2.0  # is left, at most, to a critical request that comes back
LONGEST_ITERATION_S = 2.0  # between two looks at their line; what is longer was idle
RATE_MEMORY_S = 10.0  # how far back the rate of their line looks


def feasible_set(
    deadline_s: np.ndarray, work_s: np.ndarray, start_s: float, importance: np.ndarray | None = None
) -> np.ndarray:
    """Which jobs to keep so that the fewest are late, served in deadline order from `start_s` on; bool[n].

    `deadline_s` float[n], ascending; `work_s` float[n], seconds of the machine each. Jobs that cannot make their
    deadline even alone are never kept. `importance` int[n]: the least important ones are dropped first, by Moore's
    rule among them, before any of the next.
    """
    keep = start_s + work_s <= deadline_s
    candidates = np.flatnonzero(keep)
    end_s = start_s + np.cumsum(work_s[candidates])
    late = end_s > deadline_s[candidates]
    if not late.any():
        return keep
    window = candidates[:MOORE_WINDOW]
    ranks = None if importance is None else importance[window]
    sure = min(int(np.argmax(late)), len(window))
    keep[window[_dropped(deadline_s[window], work_s[window], start_s, ranks, sure)]] = False
    return keep


def _dropped(
    deadline_s: np.ndarray, work_s: np.ndarray, start_s: float, ranks: np.ndarray | None, sure: int
) -> list[int]:
    """Positions that Moore's rule drops, with the least important of `ranks` first where there are any.

    Up to position `sure` nobody is late yet.
    """
    # who is dropped first: the least important, of these the largest, of these the last
    keys = (-np.arange(len(work_s)), -work_s)
    first = np.lexsort(keys if ranks is None else (*keys, ranks))
    place = np.empty_like(first)
    place[first] = np.arange(len(first))
    by_place, works = first.tolist(), work_s.tolist()
    places = place.tolist()
    kept = places[:sure]
    heapq.heapify(kept)
    t = sum(works[:sure], start_s)
    dropped: list[int] = []
    for mine, work, deadline in zip(places[sure:], works[sure:], deadline_s[sure:].tolist(), strict=True):
        t += work
        if t <= deadline:
            heapq.heappush(kept, mine)
            continue
        # Where all are equally important one is enough: the largest is at least as large as this one.
        out = by_place[heapq.heappushpop(kept, mine)]
        t -= works[out]
        dropped.append(out)
        while t > deadline:
            out = by_place[heapq.heappop(kept)]
            t -= works[out]
            dropped.append(out)
    return dropped


def critical(table: RequestTable, row: int, model: LatencyModel, start_s: float) -> bool:
    """Whether little is left of a waiting row's limit, which can still be kept: room is made for it (CacheOPT, C3).

    `start_s` is when the next iteration can start. The paper asks whether the slack is below the longest recent
    iteration. By then it is too late to make room, as that takes iterations itself: for a first token the slack is
    measured against the limit, for one that has begun and left for a while against `CRITICAL_S`.
    """
    history = int(table.history_tokens[row])
    context = int(table.prompt_tokens[row] + table.output_tokens[row])
    work_s = model.prefill_s(history, max(context - history, 1))
    slack_s = float(table.deadline_s[row]) - start_s - work_s
    most_s = CRITICAL_SHARE * float(table.ttft_s[row]) if table.output_tokens[row] == 0 else CRITICAL_S
    return 0 <= slack_s <= most_s and slack_s < math.inf


@dataclass
class FairShareQueue:
    """Credit of the infeasible: they earn `share` of all prefilled tokens and spend it at the head of an iteration.

    With backlog on both sides they get at least `share` of the tokens: credit grows by share * tokens each
    iteration and everything they prefill is taken from it. Credit is bounded by `cap_tokens`, so that a long quiet
    time does not let them push everyone aside at once.
    """

    share: float
    cap_tokens: float = 16384.0
    credit_tokens: float = 0.0
    _served_s: float = math.inf  # when the first of them was last served, or none waited
    _seen_s: float = math.inf  # time of the last account
    _elapsed_s: float = 0.0  # all three forget with RATE_MEMORY_S
    _all_tokens: float = 0.0
    _own_tokens: float = 0.0

    def earn(self, prefilled_tokens: int, waiting: bool) -> None:
        """Account an iteration's prefill; with none of them waiting, nothing is earned."""
        if waiting:
            self.credit_tokens = min(self.credit_tokens + self.share * prefilled_tokens, self.cap_tokens)
        else:
            self.credit_tokens = 0.0

    def spend(self, tokens: int) -> None:
        """Tokens that were prefilled for them; leftovers beyond the credit are free."""
        self.credit_tokens = max(self.credit_tokens - tokens, 0.0)

    def account(self, now_s: float, own_tokens: int, all_tokens: int) -> None:
        """Note what an iteration at `now_s` prefilled for them, and in all: the rates that waits go by."""
        passed = max(now_s - self._seen_s, 0.0) if self._seen_s < math.inf else 0.0
        passed = min(passed, LONGEST_ITERATION_S)
        self._seen_s = now_s
        keep = math.exp(-passed / RATE_MEMORY_S)
        self._elapsed_s = self._elapsed_s * keep + passed
        self._all_tokens = self._all_tokens * keep + all_tokens
        self._own_tokens = self._own_tokens * keep + own_tokens

    def rest(self, iteration_s: float = 0.0) -> None:
        """Nobody waits any more after an iteration of so long: the time until somebody does says nothing of the rate."""
        if self._seen_s < math.inf:
            self._elapsed_s += iteration_s
        self._seen_s = math.inf

    def served(self, now_s: float) -> None:
        """The first of them got something, or none waits."""
        self._served_s = now_s

    def waited_s(self, now_s: float) -> float:
        """For how long the first of them has not been served, whoever of them it was."""
        return now_s - self._served_s

    def wait_s(self, ahead_tokens: np.ndarray) -> np.ndarray:
        """Expected wait behind `ahead_tokens` of the line: at the rate it has had lately, at least its share of all."""
        if self._elapsed_s < RATE_MEMORY_S / 10:
            return np.zeros(len(ahead_tokens))  # too early to tell
        rate = max(self._own_tokens, self.share * self._all_tokens) / self._elapsed_s
        return ahead_tokens / rate if rate > 0 else np.full(len(ahead_tokens), math.inf)

    def n_promoted(self, need_tokens: np.ndarray, iteration_tokens: int) -> int:
        """How many at the head of the line have earned their next prefill; `need_tokens` int[n], in line order.

        As many as the credit pays for; the first one also once it has earned a whole iteration's worth, as more
        than that cannot be given to it at once.
        """
        if self.share <= 0 or self.credit_tokens <= 0 or not len(need_tokens):
            return 0
        paid = int(np.searchsorted(np.cumsum(need_tokens), self.credit_tokens, side="right"))
        return max(paid, int(self.credit_tokens >= min(iteration_tokens, self.cap_tokens)))


@dataclass(frozen=True, slots=True)
class Ranking:
    """The waiting rows in two lines. `feasible` by deadline, `infeasible` first come first served; both int[n]."""

    feasible: np.ndarray
    infeasible: np.ndarray


def edf_feasible_first(
    rows: np.ndarray,
    deadline_s: np.ndarray,
    work_s: np.ndarray,
    seq: np.ndarray,
    start_s: float,
    importance: np.ndarray | None = None,
) -> Ranking:
    """Split waiting `rows` into the feasible, earliest deadline first, and the infeasible, first come first served.

    All arrays are of length n; times in seconds; `work_s` is the time each prefill takes at the rate that the
    iteration budget allows now; `start_s` is when the next iteration can start.
    """
    order = deadline_order(deadline_s, seq)
    if order is not None:
        rows, deadline_s, work_s, seq = rows[order], deadline_s[order], work_s[order], seq[order]
        importance = None if importance is None else importance[order]
    keep = np.zeros(len(rows), bool)
    n = int(np.searchsorted(deadline_s, np.inf))  # infinite deadlines sort last
    keep[:n] = feasible_set(
        deadline_s[:n], work_s[:n], start_s, None if importance is None else importance[:n]
    )
    others = ~keep
    return Ranking(rows[keep], rows[others][np.argsort(seq[others], kind="stable")])


def deadline_order(deadline_s: np.ndarray, seq: np.ndarray) -> np.ndarray | None:
    """Positions by deadline, then arrival, int[n]; None if they are in that order already (which is cheap to see)."""
    later = deadline_s[1:] > deadline_s[:-1]
    if (later | ((deadline_s[1:] == deadline_s[:-1]) & (seq[1:] > seq[:-1]))).all():
        return None
    order = np.argsort(seq, kind="stable")
    return order[np.argsort(deadline_s[order], kind="stable")]


def inserted(rows: np.ndarray, row: int, deadline_s: np.ndarray, seq: np.ndarray) -> np.ndarray:
    """`rows` int[n], which are in deadline order (`deadline_order`), with one more in its place; int[n + 1].

    `deadline_s` and `seq` are columns of the table.
    """
    deadlines = deadline_s[rows]
    first, end = (
        np.searchsorted(deadlines, deadline_s[row], "left"),
        np.searchsorted(deadlines, deadline_s[row], "right"),
    )
    place = first + np.searchsorted(seq[rows[first:end]], seq[row])
    return np.concatenate((rows[:place], [row], rows[place:]))
