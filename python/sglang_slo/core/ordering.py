"""Who is served next: winnable requests before lost ones, tight before loose (AccelGen A2, CacheOPT's critical first).

Winnable is decided as a set. Walk the waiting requests in deadline order, add up their work, and whenever the sum
passes a deadline drop the largest job so far: Moore's rule, which leaves the fewest late jobs on one machine
(J. M. Moore, Management Science 15(1), 1968). What is dropped counts as lost for now and is looked at again in the
next iteration. The lost, and requests without a limit, wait in one FIFO line that keeps a guaranteed share of the
tokens (`LostLine`), so that none of them waits longer than the work ahead of it over that share of the throughput.
Where KV is short, tokens are not what they wait for: then the first in line is let in whatever others may need once
the first was not served for a while, and not overtaken any more once that lasts (`plan.TURN_S`, `plan.HOLD_UP_S`).
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
MOORE_WINDOW = 512
CRITICAL_SHARE = 0.5  # of a first-token limit, at most, is left to a critical request
RATE_MEMORY_S = 10.0  # how far back the rate of the lost line looks


def winnable(deadline_s: np.ndarray, work_s: np.ndarray, start_s: float) -> np.ndarray:
    """Which jobs to keep so that the fewest are late, served in deadline order from `start_s` on; bool[n].

    `deadline_s` float[n], ascending; `work_s` float[n], seconds of the machine each. Jobs that cannot make their
    deadline even alone are never kept.
    """
    keep = start_s + work_s <= deadline_s
    candidates = np.flatnonzero(keep)
    end_s = start_s + np.cumsum(work_s[candidates])
    late = end_s > deadline_s[candidates]
    if not late.any():
        return keep
    # before the first late job nothing is dropped yet, but its jobs may be dropped later on
    window = candidates[:MOORE_WINDOW]
    works, deadlines = work_s[window].tolist(), deadline_s[window].tolist()
    largest: list[tuple[float, int]] = []
    t, push, pop = start_s, heapq.heappush, heapq.heappushpop
    lost: list[int] = []
    for i, (work, deadline) in enumerate(zip(works, deadlines, strict=True)):
        if t + work <= deadline:
            push(largest, (-work, -i))
            t += work
        else:
            dropped, j = pop(largest, (-work, -i))
            t += work + dropped
            lost.append(-j)
    keep[window[lost]] = False
    return keep


def critical(table: RequestTable, row: int, model: LatencyModel, start_s: float) -> bool:
    """Whether little is left of a waiting row's limit, which can still be kept: it is given KV first (CacheOPT, C3).

    `start_s` is when the next iteration can start. The paper asks whether the slack is below the longest recent
    iteration. By then it is too late to make room, as that takes iterations itself: here the slack is measured against
    the limit.
    """
    history = int(table.history_tokens[row])
    context = int(table.prompt_tokens[row] + table.output_tokens[row])
    work_s = model.prefill_s(history, max(context - history, 1))
    slack_s = float(table.deadline_s[row]) - start_s - work_s
    return 0 <= slack_s <= CRITICAL_SHARE * float(table.ttft_s[row])


@dataclass
class LostLine:
    """Credit of the lost: they earn `share` of all prefilled tokens and spend it at the head of an iteration.

    With backlog on both sides the lost get at least `share` of the tokens: credit grows by share * tokens each
    iteration and everything they prefill is taken from it. Credit is bounded by `cap_tokens`, so that a long quiet
    time does not let the lost push everyone aside at once.
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
        """Account an iteration's prefill; without anyone lost waiting, nothing is earned."""
        if waiting:
            self.credit_tokens = min(self.credit_tokens + self.share * prefilled_tokens, self.cap_tokens)
        else:
            self.credit_tokens = 0.0

    def spend(self, tokens: int) -> None:
        """Tokens that were prefilled for lost requests; leftovers beyond the credit are free."""
        self.credit_tokens = max(self.credit_tokens - tokens, 0.0)

    def account(self, now_s: float, own_tokens: int, all_tokens: int) -> None:
        """Note what an iteration at `now_s` prefilled for the lost, and in all: the rates that waits go by."""
        passed = max(now_s - self._seen_s, 0.0) if self._seen_s < math.inf else 0.0
        self._seen_s = now_s
        keep = math.exp(-passed / RATE_MEMORY_S)
        self._elapsed_s = self._elapsed_s * keep + passed
        self._all_tokens = self._all_tokens * keep + all_tokens
        self._own_tokens = self._own_tokens * keep + own_tokens

    def served(self, now_s: float) -> None:
        """The first of the lost got something, or none waits."""
        self._served_s = now_s

    def waited_s(self, now_s: float) -> float:
        """For how long the first of the lost has not been served, whoever of them it was."""
        return now_s - self._served_s

    def wait_s(self, ahead_tokens: np.ndarray) -> np.ndarray:
        """Expected wait behind `ahead_tokens` of the line: at the rate it has had lately, at least its share of all."""
        if self._elapsed_s < RATE_MEMORY_S / 10:
            return np.zeros(len(ahead_tokens))  # too early to tell
        rate = max(self._own_tokens, self.share * self._all_tokens) / self._elapsed_s
        return ahead_tokens / rate if rate > 0 else np.full(len(ahead_tokens), math.inf)

    def turns(self, need_tokens: np.ndarray, iteration_tokens: int) -> int:
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
    """The waiting rows in two lines. `winnable_rows` by urgency, `lost_rows` FIFO; both int[n]."""

    winnable_rows: np.ndarray
    lost_rows: np.ndarray
    winnable_work_s: float


def slack_order(
    rows: np.ndarray,
    deadline_s: np.ndarray,
    work_s: np.ndarray,
    seq: np.ndarray,
    start_s: float,
) -> Ranking:
    """Split waiting `rows` into the winnable, earliest deadline first, and the lost, first come first served.

    All arrays are of length n; times in seconds; `work_s` is the time each prefill takes at the rate that the
    iteration budget allows now; `start_s` is when the next iteration can start.
    """
    order = deadline_order(deadline_s, seq)
    if order is not None:
        rows, deadline_s, work_s, seq = rows[order], deadline_s[order], work_s[order], seq[order]
    keep = np.zeros(len(rows), bool)
    n = int(np.searchsorted(deadline_s, np.inf))  # infinite deadlines sort last
    keep[:n] = winnable(deadline_s[:n], work_s[:n], start_s)
    lost = ~keep
    lost_rows = rows[lost][np.argsort(seq[lost], kind="stable")]
    return Ranking(rows[keep], lost_rows, float(work_s[keep].sum()))


def deadline_order(deadline_s: np.ndarray, seq: np.ndarray) -> np.ndarray | None:
    """Positions by deadline, then arrival, int[n]; None if they are in that order already (which is cheap to see)."""
    later = deadline_s[1:] > deadline_s[:-1]
    if (later | ((deadline_s[1:] == deadline_s[:-1]) & (seq[1:] > seq[:-1]))).all():
        return None
    order = np.argsort(seq, kind="stable")
    return order[np.argsort(deadline_s[order], kind="stable")]
