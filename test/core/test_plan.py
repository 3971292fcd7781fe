"""What a plan may and may not do, and how long anyone can be made to wait. A toy device executes the plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.kv.pool import Leavers, Pool
from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel, decode_shape
from sglang_slo.core.ordering import FairShareQueue
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
CAPACITY = 200_000
EMPTY = np.zeros(0, np.int64)


class Device:
    """Runs plans: one request table, one pool, time as the model says. Each request writes `output` tokens."""

    def __init__(
        self, config: SloConfig | None = None, capacity: int = CAPACITY, model: LatencyModel = MODEL
    ) -> None:
        self.model = model
        self.table, self.planner = RequestTable(4), Planner(config or SloConfig())
        self.now, self.capacity = 0.0, capacity
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.output: dict[int, int] = {}
        self.first: dict[int, float] = {}
        self.cut = -1
        self.worst_gap_share = 0.0
        self.reserve = self.kept = 0  # for arrivals, for what the forecast misses
        self.preempts = False
        self.left: list[int] = []  # victims, in order

    def arrive(self, slo: Slo, prompt: int, output: int = 4) -> int:
        row = self.table.add(slo, self.now, prompt, output)
        self.waiting.append(row)
        self.output[row] = output
        return row

    def view(self) -> View:
        table, running = self.table, np.array(self.running, np.int64)
        cut = [self.cut] if self.cut >= 0 else []
        used = int(table.context_tokens(running).sum() + table.history_tokens[np.array(cut, np.int64)].sum())
        waiting = np.array(self.waiting, np.int64)
        return View(
            table=table,
            waiting=waiting,
            may_sit_out=True,
            ready_s=self.now,
            model=self.model,
            pool=Pool(
                table=table,
                decoding=running,
                capacity_tokens=self.capacity,
                free_tokens=self.capacity - used,
                reserve_tokens=self.kept,
                arrival_reserve_tokens=self.reserve,
                waiting=waiting,
                chunked=self.cut,
                near=1 << 30,
                far=1 << 30,
                look_up_leavers=self.leavers,
            ),
            request_slots=1000,
            most_chunk_tokens=8192,
            tightest_ttft_s=0.5,
        )

    def leavers(self) -> Leavers:
        """Everyone may leave, if only to be computed again."""
        running = np.array(self.running, np.int64)
        held, yes = self.table.context_tokens(running), np.ones(len(running), bool)
        nothing = np.zeros(len(running), np.int64)
        return Leavers(yes & self.preempts, held, held, nothing, nothing, ~yes, ~yes, yes)

    def step(self) -> IterationPlan:
        plan = self.planner.plan(self.view())
        table = self.table
        for row, _ in plan.victims:
            self.running.remove(row)
            self.waiting.append(row)
            table.history_tokens[row] = 0
            table.deadline_s[row] = table.back_by_s(row)
            self.left.append(row)
        decoding = [] if plan.prefill and not plan.mixed else self._decoding(plan)
        self.now += plan.predicted_s if (plan.prefill or decoding) else 0.001
        for row, tokens in plan.prefill:
            table.history_tokens[row] += tokens
            self.cut = row
            if (
                table.prefill_tokens(np.array([row]))[0] <= 1
                and table.history_tokens[row] >= table.prompt_tokens[row]
            ):
                self.cut = -1
                self.waiting.remove(row)
                self.running.append(row)
                self.first.setdefault(row, self.now)
                self._token(row, gap=False)
        for row in decoding:
            self._token(row, gap=True)
        return plan

    def _decoding(self, plan: IterationPlan) -> list[int]:
        return list(self.running) if plan.decode is None else [self.running[i] for i in plan.decode]

    def _token(self, row: int, gap: bool) -> None:
        table = self.table
        if gap:
            share = (self.now - table.last_token_s[row]) / table.tbt_s[row]
            self.worst_gap_share = max(self.worst_gap_share, share)
            table.lost[row] |= share > 1
        table.last_token_s[row] = table.token_s[row] = table.since_s[row] = self.now
        table.output_tokens[row] += 1
        table.remaining_tokens[row] -= 1
        if table.output_tokens[row] >= self.output[row]:
            self.running.remove(row)
            table.remove(row)


CHAT, CODE, BATCH = Slo(1.0, 0.05), Slo(0.5, 0.03), Slo(30.0, 0.5)


@given(
    st.lists(st.tuples(st.sampled_from([CHAT, CODE, BATCH, Slo()]), st.integers(1, 9000)), max_size=12),
    st.integers(0, 9),
)
def test_only_the_last_prefill_is_cut_and_the_time_is_kept(
    waiting: list[tuple[Slo, int]], running: int
) -> None:
    device = Device()
    for i in range(running):
        row = device.arrive([CHAT, CODE, BATCH][i % 3], 800 + i, 50)
        device.waiting.remove(row)
        device.running.append(row)
        device.table.last_token_s[row] = 0.0
    for slo, prompt in waiting:
        device.arrive(slo, prompt)
    view = device.view()
    plan = device.planner.plan(view)
    rows = [row for row, _ in plan.prefill]
    assert len(set(rows)) == len(rows)
    need = device.table.prefill_tokens(np.array(rows, np.int64))
    assert all(0 < tokens <= n for (_, tokens), n in zip(plan.prefill, need, strict=True))
    assert all(tokens == n for (_, tokens), n in zip(plan.prefill[:-1], need, strict=False))
    if plan.prefill:
        extra = MODEL.iteration_s(decode_shape(running, int(view.table.context_tokens(view.decoding).sum())))
        waits = 0.0 if plan.mixed or not running else extra
        assert plan.predicted_s <= plan.budget_s + 1e-9
        tightest = view.table.tbt_s[view.decoding].min() if running else np.inf
        assert plan.predicted_s + waits <= tightest + 1e-9


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_gaps_hold_under_any_arrivals(seed: int) -> None:
    rng, device = np.random.default_rng(seed), Device()
    for _ in range(150):
        if rng.random() < 0.3:
            device.arrive(
                [CHAT, CODE, BATCH][rng.integers(3)], int(rng.integers(10, 12_000)), int(rng.integers(2, 40))
            )
        device.step()
    assert device.worst_gap_share <= 1.0


def test_everything_is_served_in_the_end() -> None:
    device = Device()
    rows = [device.arrive([CHAT, CODE, BATCH, Slo()][i % 4], 500 + 700 * i, 3) for i in range(24)]
    for _ in range(2000):
        device.step()
    assert sorted(device.first) == sorted(rows)


def test_a_lost_request_waits_no_longer_than_the_work_ahead_of_it_over_its_share() -> None:
    """Overload by winnable requests without end; one best-effort request behind two others."""
    share = 0.05
    device = Device(SloConfig(lost_share=share))
    ahead = [device.arrive(Slo(), 3000, 2) for _ in range(3)]
    tokens, seen = 0, {}
    while len(seen) < 3 and device.now < 200:
        while sum(device.table.prefill_tokens(np.array(device.waiting, np.int64))) < 20_000:
            device.arrive(Slo(5.0, 0.05), 1000, 2)
        plan = device.step()
        tokens += sum(n for _, n in plan.prefill)
        seen.update({row: tokens for row in ahead if row in device.first and row not in seen})
    most = 3 * 3000 / share + 2 * 8192 / share
    assert len(seen) == 3, "starved"
    assert max(seen.values()) <= most


def test_unlimited_lost_share_switch_off_starves_by_choice_only() -> None:
    device = Device(SloConfig(lost_share=0.0))
    row = device.arrive(Slo(), 3000, 2)
    for _ in range(300):
        while sum(device.table.prefill_tokens(np.array(device.waiting, np.int64))) < 20_000:
            device.arrive(Slo(5.0, 0.05), 1000, 2)
        device.step()
    assert row not in device.first


def test_a_tight_arrival_parks_a_half_prefilled_loose_one() -> None:
    device = Device()
    loose = device.arrive(BATCH, 60_000)
    device.step()
    assert device.cut == loose
    tight = device.arrive(CODE, 400)
    plan = device.step()
    assert plan.prefill[0][0] == tight


def test_the_pool_is_never_promised_twice() -> None:
    device = Device(capacity=10_000)
    for _ in range(6):
        device.arrive(CHAT, 2000, 1500)
    plan = device.planner.plan(device.view())
    assert sum(n for _, n in plan.prefill) <= 10_000
    assert len(plan.prefill) == 2  # 2 x (2000 + 1500) fits, a third would need it again


def test_a_small_one_enters_where_kv_has_no_room_for_a_large_one() -> None:
    device = Device(capacity=10_000)
    device.arrive(CHAT, 2000, 7000)
    device.step()
    device.arrive(CHAT, 5000, 7000)
    small = device.arrive(CHAT, 100, 10)
    assert [row for row, _ in device.planner.plan(device.view()).prefill] == [small]


def test_only_those_with_time_to_spare_leave_a_reserve() -> None:
    device = Device(capacity=10_000)
    device.reserve = 2000
    long = device.arrive(CHAT, 5000, 2000)
    while long not in device.first:
        device.step()
    device.arrive(Slo(), 2500, 500)
    small = device.arrive(Slo(), 200, 100)
    assert [row for row, _ in device.planner.plan(device.view()).prefill] == [small]
    hasty = device.arrive(BATCH, 2500, 500)
    assert device.planner.plan(device.view()).prefill[0][0] == hasty


def test_only_the_critical_may_have_the_reserve() -> None:
    device = Device(capacity=10_000)
    device.kept = 3000
    long = device.arrive(CHAT, 2000, 3000)
    while long not in device.first:
        device.step()
    hasty = device.arrive(BATCH, 2500, 2500)
    assert not device.planner.plan(device.view()).prefill
    device.now += 16.0  # of its 30 s
    assert [row for row, _ in device.planner.plan(device.view()).prefill] == [hasty]


def test_however_many_lost_ones_kv_turns_away_newcomers_get_in() -> None:
    device = Device(SloConfig(lost_share=0.9), capacity=8500)
    long = device.arrive(CHAT, 5000, 3000)
    while long not in device.first:
        device.step()
    lost = [device.arrive(Slo(), 3000, 1000) for _ in range(40)]
    device.planner.lines.share = FairShareQueue(
        0.9, cap_tokens=1e6, credit_tokens=1e6
    )  # all have earned a turn
    hasty = device.arrive(CHAT, 500, 10)
    plan = device.planner.plan(device.view())
    assert [row for row, _ in plan.prefill] == [hasty]
    assert not set(lost) & {row for row, _ in plan.prefill}


@pytest.mark.parametrize("small", [CHAT, Slo()], ids=["feasible", "best effort"])
def test_newcomers_overtake_one_that_kv_has_no_room_for_only_as_long_as_the_setting_says(small: Slo) -> None:
    """An infeasible request that fits only into an empty pool; small ones keep coming and would fill it."""
    limit_s = 20.0
    device = Device(SloConfig(lost_wait_s=limit_s), capacity=10_000)
    large = None
    while device.now < 4 * limit_s and large not in device.first:
        while len(device.waiting) + len(device.running) < 8:
            device.arrive(small, 1000, 40)
        if large is None and device.now > 1:
            large = device.arrive(Slo(), 8000, 1000)
            arrived = device.now
        device.step()
    assert device.first[large] - arrived < limit_s + 5


def test_without_that_setting_it_waits_for_a_lull() -> None:
    device = Device(capacity=10_000)
    large = device.arrive(Slo(), 8000, 1000)
    while device.now < 30:
        while len(device.waiting) + len(device.running) < 8:
            device.arrive(CHAT, 1000, 40)
        device.step()
    assert large not in device.first
    while device.now < 60 and large not in device.first:
        device.step()
    assert large in device.first


def _short_of_kv(*held: int) -> tuple[Device, list[int]]:
    """Requests with so many tokens each and hardly any room left."""
    device = Device(capacity=sum(held) + len(held))
    device.preempts = True
    rows = [device.arrive(CHAT, tokens, 4000) for tokens in held]
    for row in rows:
        device.waiting.remove(row)
        device.running.append(row)
        device.table.history_tokens[row] = device.table.prompt_tokens[row]
        device.table.output_tokens[row] = 1
        device.table.last_token_s[row] = device.table.first_token_s[row] = device.now
    return device, rows


def test_where_kv_runs_short_the_one_that_holds_most_leaves() -> None:
    device, rows = _short_of_kv(500, 3000, 800)
    plan = device.step()
    assert [row for row, _ in plan.victims] == [rows[1]]
    assert rows[1] in device.waiting and device.running == [rows[0], rows[2]]


def test_one_that_has_missed_its_promise_leaves_before_any_that_has_not() -> None:
    device, rows = _short_of_kv(500, 3000, 800)
    device.table.lost[rows[0]] = True
    assert [row for row, _ in device.step().victims] == [rows[0]]


def test_less_important_ones_are_given_up_first() -> None:
    device, rows = _short_of_kv(500, 3000, 800)
    device.table.importance[rows] = [1, 1, 0]
    assert [row for row, _ in device.step().victims] == [rows[2]]


def _newcomer(device: Device, prompt: int, waited_s: float) -> int:
    row = device.arrive(Slo(5.0, 0.05), prompt, 20)
    device.table.deadline_s[row] -= waited_s
    return row


def test_a_newcomer_that_can_wait_displaces_nobody() -> None:
    device, _ = _short_of_kv(500, 3000, 800)
    device.capacity += 40
    _newcomer(device, 600, waited_s=0.0)
    device.planner.plan(device.view())
    assert not device.planner.plan(device.view()).victims


def test_one_whose_deadline_is_near_displaces_one_that_holds_much_more_and_enters_at_once() -> None:
    device, rows = _short_of_kv(500, 3000, 800)
    device.capacity += 100
    row = _newcomer(device, 600, waited_s=3.0)
    plan = device.planner.plan(device.view())
    assert [victim for victim, _ in plan.victims] == [rows[1]]
    assert [taken for taken, _ in plan.prefill] == [row]


def test_nobody_is_displaced_by_one_that_needs_nearly_as_much() -> None:
    device, _ = _short_of_kv(500, 800, 800)
    device.capacity += 100
    _newcomer(device, 600, waited_s=3.0)
    assert not device.planner.plan(device.view()).victims


def test_any_number_that_have_nothing_to_lose_leave_for_a_newcomer() -> None:
    device, rows = _short_of_kv(300, 300, 300, 300)
    device.capacity += 100
    device.table.lost[rows[:3]] = True
    row = _newcomer(device, 600, waited_s=3.0)
    plan = device.planner.plan(device.view())
    assert {victim for victim, _ in plan.victims} <= set(rows[:3]) and len(plan.victims) >= 2
    assert [taken for taken, _ in plan.prefill] == [row]


def test_what_many_share_is_computed_once_and_nobody_waits_for_it_twice_as_long() -> None:
    device = Device()
    rows = [device.arrive(BATCH, 400) for _ in range(5)]
    device.table.prefix_group[rows] = 7
    first = device.planner.plan(device.view())
    assert [row for row, _ in first.prefill] == rows[:1] and first.deferred == rows[1:]
    device.table.deferrals[rows[1:]] += 1
    second = device.planner.plan(device.view())  # nothing is in the cache yet: the first is in flight
    assert not set(second.deferred) & {row for row, _ in second.prefill}
    device.table.deferrals[rows[1:]] += 1
    assert not device.planner.plan(device.view()).deferred


def test_a_prefix_that_is_there_and_one_in_a_hurry_wait_for_nobody() -> None:
    device = Device()
    rows = [device.arrive(BATCH, 400) for _ in range(3)]
    device.table.prefix_group[rows] = 7
    device.table.history_tokens[rows[1]] = 300
    device.table.deadline_s[rows[2]] = 1.0  # of 30 s
    plan = device.planner.plan(device.view())
    assert plan.deferred == [rows[0]] and {rows[1], rows[2]} == {row for row, _ in plan.prefill}


def test_an_overdue_one_displaces_what_it_must_and_is_left_alone_for_a_while() -> None:
    device, rows = _short_of_kv(800, 900, 700)
    device.planner = Planner(SloConfig(lost_wait_s=600.0))
    device.capacity += 100
    overdue = device.arrive(Slo(), 1500, 1000)
    device.now += 700.0
    device.table.last_token_s[rows] = device.now
    plan = device.planner.plan(device.view())
    assert plan.overdue == overdue and [row for row, _ in plan.prefill] == [overdue]
    assert plan.victims
    device.table.stays_until_s[rows] = device.now + 60
    assert not device.planner.plan(device.view()).victims


def test_what_may_not_be_set_aside_goes_on_first() -> None:
    device = Device(SloConfig(park=False))
    loose = device.arrive(BATCH, 60_000)
    device.step()
    assert device.cut == loose
    for _ in range(20):
        device.arrive(CODE, 400)
    while loose not in device.first:
        plan = device.step()
        assert plan.prefill[0][0] == loose


def test_equal_views_give_equal_plans() -> None:
    plans = []
    for _ in range(2):
        device, rng = Device(), np.random.default_rng(3)
        trail = []
        for _ in range(60):
            if rng.random() < 0.4:
                device.arrive([CHAT, CODE, BATCH][rng.integers(3)], int(rng.integers(10, 9000)), 5)
            plan = device.step()
            trail.append((plan.prefill, plan.mixed, plan.predicted_s))
        plans.append(trail)
    assert plans[0] == plans[1]


@given(st.lists(st.tuples(st.floats(0.001, 0.2), st.integers(1, 200_000)), min_size=1, max_size=6))
def test_the_cheap_question_whether_all_decode_is_answered_as_the_plan_would(
    rows: list[tuple[float, int]],
) -> None:
    device = Device()
    for limit_s, context in rows:
        row = device.arrive(Slo(tbt_s=limit_s), context, 100)
        device.waiting.remove(row)
        device.running.append(row)
        device.table.last_token_s[row] = 0.0
    view = device.view()
    asked = device.planner.all_decode(device.table, view.decoding, view.ready_s, MODEL)
    if asked:  # the other way round, a plan may come to the same at more cost
        assert device.planner.plan(view).decode is None


def test_switches_change_the_form_of_an_iteration() -> None:
    def plan_with(**switch: object) -> IterationPlan:
        device = Device(replace(SloConfig(), **switch))
        row = device.arrive(CHAT, 800, 50)
        device.step()
        device.arrive(CHAT, 6000)
        assert device.running == [row]
        return device.step()

    assert plan_with(mix="always").mixed
    assert not plan_with(mix="never").mixed
    assert plan_with(chunk="fixed").prefill[0][1] == 6000
    assert plan_with(chunk="dynamic").prefill[0][1] < 6000


def test_only_what_would_wait_past_the_queue_limit_is_shed() -> None:
    device = Device(SloConfig(queue_limit_s=3.0))
    for _ in range(60):  # a busy time, in which the line of the lost moves at its share
        while sum(device.table.prefill_tokens(np.array(device.waiting, np.int64))) < 20_000:
            device.arrive(Slo(5.0, 0.05), 1000, 2)
        device.step()
    first = device.arrive(Slo(), 500, 2)
    for _ in range(40):
        device.arrive(Slo(), 4000, 2)
    while sum(device.table.prefill_tokens(np.array(device.waiting, np.int64))) < 220_000:
        device.arrive(Slo(5.0, 0.05), 1000, 2)
    plan = device.planner.plan(device.view())
    assert plan.shed and first not in plan.shed
    assert all(
        not np.isfinite(device.table.deadline_s[row]) or device.table.deadline_s[row] < 99
        for row in plan.shed
    )
    assert not set(plan.shed) & {row for row, _ in plan.prefill}


def test_hopeless_ones_are_refused_only_if_asked_and_only_those_who_have_a_promise_to_miss() -> None:
    for refuse, expected in (("hopeless", 1), ("none", 0)):
        device = Device(SloConfig(refuse=refuse))
        device.arrive(Slo(), 500)
        device.arrive(Slo(5.0, 0.05), 500)
        late = device.arrive(Slo(0.5, 0.05), 60_000)  # more than a second of work
        plan = device.planner.plan(device.view())
        assert len(plan.hopeless) == expected and set(plan.hopeless) <= {late}


def test_nothing_is_shed_without_a_queue_limit() -> None:
    device = Device()
    for _ in range(40):
        device.arrive(Slo(), 8000, 2)
    assert not any(device.step().shed for _ in range(50))


@pytest.mark.parametrize("running", [0, 3])
def test_a_nonsense_model_keeps_nobody_waiting_for_ever(running: int) -> None:
    device = Device(model=LatencyModel(Coefficients(0.9, 0.3, 1e-3, 0.0, 0.5, 1e-3)))
    for _ in range(running):
        row = device.arrive(Slo(), 100, 10_000)
        device.waiting.remove(row)
        device.running.append(row)
        device.table.last_token_s[row] = 0.0
        device.table.tbt_s[row] = 0.05
    row = device.arrive(Slo(), 3000, 2)
    for _ in range(200):
        device.step()
    assert row in device.first


def test_where_an_iteration_costs_much_for_its_own_sake_half_of_it_is_work() -> None:
    """As on a host that many share: chunks within the usual cap would leave the device busy with next to nothing."""
    model = LatencyModel(replace(MODEL.coefficients, t0_extend=0.19))
    device = Device(model=model)
    device.arrive(Slo(0.4, 0.1), 100_000)
    plan = device.planner.plan(device.view())
    own_s = model.safe_iteration_s(BatchShape(True))
    assert 1.9 * own_s < plan.predicted_s < 2.1 * own_s


def test_a_history_that_leaves_no_time_holds_no_cut_request_up_for_ever() -> None:
    # reading 200 tokens of KV already takes the 50 ms that a budget has here
    device = Device(model=LatencyModel(Coefficients(8e-3, 11e-3, 2e-4, 2.5e-7, 1e-2, 1.6e-4)))
    long = device.arrive(Slo(), 1000)
    for _ in range(50):
        device.step()
    assert long in device.first


def test_without_request_slots_the_cut_request_goes_on() -> None:
    device = Device()
    loose = device.arrive(BATCH, 30_000)
    device.step()
    assert device.cut == loose
    for _ in range(40):
        device.arrive(CODE, 100)
    plan = device.planner.plan(replace(device.view(), request_slots=0))
    assert [row for row, _ in plan.prefill] == [loose]
