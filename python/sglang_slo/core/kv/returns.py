"""Who comes back from host memory to the device, and on which terms (CacheOPT C5).

A request on the host needs no prefill, only room. One that can still keep its promise comes back as soon as the near
forecast has room for it, if none that waits for prefill has a nearer deadline; one that cannot comes back when the far
forecast has room for it, as it would otherwise be the next to leave again. Who left to spend its slack, and has nearly
done so, is made room for (`about_to_be_late`).
"""

from __future__ import annotations

import math

import numpy as np

from sglang_slo.core import pages
from sglang_slo.core.kv.ledger import Ledger
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.latency import LatencyModel
from sglang_slo.core.ordering import CRITICAL_S


def returns(
    pool: Pool,
    ledger: Ledger,
    free_tokens: int,
    slots: int,
    nearest_deadline_s: float,
    overdue: int,
    blocked: bool,
    ready_s: float,
) -> list[int]:
    """Rows that begin to return now, most urgent first.

    `ledger`, `free_tokens`, `slots`: what this iteration's newcomers left. `nearest_deadline_s`: of the feasible who wait
    for prefill and were refused; inf: none was. `overdue`: the row that nobody overtakes any more, -1: none;
    `blocked`: it waits for room itself.
    """
    table, host = pool.table, pool.host
    back: list[int] = []
    kept = (table.deadline_s[host.rows] >= ready_s) & ~np.isin(host.rows, pool.given_up)
    deadline = np.where(kept, table.deadline_s[host.rows], math.inf)
    order = np.lexsort((table.seq[host.rows], deadline, host.rows != overdue))
    for place in order.tolist():
        row, tokens = int(host.rows[place]), int(host.tokens[place])
        feasible = math.isfinite(deadline[place])
        first = row == overdue
        if slots <= 0 or (blocked and not first) or (feasible and deadline[place] > nearest_deadline_s):
            break
        charge = charge_tokens(pool, row, tokens)
        need = pool.need(
            row,
            charge,
            far=not (feasible or first),
            keep_free=0 if feasible or first else pool.arrival_reserve_tokens,
        )
        if charge > free_tokens or not ledger.admits(need):
            break
        back.append(row)
        free_tokens -= charge
        slots -= 1
    return back


def charge_tokens(pool: Pool, row: int, tokens: int) -> int:
    """KV that `row` takes from the pool when it comes back with so much."""
    table = pool.table
    whole = pages.whole(tokens + 1 + table.step.spare_tokens, table.page_tokens)
    return int(whole - table.shared_tokens[row])


def about_to_be_late(pool: Pool, model: LatencyModel, ready_s: float) -> list[tuple[int, int]]:
    """(row, KV tokens) of those on the host that can still be kept, if they begin to return within `CRITICAL_S`.

    The most urgent first.
    """
    host = pool.host
    copies = np.array([model.copy_s(int(tokens)) for tokens in host.tokens])
    left = pool.table.deadline_s[host.rows] - ready_s - copies
    near = np.flatnonzero((left >= 0) & (left <= CRITICAL_S) & ~np.isin(host.rows, pool.given_up))
    order = near[np.lexsort((pool.table.seq[host.rows[near]], left[near]))]
    return [(int(host.rows[i]), int(host.tokens[i])) for i in order]
