"""Fills one iteration: who of the line gets how many tokens, until its time, the KV or the request slots are used up."""

from __future__ import annotations

from sglang_slo.core.chunking import Budget, DecodeLoad
from sglang_slo.core.view import View

MOST_DECODE_SHARE = 0.9  # of the time, at most, is promised to decodes; what is left is prefill's
LEAST_CHUNK_TOKENS = 32  # a smaller piece at the end of an iteration is not worth its bookkeeping
MOST_REFUSALS = 16  # requests that KV refuses before the rest of the line is left alone for this iteration


class Filling:
    """Takes requests in order until the time, the KV or the request slots of one iteration are used up."""

    def __init__(self, view: View, budget: Budget, fixed: bool) -> None:
        self.prefill: list[tuple[int, int]] = []
        self.shape = budget.base
        self.full = False
        self.base_s = view.base_s
        self._view = view
        self._time_s = budget.time_s
        self._chunk_left = view.most_chunk_tokens
        self._fixed = fixed
        self._slots = view.request_slots
        # every decode may need a token of KV in this iteration
        self._free = view.free_tokens - len(view.decoding)
        self.refused: list[int] = []
        self.out_of_time = False  # the first one had no time for a single token
        self._decoding: DecodeLoad | None = None  # summed up when the first one asks to enter

    def add(self, row: int, beside_tokens: int) -> bool:
        """Give `row` what fits; whether it got any. Only the last one taken is cut short; where KV has no room
        for one, the next is looked at. A newcomer has to leave `beside_tokens` beside it; where that is negative, it
        may pass the ledger's limit by so much, but not the pool.
        """
        view, table = self._view, self._view.table
        history = int(table.history_tokens[row])
        context = int(table.prompt_tokens[row] + table.output_tokens[row])
        need = max(context - history, 1)
        tokens = min(need, self._fits(history))
        if tokens <= 0 or (tokens < min(need, LEAST_CHUNK_TOKENS) and self.prefill):
            self.full = True
            self.out_of_time = not self.prefill
            return False
        newcomer = row != view.chunked
        # what is pinned for it, or held by others, is out of the pool already
        charge = need
        if newcomer:
            charge = context - int(table.shared_tokens[row] + table.pinned_tokens[row])
        # what is cached but not held by anyone (charge - need) stops being evictable now
        kv = tokens + charge - need
        slot = not newcomer or self._slots > 0
        fits = slot and kv <= self._free
        if not fits or (newcomer and not self._enters(row, context, charge, beside_tokens)):
            self.refused.append(row)
            self.full = len(self.refused) >= MOST_REFUSALS
            return False
        self._slots -= newcomer
        self._free -= kv
        self.prefill.append((row, tokens))
        self.shape = self.shape.with_chunk(history, tokens)
        self._chunk_left -= tokens
        self.full = tokens < need
        return True

    def _enters(self, row: int, context: int, charge: int, beside_tokens: int) -> bool:
        """The decode-time test, then the ledger's word; charges the ledger if the answer is yes."""
        table = self._view.table
        if self._decoding is None:
            rows = self._view.decoding
            self._decoding = DecodeLoad(
                table.tbt_s[rows], table.context_tokens(rows), self._view.model, MOST_DECODE_SHARE
            )
        limit_s = float(table.tbt_s[row])
        if not self._decoding.admits(limit_s, context):
            return False
        if not self._view.ledger.admits(charge, *table.charges(row), beside_tokens):
            return False
        self._decoding.add(limit_s, context)
        return True

    def _fits(self, history: int) -> int:
        if self._fixed:
            return self._chunk_left
        return min(self._chunk_left, self._view.model.largest_safe_chunk(self.shape, history, self._time_s))
