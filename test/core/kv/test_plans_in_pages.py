"""Plans where KV comes in pages: what a plan takes is there, whoever decodes, and a piece of a prompt ends with a page.

A toy device keeps the pages of each request as SGLang does, and carries the plans out to the page.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_slo.config import SloConfig
from sglang_slo.core import pages
from sglang_slo.core.chunking import Budget
from sglang_slo.core.filling import Filling, Terms
from sglang_slo.core.iteration_plan import IterationPlan
from sglang_slo.core.kv.ledger import ForecastLedger, FullLedger, Need
from sglang_slo.core.kv.pool import HostKv, Leavers, Pool
from sglang_slo.core.kv.preemption import PreemptMode
from sglang_slo.core.kv.returns import returns
from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

MODEL = LatencyModel(Coefficients(6e-3, 1e-3, 27e-6, 1.3e-9, 4e-3, 33e-9))
CHAT, BATCH = Slo(1.0, 0.05), Slo(30.0, 0.5)
sizes = st.sampled_from([1, 16, 64, 128])


class PagedDevice:
    """Requests with `slots` tokens of KV each; a token of output has none until the next is made from it."""

    def __init__(self, page: int, capacity: int, config: SloConfig | None = None) -> None:
        self.page, self.capacity = page, capacity
        self.table = RequestTable(64, max_preemptions=3, page_tokens=page)
        self.planner, self.now = Planner(config or SloConfig()), 0.0
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.host: list[int] = []
        self.slots: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.cut = -1
        self.ended = self.preempted = 0

    def arrive(self, slo: Slo, prompt: int, output: int) -> int:
        row = self.table.add(slo, self.now, prompt, output)
        self.waiting.append(row)
        self.slots[row], self.ends[row] = 0, output
        return row

    @property
    def free(self) -> int:
        return self.capacity - sum(pages.whole(n, self.page) for n in self.slots.values())

    def step(self) -> IterationPlan:
        plan = self.planner.plan(self._view())
        for row, mode in plan.victims:
            self.running.remove(row)
            self._leaves(row, mode)
        if plan.park_chunked and self.cut >= 0:
            self._leaves(self.cut, PreemptMode.RECOMPUTE)
        coming = [(row, self._kv_of(row)) for row in plan.returns]
        planned = dict(plan.prefill)
        if self.cut >= 0 and self.cut not in planned:
            self._leaves(self.cut, PreemptMode.RECOMPUTE)
        decoding = self._decoding(plan)
        self._take(planned.items())
        for row in decoding:
            self._take([(row, 1)])
            self._token(row)
        for row, tokens in coming:
            self._take([(row, tokens)])
            self.host.remove(row)
            self.running.append(row)
        self._prefilled(planned)
        self.now += 0.02
        return plan

    def _take(self, wanted: object) -> None:
        for row, tokens in wanted:  # type: ignore[attr-defined]
            self.slots[row] += tokens
        assert self.free >= 0, "a plan took pages that are not there"

    def _leaves(self, row: int, mode: PreemptMode) -> None:
        table = self.table
        self.slots[row] = table.history_tokens[row] = 0
        if row == self.cut:
            self.cut = -1
            return
        self.preempted += 1
        table.preemptions[row] += 1
        (self.host if mode is PreemptMode.SWAP else self.waiting).append(row)

    def _kv_of(self, row: int) -> int:
        return int(self.table.context_tokens(np.array([row]))[0]) - 1

    def _decoding(self, plan: IterationPlan) -> list[int]:
        if plan.prefill and not plan.mixed:
            return []
        return list(self.running) if plan.decode is None else [self.running[i] for i in plan.decode]

    def _prefilled(self, planned: dict[int, int]) -> None:
        for row, tokens in planned.items():
            self.table.history_tokens[row] += tokens
            self.cut = -1
            if self.slots[row] < self.table.context_tokens(np.array([row]))[0]:
                self.cut = row
                continue
            self.waiting.remove(row)
            self.running.append(row)
            self._token(row)

    def _token(self, row: int) -> None:
        table = self.table
        table.last_token_s[row] = table.token_s[row] = self.now
        table.output_tokens[row] += 1
        table.remaining_tokens[row] = max(table.remaining_tokens[row] - 1, 1)
        if table.output_tokens[row] >= self.ends[row]:
            self.running.remove(row)
            self.slots.pop(row)
            table.remove(row)
            self.ended += 1

    def _view(self) -> View:
        running = np.array(self.running, np.int64)
        slots = np.array([self.slots[row] for row in self.running], np.int64)
        whole, yes = pages.whole(slots, self.page), np.ones(len(slots), bool)
        host = np.array(self.host, np.int64)
        pool = Pool(
            table=self.table,
            decoding=running,
            capacity_tokens=self.capacity,
            free_tokens=self.free,
            waiting=np.array(self.waiting, np.int64),
            chunked=self.cut,
            near=50,
            far=200,
            slots=slots,
            look_up_leavers=lambda: Leavers(yes, whole, slots, 0 * slots, 0 * slots, ~yes, yes, yes),
            host=HostKv(host, np.array([self._kv_of(row) for row in self.host], np.int64), 10**6, on=True),
        )
        waiting = np.array(self.waiting, np.int64)
        return View(self.table, waiting, True, self.now, MODEL, pool, 100, 8192, 0.5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), sizes, st.sampled_from(["forecast", "full"]))
def test_no_plan_takes_pages_that_are_not_there_and_all_are_served(seed: int, page: int, rule: str) -> None:
    rng = np.random.default_rng(seed)
    device = PagedDevice(page, 1024, SloConfig(kv=rule))
    sent = 0
    for _ in range(3000):
        if sent < 12 and rng.random() < 0.3:
            slo = [CHAT, BATCH, Slo()][rng.integers(3)]
            device.arrive(slo, int(rng.integers(1, 700)), int(rng.integers(1, 200)))
            sent += 1
        device.step()
        if sent == device.ended == 12:
            break
    assert device.ended == 12
    assert device.free == device.capacity


def test_with_pages_short_somebody_leaves_and_is_served_again() -> None:
    device = PagedDevice(64, 1024, SloConfig(lost_wait_s=2.0))
    for i in range(10):
        device.arrive(CHAT, 60 + i, 300)
    for _ in range(5000):
        device.step()
    assert device.ended == 10 and device.preempted > 0


def test_one_page_in_many_iterations_is_no_reason_for_anybody_to_leave() -> None:
    """Four decodes, and one page for each: enough for 64 iterations, though not for all four to take another."""
    device = PagedDevice(64, 4 * 128)
    for _ in range(4):
        device.arrive(CHAT, 60, 60)
    for _ in range(200):
        device.step()
    assert device.ended == 4 and device.preempted == 0


@pytest.mark.parametrize("page", [16, 64, 128])
def test_a_long_prompt_is_cut_at_pages(page: int) -> None:
    device = PagedDevice(page, 100_000)
    device.arrive(CHAT, 300, 500)
    device.step()
    long = device.arrive(BATCH, 20_000, 2)
    ends = []
    while device.table.history_tokens[long] < 20_000 and len(ends) < 500:
        device.step()
        ends.append(int(device.table.history_tokens[long]))
    assert len(ends) > 3 and all(end % page == 0 for end in ends[:-1])


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60), st.integers(1, 300)), max_size=10),
    st.sampled_from([1, 16, 64]),
)
def test_all_who_have_to_stay_fit_to_their_end_in_pages(
    comers: list[tuple[int, int, int]], page: int
) -> None:
    empty = np.zeros(0, np.int64)
    ledger = ForecastLedger(empty, empty, 0, 1024, 0, page_tokens=page)
    stay = []
    for context, left, final in comers:
        first = pages.growth(context, 1, page)
        if ledger.admits(Need(pages.whole(context, page), left, final, first=first)):
            stay.append((context, final))
    if len(stay) > 1:
        longest = max(final for _, final in stay)
        for t in range(1, longest + 1):
            assert sum(pages.whole(c + t, page) for c, final in stay if final >= t) <= 1024


@pytest.mark.parametrize("kind", [ForecastLedger, FullLedger])
def test_one_alone_enters_only_if_its_first_token_has_a_page_too(
    kind: type[ForecastLedger] | type[FullLedger],
) -> None:
    empty = np.zeros(0, np.int64)
    assert kind(empty, empty, 0, 128, 0).admits(Need(128, 500, first=0))  # its last page has room
    assert not kind(empty, empty, 0, 128, 0).admits(Need(128, 500, first=64))


def test_one_comes_back_from_the_host_only_into_whole_pages() -> None:
    device = PagedDevice(64, 1024)
    row = device.arrive(CHAT, 65, 10)
    device.host.append(row)
    pool = device._view().pool
    for free, back in ((127, []), (128, [row])):
        assert returns(pool, pool.ledger(), free, 10, np.inf, -1, False, 0.0) == back


def _filling(slots: list[int], free: int) -> tuple[PagedDevice, Filling]:
    """Requests that decode with so many slots each and pages of 64, in a pool with so much left; two of 30 wait."""
    device = PagedDevice(64, 10_000)
    for n in slots:
        row = device.arrive(CHAT, n, 100)
        device.waiting.remove(row)
        device.running.append(row)
        device.slots[row] = n
    for _ in range(2):
        device.arrive(BATCH, 30, 100)
    device.capacity = free + device.capacity - device.free
    return device, Filling(device._view(), Budget(False, np.inf, BatchShape(True)), fixed=False)


def test_each_takes_a_page_however_little_it_writes() -> None:
    device, filling = _filling([100], free=64)
    got_in = [filling.add(row, Terms(overdraft=10**6)) for row in device.waiting]
    assert got_in == [True, False] and filling.free_tokens == 0


def test_those_who_begin_a_page_are_left_one_before_anybody_else_comes() -> None:
    for slots, left in (([128, 192], 0), ([128, 191], 64), ([127, 191], 128)):
        device, filling = _filling(slots, free=128)
        assert filling.free_tokens == left
        got_in = [filling.add(row, Terms(overdraft=10**6)) for row in device.waiting]
        assert sum(got_in) == left // 64
