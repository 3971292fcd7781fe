"""Who decodes in an iteration, and the time it may take, as the settings and the limits at hand have it.

`chunking` has the rules; here they are applied to a view.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sglang_slo.core import chunking
from sglang_slo.core.chunking import Budget, DecodeChoice
from sglang_slo.core.iteration_plan import PlanSettings
from sglang_slo.core.latency import BatchShape, decode_shape
from sglang_slo.core.view import View

SHORTEST_CAP_S = 0.02  # the cap on an iteration follows the tightest TTFT limit, down to this
# and never below so many times what an iteration takes for its own sake: half of it is work
MIN_CAP_FACTOR = 2.0
STARVED_CHUNK_TOKENS = 256  # the chunk that runs where there is time for none


def decodes(view: View, config: PlanSettings) -> DecodeChoice | None:
    """Who decodes; None: nobody is there to."""
    if len(view.decoding) == 0:
        return None
    table, rows, verified = view.table, view.decoding, view.table.step.verified_tokens
    contexts = table.context_tokens(rows)
    alone_s = view.model.safe_iteration_s(decode_shape(len(rows), int(contexts.sum()), verified=verified))
    allowance = table.due_s(rows, config.margin, alone_s) - view.ready_s
    may_sit_out = config.decode_buckets and view.may_sit_out
    return chunking.choose_decodes(allowance, contexts, view.model, may_sit_out, verified)


def budget(view: View, choice: DecodeChoice | None, backlog_tokens: int, config: PlanSettings) -> Budget:
    """Form and time of an iteration beside which `backlog_tokens` wait for prefill."""
    if config.chunk == "fixed":
        mixed = choice is not None and config.mix != "never"
        return Budget(mixed, math.inf, choice.mixed_shape if mixed and choice else BatchShape(True))
    table, mix = view.table, config.mix
    cap = min(config.idle_cap_ms / 1e3, max(view.tightest_ttft_s / 4, SHORTEST_CAP_S))
    cap = max(cap, MIN_CAP_FACTOR * view.model.safe_iteration_s(BatchShape(True)))
    if not (table.mixable[view.waiting].all() and table.mixable[view.decoding].all()):
        mix = "never"
    return chunking.iteration_budget(choice, view.model, cap, mix, backlog_tokens)


def least(view: View, budget: Budget) -> Budget:
    """Where no prefill fits at all (a wrong model, limits on the edge of what the hardware can do): a small chunk.

    Without decodes at once, beside them after `plan.MAX_PREFILL_STARVATION_S`, behind however long a history: nothing may
    keep the queue waiting for ever.
    """
    history = int(view.table.history_tokens[view.waiting].max())
    least_s = view.model.safe_iteration_s(budget.base.with_chunk(history, STARVED_CHUNK_TOKENS))
    return replace(budget, time_s=max(budget.time_s, least_s * (1 + 1e-9)))
