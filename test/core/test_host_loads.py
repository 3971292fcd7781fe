"""KV that lies in host memory: loaded where the time allows it, computed where it does not, and charged either way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sglang_slo.config import SloConfig
from sglang_slo.core.chunking import Budget
from sglang_slo.core.filling import Filling, Terms
from sglang_slo.core.kv.pool import Pool
from sglang_slo.core.latency import BatchShape, Coefficients, LatencyModel, decode_shape
from sglang_slo.core.plan import Planner
from sglang_slo.core.slo import Slo
from sglang_slo.core.table import RequestTable
from sglang_slo.core.view import View

# a load of 1,000 tokens takes 101 ms, computing them 1 s
MODEL = LatencyModel(
    Coefficients(1e-3, 1e-3, 1e-3, 0.0, 0.0, 0.0),
    swap_overhead_s=1e-3,
    kv_bytes_per_token=1e5,
    swap_bytes_per_s=1e9,
)
HOST, DEVICE, NEW = 1000, 100, 50


def view(decoding: int = 0, free: int = 10_000, model: LatencyModel = MODEL) -> View:
    """One waits: DEVICE tokens of it are on the device, HOST in host memory, NEW are to be computed. Others decode."""
    table = RequestTable(8)
    row = table.add(Slo(ttft_s=2.0), 0.0, DEVICE + HOST + NEW, 10)
    table.history_tokens[row], table.host_tokens[row] = DEVICE + HOST, HOST
    others = [table.add(Slo(ttft_s=2.0, tbt_s=0.05), 0.0, 10, 10) for _ in range(decoding)]
    waiting, running = np.array([row]), np.array(others, np.int64)
    pool = Pool(table, running, capacity_tokens=20_000, free_tokens=free, waiting=waiting)
    return View(table, waiting, True, 0.0, model, pool, 10, 8192, 2.0)


def filled(seen: View, time_s: float) -> Filling:
    base = decode_shape(len(seen.decoding), 0, beside_prefill=True)
    filling = Filling(seen, Budget(True, time_s, base), fixed=False)
    filling.add(0, Terms())
    return filling


def test_a_load_that_fits_the_time_is_done_and_only_the_rest_is_computed() -> None:
    filling = filled(view(decoding=1), 0.2)
    assert filling.prefill == [(0, NEW)] and filling.loads == [0]
    assert MODEL.iteration_s(filling.shape) == MODEL.copy_s(HOST)


def test_a_load_that_would_make_decodes_miss_their_limits_is_left_and_the_prompt_computed_in_pieces() -> None:
    filling = filled(view(decoding=1), 0.05)
    assert filling.loads == []
    assert filling.prefill[0][1] > 0
    assert MODEL.iteration_s(filling.shape) <= 0.05


def test_where_nobody_decodes_a_load_may_take_longer_than_the_cap_on_an_iteration() -> None:
    filling = filled(view(), 0.02)
    assert filling.loads == [0] and filling.prefill == [(0, NEW)]


def test_device_kv_for_what_is_loaded_is_charged_at_once() -> None:
    enough = DEVICE + HOST + NEW
    assert filled(view(free=enough + 20), 0.2).free_tokens == 20
    assert filled(view(free=enough - 1), 0.2).prefill == []
    # computed in pieces instead, it needs only what was found on the device and the piece at once
    piece = filled(view(decoding=1, free=5_000), 0.05)
    assert not piece.loads and piece.free_tokens == 5_000 - 1 - DEVICE - piece.prefill[0][1]


def test_the_time_of_a_load_counts_when_it_is_asked_whether_a_deadline_can_be_met() -> None:
    seen = view()
    soon = 0.5 * MODEL.copy_s(HOST) + 0.001 * NEW
    seen.table.deadline_s[0] = soon
    assert Planner(SloConfig()).plan(seen).feasible == 0
    fast = replace(MODEL, swap_bytes_per_s=math.inf, swap_overhead_s=0.0)
    seen = view(model=fast)
    seen.table.deadline_s[0] = soon
    assert Planner(SloConfig()).plan(seen).feasible == 1


def test_the_plan_says_what_is_loaded() -> None:
    plan = Planner(SloConfig()).plan(view())
    assert plan.prefill == [(0, NEW)] and plan.loads == [0]


def test_a_load_hides_behind_compute_that_takes_as_long() -> None:
    long = BatchShape(True).with_chunk(0, 500)
    assert MODEL.iteration_s(long.loading(MODEL.copy_s(HOST))) == MODEL.iteration_s(long)
