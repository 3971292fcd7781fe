"""The scheduler's view of all live requests: one row each, one numpy array per property.

Policies read columns and index them by row, so that planning costs a few vector operations however many requests
wait. Rows are handed out lowest-first and reused, so that equal histories give equal rows on every rank.
Times are seconds on the tick's clock. A column that says "predicted" never holds a true output length.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np

from sglang_slo.core import pages
from sglang_slo.core.lengths import (
    QUANTILES,
    declared_only,
    remaining_and_expected,
)
from sglang_slo.core.slo import GapRule, Slo, bucket
from sglang_slo.core.steps import PLAIN, DecodeStep

CATCH_UP_SHARE = 0.5  # of each limit, at least, is left by one behind its mean
HURRY_SHARE = 0.2  # of the time, at most, is for decoding what is expected to pass its end all the same

COLUMNS: dict[str, Any] = {
    "seq": np.int64,  # arrival order, the last tie-break of every decision
    "since_s": np.float64,  # when it last got a token; until the first one, when it arrived
    "deadline_s": np.float64,  # waiting: when its next token is due; inf: never, or judged unattainable at arrival
    "ttft_s": np.float64,  # TTFT limit as declared
    "tbt_s": np.float64,  # gap limit that the budget honours; inf: none, or unattainable
    "gap_rule": np.int8,  # what it means by it (slo.GapRule)
    "max_pause_s": np.float64,  # P99: no gap may be longer
    "tpot_s": np.float64,  # mean time per token; inf: none
    "e2e_by_s": np.float64,  # when its last token is due; inf: never
    "importance": np.int16,  # lower is given up first
    "bucket": np.int16,  # tightness bucket of the gap limit
    "promised": np.bool_,  # whether there is any limit to keep
    "lost": np.bool_,  # a limit that the row honours was missed for good
    "begun": np.bool_,  # some of its prompt has been computed
    "prompt_tokens": np.int64,
    "history_tokens": np.int64,  # waiting: leading tokens of prompt and output whose KV is there already
    "shared_tokens": np.int64,  # leading tokens whose KV is held by others too and charged to nobody alone
    "host_tokens": np.int64,  # waiting: the last ones of history, which have to be loaded from host memory first
    "pinned_tokens": np.int64,  # waiting: of history, kept from eviction for this request alone
    "output_tokens": np.int64,  # generated so far
    "declared_tokens": np.int64,  # max_new_tokens
    "remaining_tokens": np.int64,  # predicted: bounded output still to come
    "expected_tokens": np.float64,  # predicted: expected output still to come
    "last_token_s": np.float64,  # end of the iteration that gave the last token (predicted while it runs)
    "token_s": np.float64,  # measured end of the iteration that gave the last token; -inf: none yet
    "first_token_s": np.float64,  # measured end of the iteration that gave the first one; -inf: none yet
    "out_tokens": np.int64,  # tokens whose end was measured
    "burst_tokens": np.int64,  # tokens beyond the first of bursts that are known, but not yet when they were out
    "inflight_tokens": np.int64,  # tokens that iterations on their way will give at least
    "gaps": np.int64,  # gaps between tokens so far
    "missed_gaps": np.int64,  # of these, longer than the limit
    "preemptions": np.int16,
    "stays_until_s": np.float64,  # it was let in as overdue, and is not preempted before
    "prefix_group": np.int64,  # requests whose prompts begin alike share a number; 0: with nobody
    "deferrals": np.int8,  # times it let another of its group compute their prefix first
    "mixable": np.bool_,  # may share an iteration with decodes (SGLang cannot mix log-probabilities)
    "splittable": np.bool_,  # may sit out while others of its batch decode
    "cuttable": np.bool_,  # its prefill may be done in pieces (SGLang keeps the hidden states of the last one only)
}


class RequestTable:
    """Rows of live requests. `table.deadline_s[rows]` reads a column for an array of rows."""

    seq: np.ndarray
    since_s: np.ndarray
    deadline_s: np.ndarray
    ttft_s: np.ndarray
    tbt_s: np.ndarray
    gap_rule: np.ndarray
    max_pause_s: np.ndarray
    tpot_s: np.ndarray
    e2e_by_s: np.ndarray
    importance: np.ndarray
    bucket: np.ndarray
    promised: np.ndarray
    lost: np.ndarray
    begun: np.ndarray
    prompt_tokens: np.ndarray
    history_tokens: np.ndarray
    shared_tokens: np.ndarray
    host_tokens: np.ndarray
    pinned_tokens: np.ndarray
    output_tokens: np.ndarray
    declared_tokens: np.ndarray
    remaining_tokens: np.ndarray
    expected_tokens: np.ndarray
    last_token_s: np.ndarray
    token_s: np.ndarray
    first_token_s: np.ndarray
    out_tokens: np.ndarray
    burst_tokens: np.ndarray
    inflight_tokens: np.ndarray
    gaps: np.ndarray
    missed_gaps: np.ndarray
    preemptions: np.ndarray
    stays_until_s: np.ndarray
    prefix_group: np.ndarray
    deferrals: np.ndarray
    mixable: np.ndarray
    cuttable: np.ndarray
    splittable: np.ndarray

    def __init__(
        self,
        capacity: int = 1024,
        max_preemptions: int = 1 << 14,
        page_tokens: int = 1,
        step: DecodeStep = PLAIN,
    ) -> None:
        self._free = list(range(capacity))
        self.taken: set[int] = set()  # rows that are given out
        self._next_seq = 0
        self.capacity = capacity
        # predicted output length of each row, natural logs on `lengths.QUANTILES`; float[capacity, Q]
        self.log_quantiles = np.zeros((capacity, len(QUANTILES)))
        self.max_preemptions = max_preemptions
        self.page_tokens = (
            page_tokens  # of the KV pool; what is history, shared or pinned is whole pages of it
        )
        self.step, self.tokens_per_step = (
            step,
            1.0,
        )  # what a decode computes and is given KV for; gives on average
        for name, dtype in COLUMNS.items():
            setattr(self, name, np.zeros(capacity, dtype))

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def add(self, slo: Slo, arrival_s: float, prompt_tokens: int, declared_tokens: int) -> int:
        """A row for a new request with nothing computed; returns the row."""
        quantiles = declared_only(np.array([declared_tokens]))[0]
        if not self._free:
            self._grow()
        row = self._free[0]  # given when all is written: what raises before takes nothing
        for name in COLUMNS:
            getattr(self, name)[row] = 0
        self.seq[row] = self._next_seq
        self._next_seq += 1
        self.since_s[row] = arrival_s
        self.prompt_tokens[row] = prompt_tokens
        self.declared_tokens[row] = declared_tokens
        self.remaining_tokens[row] = declared_tokens
        self.expected_tokens[row] = declared_tokens
        for name in ("last_token_s", "token_s", "first_token_s"):
            getattr(self, name)[row] = -math.inf
        self.mixable[row] = True
        self.cuttable[row] = True
        self.splittable[row] = True
        self.log_quantiles[row] = quantiles
        self.promise(row, slo, arrival_s)
        self.taken.add(heapq.heappop(self._free))
        return row

    def promise(self, row: int, slo: Slo, arrival_s: float) -> None:
        """Write the limits that the row honours; a first token is due by whichever asks for it soonest."""
        self.ttft_s[row] = slo.ttft_s
        self.deadline_s[row] = arrival_s + slo.ttft_s
        self.tbt_s[row] = slo.tbt_s
        self.bucket[row] = bucket(slo.tbt_s)
        self.gap_rule[row] = slo.gap_rule
        self.max_pause_s[row] = slo.max_pause_s
        self.tpot_s[row] = slo.tpot_s
        self.e2e_by_s[row] = arrival_s + slo.e2e_s
        self.importance[row] = slo.importance
        self.promised[row] = not slo.best_effort

    def goes_on(self, row: int, now_s: float) -> None:
        """The row is of a request that has begun already: its times count from now, and nothing is held against it."""
        self.begun[row] = True
        for name in ("since_s", "last_token_s", "token_s", "first_token_s"):
            getattr(self, name)[row] = now_s

    def bound_lengths(self, rows: np.ndarray, confidence: float) -> None:
        """Bring the predicted remaining output of `rows` up to date: bounded at `confidence`, and expected."""
        quantiles, generated = self.log_quantiles[rows], self.output_tokens[rows]
        declared = self.declared_tokens[rows]
        both = remaining_and_expected(quantiles, generated, declared, confidence)
        self.remaining_tokens[rows], self.expected_tokens[rows] = both

    def remove(self, row: int) -> None:
        """Give a row back; nothing if it was given back before."""
        if row in self.taken:
            self.taken.discard(row)
            heapq.heappush(self._free, row)

    # -- time

    def due_s(self, rows: np.ndarray, margin: float = 0.0, decode_s: float = 0.0) -> np.ndarray:
        """When the next delivery of each decoding row is due, by its own rules; float[n], inf: never.

        last: the last token's (predicted) end, first: the first one's, n: how many will be out by then. Token n is due

            every gap, P99   last + tbt
            pace             first + n tbt
            mean (tpot)      first + n tpot: never behind on the way is enough to end within the mean
            end to end       last + (end - last) / steps still expected: what is left, spread evenly

        One that has fallen behind its line would be due at once, token after token, and nobody could prefill beside it. So
        what is lost has no line any more (a missed pace leaves each gap its limit, a missed end leaves nothing), and one that
        is behind its mean catches up by a share of each limit: the rest is for the others. An end that would have tokens
        faster than decoding alone gives them, `decode_s`, cannot be kept unless it becomes shorter than expected: it leaves
        the others most of the time.

        `margin`: the share of each limit that is left unused; where it is a pace, of the time of all tokens so far, but no
        more than one token's: what is late on its way to the client is the last token, whichever it is.
        """
        last, n = self.last_token_s[rows], self.out_tokens[rows] + self.inflight_tokens[rows]
        first = np.where(self.first_token_s[rows] > -math.inf, self.first_token_s[rows], last)
        tbt, tpot = self.tbt_s[rows], self.tpot_s[rows]
        paced_n = n - np.minimum(margin * n, 1.0)
        # without a limit nothing is due, whether the last token's time is known or not
        bounded = np.isfinite(tbt)
        each_gap = last + np.where(bounded, tbt, 0.0) * (1 - margin)
        due: np.ndarray = np.where(bounded, each_gap, np.inf)
        paced = (self.gap_rule[rows] == GapRule.PACE) & bounded & ~self.lost[rows]
        if paced.any():
            limit = np.where(paced, tbt, 0.0)
            due = np.where(paced, first + paced_n * limit, due)
        mean = np.isfinite(tpot)
        if mean.any():
            limit = np.where(mean, tpot, 0.0)  # no token yet times no limit would be no number
            behind = first + n * limit < last
            line = np.where(behind, last + CATCH_UP_SHARE * limit, first + paced_n * limit)
            due = np.where(mean, np.minimum(due, line), due)
        by = self.e2e_by_s[rows]
        if np.isfinite(by).any():
            each = (by - last) / np.maximum(self.expected_steps(rows), 1.0)
            each = np.where(each < decode_s, decode_s / HURRY_SHARE, each)
            due = np.where(by > last, np.minimum(due, last + each * (1 - margin)), due)
        return due

    def back_by_s(self, row: int) -> float:
        """When a row that decoded has to have its next token so that nothing is missed by its leaving; inf: lost anyway.

        The P99 rule lets it pause for up to `max_pause_s` while a gap is to spare.
        """
        if self.lost[row] or not self.promised[row]:
            return math.inf
        rows = np.array([row])
        last = float(self.last_token_s[row])
        due = float(self.due_s(rows)[0])
        if self.gap_rule[row] == GapRule.P99 and self.spare_gaps(rows)[0] > 0:
            return max(due, last + float(self.max_pause_s[row]))
        return due

    def spare_gaps(self, rows: np.ndarray) -> np.ndarray:
        """P99 rule: how many more gaps each row may miss, as far as it has come; int[n], negative: it cannot attain.

        The 99th percentile of G gaps by nearest rank is the one at place floor(G / 100) + 1 from the longest, so
        floor(G / 100) of them may be too long. Counted on what it has written: a prediction might not come true.
        """
        found: np.ndarray = self.gaps[rows] // 100 - self.missed_gaps[rows]
        return found

    def feasible(self, rows: np.ndarray) -> np.ndarray:
        """Which rows can still be given all that they were promised, as far as is known; bool[n]."""
        found: np.ndarray = self.promised[rows] & ~self.lost[rows]
        return found

    def expected_steps(self, rows: np.ndarray) -> np.ndarray:
        """Deliveries still expected of each row; float[n]. A step of speculative decoding delivers several tokens."""
        found: np.ndarray = self.expected_tokens[rows] / self.tokens_per_step
        return found

    # -- KV

    def context_tokens(self, rows: np.ndarray) -> np.ndarray:
        """KV that each row's next token needs, tokens; int[n]."""
        found: np.ndarray = self.prompt_tokens[rows] + self.output_tokens[rows]
        return found

    def prefill_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Tokens each waiting row still has to compute before its next token; int[n], at least 1."""
        found: np.ndarray = np.maximum(self.context_tokens(rows) - self.history_tokens[rows], 1)
        return found

    def held_tokens(self, rows: np.ndarray) -> np.ndarray:
        """KV that each row holds, or will hold once it decodes, alone; int[n], whole pages."""
        context = pages.whole(self.context_tokens(rows) + self.step.spare_tokens, self.page_tokens)
        found: np.ndarray = context - self.shared_tokens[rows]
        return found

    def non_preemptible(self, rows: np.ndarray) -> np.ndarray:
        """Which rows were preempted as often as anyone may be, and have to stay to their end; bool[n]."""
        found: np.ndarray = self.preemptions[rows] >= max(self.max_preemptions, 1)
        return found

    def declared_remaining(self, rows: np.ndarray) -> np.ndarray:
        """What each row may still write by what was declared, at least 1; int[n]."""
        found: np.ndarray = np.maximum(self.declared_tokens[rows] - self.output_tokens[rows], 1)
        return found

    def _grow(self) -> None:
        self._free = list(range(self.capacity, 2 * self.capacity))
        self.log_quantiles = np.concatenate([self.log_quantiles, np.zeros_like(self.log_quantiles)])
        for name in COLUMNS:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.capacity *= 2
