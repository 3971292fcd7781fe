"""Who of the waiting is served, in which order, and who is refused: the line that the filling walks down.

The feasible come first, by deadline (`ordering`) and, among equally urgent ones, as they fit best (`packing`). Those that
cannot keep their deadline follow, but for the ones that have earned their turn and the one that has waited too long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_slo.core import ordering, packing
from sglang_slo.core.chunking import Budget
from sglang_slo.core.iteration_plan import PlanSettings
from sglang_slo.core.ordering import Ranking
from sglang_slo.core.orders import ORDERS
from sglang_slo.core.orders.queue import Queue
from sglang_slo.core.view import View

NO_ROWS = np.zeros(0, np.int64)
MAX_PROMOTED = 64  # infeasible requests looked at for their turn in one iteration


@dataclass(frozen=True, slots=True)
class Line:
    """Waiting rows in order of service: the overdue one, `promoted` infeasible ones, `urgent` feasible ones, the rest."""

    rows: np.ndarray
    overdue: int  # the row that nobody overtakes any more; -1: none
    promoted: int
    urgent: int


class ServiceLine:
    """Makes the line of each iteration; `share` is the credit of the infeasible, which outlasts one."""

    def __init__(self, config: PlanSettings, share: ordering.FairShareQueue) -> None:
        self.config, self.share = config, share

    def ranking(self, view: View, needs: np.ndarray, prefill_share: float) -> Ranking:
        """The two lines of the waiting, by the policy that `--slo-order` names; `needs` int[n]: prefill tokens."""
        table, rows, model = view.table, view.waiting, view.model
        work_s = model.prefill_s_array(table.history_tokens[rows], needs) / prefill_share
        queue = Queue(
            rows,
            deadline_s=np.where(np.isin(rows, view.pool.given_up), -np.inf, table.deadline_s[rows]),
            work_s=work_s + _load_s(view, rows),
            seq=table.seq[rows],
            importance=table.importance[rows],
            expected_tokens=table.expected_tokens[rows],
            # the fixed cost of the iteration that gives the first token comes on top of the work before it
            start_s=view.ready_s + model.coefficients.t0_extend,
        )
        return ORDERS[self.config.order](queue)

    def line(self, view: View, budget: Budget, ranking: Ranking, fitting_tokens: int) -> Line:
        """The order of service: the infeasible go last, but for those that have earned their turn, or are overdue."""
        feasible, infeasible = ranking.feasible, ranking.infeasible
        if self.config.packing == "dual":
            feasible = self._packed(view, budget, feasible, fitting_tokens)
        overdue = self.overdue(view, infeasible)
        rest = infeasible[infeasible != overdue]
        promoted = 0
        if len(rest):
            promoted = self.share.n_promoted(view.table.prefill_tokens(rest[:MAX_PROMOTED]), fitting_tokens)
        head = NO_ROWS if overdue < 0 else np.array([overdue])
        rows = np.concatenate((head, rest[:promoted], feasible, rest[promoted:]))
        urgent = len(feasible)
        if view.request_slots <= 0:  # only the one that has its place already can go on
            return Line(rows[rows == view.chunked], -1, 0, 1)
        if self.goes_on(view):
            place = int(np.flatnonzero(rows == view.chunked)[0])
            before = place - len(head)
            rows = np.concatenate((rows[place : place + 1], np.delete(rows, place)))
            urgent -= promoted <= before < promoted + urgent
            promoted += before >= promoted
        return Line(rows, overdue, promoted, urgent)

    def overdue(self, view: View, rows: np.ndarray) -> int:
        """The first of `rows` to have come, of those without a token for `lost_wait_s`; -1: there is none."""
        limit_s, table = self.config.lost_wait_s, view.table
        if limit_s is None or not len(rows):
            return -1
        late = rows[view.ready_s - table.since_s[rows] > limit_s]
        return int(late[np.argmin(table.seq[late])]) if len(late) else -1

    def _packed(self, view: View, budget: Budget, rows: np.ndarray, fitting_tokens: int) -> np.ndarray:
        if len(rows) < 2:
            return rows
        table, model = view.table, view.model
        head = rows[: packing.WINDOW]
        tokens = table.prefill_tokens(head)
        work_s = model.prefill_s_array(table.history_tokens[head], tokens)
        slack_s = table.deadline_s[head] - view.ready_s - work_s
        kv = table.held_tokens(head) + table.remaining_tokens[head]
        room = view.pool.free_tokens - view.pool.next_tokens
        most = min(fitting_tokens, view.most_chunk_tokens)
        packed = packing.pack(head, slack_s, tokens, kv, most, room, budget.time_s)
        return np.concatenate([packed, rows[len(head) :]])

    def shed(self, view: View, ranking: Ranking, prefill: list[tuple[int, int]]) -> list[int]:
        """Of the infeasible that have not begun, those that the line ahead would keep waiting past the queue limit."""
        limit_s, rows, table = self.config.queue_limit_s, ranking.infeasible, view.table
        if limit_s is None or not len(rows):
            return []
        waits = self.share.wait_s(np.cumsum(table.prefill_tokens(rows)))
        # one with KV of its own (parked, or cut) has begun
        untouched = (table.output_tokens[rows] == 0) & (rows != view.chunked) & ~table.begun[rows]
        taken = {row for row, _ in prefill}
        return [row for row in rows[untouched & (waits > limit_s)].tolist() if row not in taken]

    def hopeless(self, view: View, rows: np.ndarray) -> np.ndarray:
        """Of infeasible `rows`, those that have not begun and could not keep their promise even alone; bool[n]."""
        if self.config.refuse != "hopeless" or not len(rows):
            return np.zeros(len(rows), bool)
        table = view.table
        work_s = view.model.prefill_s_array(table.history_tokens[rows], table.prefill_tokens(rows))
        work_s = work_s + _load_s(view, rows)
        late = view.ready_s + view.model.coefficients.t0_extend + work_s > table.deadline_s[rows]
        untouched = (table.output_tokens[rows] == 0) & (rows != view.chunked) & ~table.begun[rows]
        return np.asarray(late & untouched)

    def goes_on(self, view: View) -> bool:
        """Whether the request that was cut last comes first, as it cannot be set aside."""
        return view.chunked >= 0 and not self.config.park


def _load_s(view: View, rows: np.ndarray) -> np.ndarray:
    """What loading the KV of `rows` that lies in host memory takes; float[n], seconds."""
    tokens, model = view.table.host_tokens[rows], view.model
    if not tokens.any():
        return np.zeros(len(rows))
    per_token_s = model.kv_bytes_per_token / model.swap_bytes_per_s
    return np.asarray(np.where(tokens > 0, model.swap_overhead_s + tokens * per_token_s, 0.0))
