"""What those who have begun are still owed of the KV pool, and whom to give up where it is more than there is.

A request with a line to keep (a pace, a mean, an end) may leave while it has slack. That postpones what it needs, and
takes nothing off it. One that holds h tokens of KV, has slack s, and has to write a token every l seconds, must write
(H - s) / l of them within the next H seconds; for each it holds its KV on the device for one iteration, τ seconds long. It
is owed

    h τ max(H - s, 0) / l    token-seconds of the M H that a pool of M tokens has until then.

Where `OWED_SHARE` of that is not enough, slack runs out for all of them at about the same time, and each comes back in the
place of another, to be computed again and to be late all the same. So the ones that hold most are given up until the rest
can be kept: Moore's rule with KV in the place of time (`relief`). That is for now: every plan looks again. Who is given
up leaves first, and comes back behind those who can be kept. What is left of the pool is for first tokens, for those who
can not pause, and for what everyone writes meanwhile.
"""

from __future__ import annotations

import math

import numpy as np

from sglang_slo.core.kv.pool import NOBODY, Pool
from sglang_slo.core.latency import LatencyModel, decode_shape
from sglang_slo.core.slo import GapRule
from sglang_slo.core.table import RequestTable

HORIZON_S = 60.0  # H: as far as slack is worth something (`relief.MIN_SLACK_S` twice)
# of the pool's time until then. Of `reason-pace` at load 1, seed 7, in a model of planning alone, 0.2 and 0.3 keep the same
# within a point, and 0.4 two points less.
OWED_SHARE = 0.3


def line_s(table: RequestTable, rows: np.ndarray) -> np.ndarray:
    """Seconds a token that each row's line leaves it, the tightest it has; float[n], inf: none, or no pause is allowed.

    Who is held to every gap cannot spend slack, whatever else it was promised.
    """
    tbt, paced = table.tbt_s[rows], table.gap_rule[rows] == GapRule.PACE
    each = (table.e2e_by_s[rows] - table.last_token_s[rows]) / np.maximum(table.expected_steps(rows), 1.0)
    line: np.ndarray = np.minimum(np.minimum(np.where(paced, tbt, np.inf), table.tpot_s[rows]), each)
    return np.where(paced | ~np.isfinite(tbt), line, np.inf)


def given_up(pool: Pool, waiting: np.ndarray, model: LatencyModel, ready_s: float) -> np.ndarray:
    """Rows of those who have begun that are given up for now, the least important first, of these who holds most; int[k].

    `waiting` int[m]: who has prefill to do; those of them that have written before are counted in.
    """
    table = pool.table
    away = np.concatenate((waiting[table.output_tokens[waiting] > 0], pool.host.rows))
    rows = np.concatenate((pool.decoding, away))
    is_away = np.arange(len(rows)) >= len(pool.decoding)
    line = line_s(table, rows)
    counted = table.feasible(rows) & (line < math.inf) & ~(is_away & (table.deadline_s[rows] < ready_s))
    if not counted.any():
        return NOBODY
    rows, line, is_away = rows[counted], np.maximum(line[counted], 1e-6), is_away[counted]
    due = np.where(is_away, table.deadline_s[rows], table.due_s(rows))
    held = table.held_tokens(rows)
    iteration_s = model.iteration_s(decode_shape(max(len(pool.decoding), 1), pool.capacity_tokens))
    tokens = np.clip(ready_s + HORIZON_S - due, 0.0, HORIZON_S) / line
    owed = held * np.minimum(tokens * iteration_s, HORIZON_S)
    excess = float(owed.sum()) - OWED_SHARE * pool.capacity_tokens * HORIZON_S
    if excess <= 0:
        return NOBODY
    order = np.lexsort((-table.seq[rows], -held, table.importance[rows]))
    count = int(np.searchsorted(np.cumsum(owed[order]), excess)) + 1
    found: np.ndarray = rows[order[:count]]
    return found
