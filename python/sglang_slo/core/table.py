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

from sglang_slo.core.lengths import (
    QUANTILES,
    declared_only,
    remaining_and_expected,
)
from sglang_slo.core.slo import Slo, bucket

COLUMNS: dict[str, Any] = {
    "seq": np.int64,  # arrival order, the last tie-break of every decision
    "arrival_s": np.float64,
    "deadline_s": np.float64,  # arrival + TTFT limit; inf: none, or judged unattainable at arrival
    "ttft_s": np.float64,  # TTFT limit as declared
    "tbt_s": np.float64,  # gap limit that the budget honours; inf: none, or unattainable
    "bucket": np.int16,  # tightness bucket of the gap limit
    "prompt_tokens": np.int64,
    "history_tokens": np.int64,  # waiting: leading tokens of prompt and output whose KV is there already
    "shared_tokens": np.int64,  # leading tokens whose KV is held by others too and charged to nobody alone
    "pinned_tokens": np.int64,  # waiting: of history, kept from eviction for this request alone
    "output_tokens": np.int64,  # generated so far
    "declared_tokens": np.int64,  # max_new_tokens
    "remaining_tokens": np.int64,  # predicted: bounded output still to come
    "expected_tokens": np.float64,  # predicted: expected output still to come
    "last_token_s": np.float64,  # end of the iteration that gave the last token (predicted while it runs)
    "token_s": np.float64,  # measured end of the iteration that gave the last token; -inf: none yet
    "late": np.bool_,  # the first token came after the limit that the row honours
    "gaps": np.int64,  # gaps between tokens so far
    "missed_gaps": np.int64,  # of these, longer than the limit
    "preemptions": np.int16,
    "mixable": np.bool_,  # may share an iteration with decodes (SGLang cannot mix log-probabilities)
}


NO_LOOKAHEAD = 1 << 30  # tokens: more than any request writes


class RequestTable:
    """Rows of live requests. `table.deadline_s[rows]` reads a column for an array of rows."""

    seq: np.ndarray
    arrival_s: np.ndarray
    deadline_s: np.ndarray
    ttft_s: np.ndarray
    tbt_s: np.ndarray
    bucket: np.ndarray
    prompt_tokens: np.ndarray
    history_tokens: np.ndarray
    shared_tokens: np.ndarray
    pinned_tokens: np.ndarray
    output_tokens: np.ndarray
    declared_tokens: np.ndarray
    remaining_tokens: np.ndarray
    expected_tokens: np.ndarray
    last_token_s: np.ndarray
    token_s: np.ndarray
    late: np.ndarray
    gaps: np.ndarray
    missed_gaps: np.ndarray
    preemptions: np.ndarray
    mixable: np.ndarray

    def __init__(
        self, capacity: int = 1024, max_preemptions: int = 1 << 14, lookahead_tokens: int = NO_LOOKAHEAD
    ) -> None:
        self._free = list(range(capacity))
        self._next_seq = 0
        self.capacity = capacity
        # predicted output length of each row, natural logs on `lengths.QUANTILES`; float[capacity, Q]
        self.log_quantiles = np.zeros((capacity, len(QUANTILES)))
        self.max_preemptions = max_preemptions
        self.lookahead_tokens = lookahead_tokens
        for name, dtype in COLUMNS.items():
            setattr(self, name, np.zeros(capacity, dtype))

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def add(self, slo: Slo, arrival_s: float, prompt_tokens: int, declared_tokens: int) -> int:
        """A row for a new request with nothing computed; returns the row."""
        if not self._free:
            self._grow()
        row = heapq.heappop(self._free)
        for name in COLUMNS:
            getattr(self, name)[row] = 0
        self.seq[row] = self._next_seq
        self._next_seq += 1
        self.arrival_s[row] = arrival_s
        self.ttft_s[row] = slo.ttft_s
        self.deadline_s[row] = arrival_s + slo.ttft_s
        self.tbt_s[row] = slo.tbt_s
        self.bucket[row] = bucket(slo.tbt_s)
        self.prompt_tokens[row] = prompt_tokens
        self.declared_tokens[row] = declared_tokens
        self.remaining_tokens[row] = declared_tokens
        self.expected_tokens[row] = declared_tokens
        self.last_token_s[row] = -math.inf
        self.token_s[row] = -math.inf
        self.mixable[row] = True
        self.log_quantiles[row] = declared_only(np.array([declared_tokens]))[0]
        return row

    def bound_lengths(self, rows: np.ndarray, confidence: float) -> None:
        """Bring the predicted remaining output of `rows` up to date: bounded at `confidence`, and expected."""
        quantiles, generated = self.log_quantiles[rows], self.output_tokens[rows]
        declared = self.declared_tokens[rows]
        both = remaining_and_expected(quantiles, generated, declared, confidence)
        self.remaining_tokens[rows], self.expected_tokens[rows] = both

    def remove(self, row: int) -> None:
        """Give a row back."""
        heapq.heappush(self._free, row)

    def context_tokens(self, rows: np.ndarray) -> np.ndarray:
        """KV that each row's next token needs, tokens; int[n]."""
        return self.prompt_tokens[rows] + self.output_tokens[rows]

    def prefill_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Tokens each waiting row still has to compute before its next token; int[n], at least 1."""
        return np.maximum(self.context_tokens(rows) - self.history_tokens[rows], 1)

    def held_tokens(self, rows: np.ndarray) -> np.ndarray:
        """KV that each row holds, or will hold once prefilled, alone; int[n]."""
        return self.context_tokens(rows) - self.shared_tokens[rows]

    def bounded_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Output that the ledger keeps room for, of what each row may still write; int[n].

        The predicted bound, as far as `lookahead_tokens`: by then the row can spare a long gap, and whoever needs KV
        that was not kept finds it by preemption.
        """
        return np.minimum(self.remaining_tokens[rows], self.lookahead_tokens)

    @property
    def looks_ahead(self) -> bool:
        """Whether `bounded_tokens` ends before requests do."""
        return self.lookahead_tokens < NO_LOOKAHEAD

    def final(self, rows: np.ndarray) -> np.ndarray:
        """Which rows were preempted as often as anyone may be, and have to stay to their end; bool[n]."""
        return self.preemptions[rows] >= max(self.max_preemptions, 1)

    def final_tokens(self, rows: np.ndarray) -> np.ndarray:
        """What each row may still write by what was declared if it has to stay to its end, else 0; int[n]."""
        declared = self.declared_tokens[rows] - self.output_tokens[rows]
        return np.where(self.final(rows), np.maximum(declared, 1), 0)

    def charges(self, row: int) -> tuple[int, int]:
        """`bounded_tokens` and `final_tokens` of one row, as a ledger wants them."""
        rows = np.array([row])
        return int(self.bounded_tokens(rows)[0]), int(self.final_tokens(rows)[0])

    def _grow(self) -> None:
        self._free = list(range(self.capacity, 2 * self.capacity))
        self.log_quantiles = np.concatenate([self.log_quantiles, np.zeros_like(self.log_quantiles)])
        for name in COLUMNS:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.capacity *= 2
