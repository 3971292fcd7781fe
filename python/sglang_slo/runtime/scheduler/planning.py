"""One iteration: look, plan, carry out what concerns KV, have SGLang build what is to be launched.

Called at SGLang's own points (`scheduler`): `begin` and `end` around its choice of a batch, `prefill` inside it, `decode`
where it would decode everyone. Whatever raises before the first change leaves the iteration to stock scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_batch import NextBatchPlan, ScheduleBatch

from sglang_slo import clock
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.plan import Planner
from sglang_slo.runtime.requests import batches
from sglang_slo.runtime.sglang import tree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_slo.runtime.kv.held import HeldPrefills
    from sglang_slo.runtime.kv.look_up import PrefixLookUp
    from sglang_slo.runtime.kv.preempt import Preemptor
    from sglang_slo.runtime.kv.prefix_pins import Pins
    from sglang_slo.runtime.kv.prefixes import PrefixGroups
    from sglang_slo.runtime.ports import Ports
    from sglang_slo.runtime.scheduler.applier import Applier
    from sglang_slo.runtime.scheduler.viewer import Viewer

LOW_POOL_SHARE = 0.05  # with less of the pool free or evictable than this, nothing is kept for them
EVERYONE_DECODES = IterationPlan()  # the plan of an iteration in which there is nothing to decide
STAY_SHARE = 0.1  # of the time that an overdue request waited, it is left alone once it is in
MOST_IDLE_PLANS = 8  # in a row that give an idle device nothing to do while somebody waits


class IdlePlanError(RuntimeError):
    """Plan after plan leaves the device idle though somebody waits."""


class Planning:
    """Plans and carries out the iterations of one scheduler. `fell_back` is told of each that stock scheduling takes."""

    def __init__(
        self,
        ports: Ports,
        planner: Planner,
        viewer: Viewer,
        preempt: Preemptor,
        applier: Applier,
        pins: Pins,
        groups: PrefixGroups,
        look_up: PrefixLookUp,
        held: HeldPrefills,
        fell_back: Callable[[Exception], None],
    ) -> None:
        self._ports, self._planner, self._viewer = ports, planner, viewer
        self._preempt, self._applier = preempt, applier
        self._pins, self._groups, self._look_up = pins, groups, look_up
        self._held, self._fell_back = held, fell_back
        self._idle_plans = 0

    # -- around SGLang's choice of a batch

    def rejoin(self, running_batch: ScheduleBatch) -> ScheduleBatch:
        """The running batch with the part that was launched alone."""
        part = self._ports.iteration.split
        if part is None:
            return running_batch
        try:
            running_batch = batches.merged(running_batch, part)
        except Exception as error:
            self._ports.trouble.failed("a part that was launched alone", error)
            part.filter_batch()
            if running_batch.is_empty():
                running_batch = part
            elif not part.is_empty():
                running_batch.merge_batch(part)
        self._ports.iteration.split = None
        return running_batch

    def end(self, step: NextBatchPlan, in_flight: bool) -> NextBatchPlan:
        """This iteration's victims wait for prefill from now on; a part that decodes alone is what is launched.

        `in_flight`: whether an iteration was launched just before.
        """
        back, self._preempt.leaving = self._preempt.leaving, []
        self._ports.waiting.reqs.extend(back)
        for req in back:
            with self._ports.trouble.noting("a victim"):
                self._preempt.requeued(req)
        aside, self._ports.iteration.aside = self._ports.iteration.aside, None
        if aside is not None:  # whatever SGLang took for its running batch when it was handed the part
            step = NextBatchPlan(batch_to_run=step.batch_to_run, running_batch=aside)
        with self._ports.trouble.noting("an idle device"):
            self._watch(step, in_flight)
        return step

    def _watch(self, step: NextBatchPlan, in_flight: bool) -> None:
        """Count plannings in a row that leave an idle device idle while somebody waits (`prefill` reads it)."""
        waiting = self._ports.waiting
        idle = step.batch_to_run is None and not in_flight and not self._ports.batches.results_wait()
        idle = idle and not tree.fetching(self._ports.kv.tree)  # who waits for storage needs no device
        somebody = waiting.reqs or waiting.cut is not None or not step.running_batch.is_empty()
        self._idle_plans = self._idle_plans + 1 if idle and somebody else 0

    # -- prefill

    def prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan | None:
        """Plan, carry out what concerns KV, then let SGLang build the planned prefill batch; None: stock is to do it."""
        iteration = self._ports.iteration
        iteration.running, iteration.step = running_batch, None
        try:
            tree.note_copies(self._ports.kv.tree)
            if self._idle_plans >= MOST_IDLE_PLANS:
                self._idle_plans = 0
                raise IdlePlanError(f"{len(self._ports.waiting.reqs)} requests wait, and nothing runs")
            return self._planned(running_batch)
        except Exception as error:
            self.fall_back(error)
            if iteration.step is not None:  # it was built, and its requests are in it
                return iteration.step
            iteration.running.batch_is_full = False
            return None

    def _planned(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        began_s, iteration = clock.now(), self._ports.iteration
        if self._nothing_to_decide(running_batch):
            iteration.plan, iteration.plan_s = EVERYONE_DECODES, clock.now() - began_s
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        running_batch.filter_batch()
        self._preempt.arrived(running_batch)
        plan = self._make_plan(iteration.running)
        self._carry_out(plan)
        iteration.plan = plan
        reqs = self._ports.requests.reqs
        planned = {reqs[row]: tokens for row, tokens in plan.prefill if row in reqs}
        iteration.loads = {reqs[row] for row in plan.loads if row in reqs}
        iteration.plan_s = clock.now() - began_s
        if not plan.prefill:
            return NextBatchPlan(batch_to_run=None, running_batch=iteration.running)
        return self._applier.prefill(plan, planned, iteration.running)

    def _carry_out(self, plan: IterationPlan) -> None:
        """Victims out, then returns begun, then whom to refuse; `running` follows at the moment of each change."""
        noting, iteration = self._ports.trouble.noting, self._ports.iteration
        if plan.victims:
            with noting("preemption"):
                self._preempt.preempt(plan.victims, iteration.running)
        if plan.park_chunked:
            with noting("parking"):
                self._preempt.park()
        if plan.returns:
            with noting("a return from the host"):
                self._preempt.bring_back(plan.returns, iteration.running)
        if plan.shed or plan.hopeless:
            with noting("refusing"):
                self._applier.refuse(plan.shed, plan.hopeless)

    def _nothing_to_decide(self, running_batch: ScheduleBatch) -> bool:
        """Nobody waits, KV is ample, and everyone can decode in time: most iterations, told at little cost."""
        p = self._ports
        if p.waiting.reqs or p.waiting.cut is not None or running_batch.is_empty():
            return False
        if p.waiting.grammars() or not self._preempt.at_rest(running_batch):
            return False
        seen = p.requests.seen(running_batch.reqs)
        if not seen.whole:
            return False
        if not self._planner.all_decode(p.requests.table, seen.rows, p.ready_s(), p.agreed.model):
            return False
        p.iteration.next_in_line = []
        if len(self._pins):
            self._pins.release_all()
        return True

    def _make_plan(self, running_batch: ScheduleBatch) -> IterationPlan:
        p = self._ports
        if p.waiting.grammars():
            p.waiting.admit_ready_grammars()
        for req in self._groups.stale():
            if req.slo_row >= 0:
                self._look_up.look_up(req)
        # before anything is counted on: what is pinned cannot be evicted for this iteration's chunks
        self._pin_next()
        plan = self._planner.plan(self._viewer.view(running_batch))
        p.iteration.next_in_line = plan.next_in_line
        p.requests.table.deferrals[plan.deferred] += 1
        if plan.overdue >= 0:
            stays_s = STAY_SHARE * (p.settings.lost_wait_s or 0.0)
            p.requests.table.stays_until_s[plan.overdue] = p.agreed.now_s + stays_s
        p.requests.planned([row for row, _ in plan.prefill])
        for row, _ in plan.prefill:
            self._pins.release(row)
        return plan

    def _pin_next(self) -> None:
        p, line = self._ports, self._ports.iteration.next_in_line
        if not line and not len(self._pins):
            return
        if p.kv.low(LOW_POOL_SHARE):
            self._pins.release_all()
            return
        reqs = p.requests.reqs
        cut = -1 if p.waiting.cut is None else p.waiting.cut.slo_row
        self._pins.keep([reqs[row] for row in line if row in reqs and row != cut])

    def fall_back(self, error: Exception) -> None:
        """Stock scheduling takes what is left of this iteration."""
        self._ports.iteration.plan, self._ports.iteration.next_in_line = None, []
        with self._ports.trouble.noting("held prefills"):
            self._release_held()
        self._fell_back(error)

    def _release_held(self) -> None:
        """Stock scheduling knows of nobody who waits and has KV; nor may one be back whose chunk is in flight."""
        waiting = self._ports.waiting
        in_flight = [req for req in self._held.waiting() if req.inflight_middle_chunks > 0]
        self._held.release()
        if in_flight:
            waiting.reqs = [req for req in waiting.reqs if req not in in_flight]
            self._preempt.leaving.extend(in_flight)

    # -- decode

    def decode(
        self, batch: ScheduleBatch, stock: Callable[[ScheduleBatch], ScheduleBatch | None]
    ) -> ScheduleBatch | None:
        """All of the running batch decodes, or the part of it that the plan names. `stock`: SGLang's own step."""
        iteration, plan = self._ports.iteration, self._ports.iteration.plan
        if plan is EVERYONE_DECODES:
            return stock(batch)
        with self._ports.trouble.noting("room before decoding"):
            self._preempt.before_decode(batch)
        if plan is None or plan.decode is None:
            return stock(batch)
        try:
            part, rest = batches.divide(batch, plan.decode)
        except Exception as error:
            self.fall_back(error)
            return stock(batch)
        decoded, iteration.aside = stock(part), rest
        if decoded is not None and not decoded.is_empty():
            iteration.split = decoded
        return decoded

    def cached(self, batch: ScheduleBatch, waits: Callable[[Req], bool]) -> None:
        """Those who wait with the same beginning as one that was just computed are looked up again."""
        if not (batch.forward_mode.is_extend() and self._ports.waiting.reqs):
            return
        with self._ports.trouble.noting("what is cached now"):
            table = self._ports.requests.table
            done = [(req, int(table.prefix_group[req.slo_row])) for req in batch.reqs if req.slo_row >= 0]
            self._groups.computed(done, waits)
