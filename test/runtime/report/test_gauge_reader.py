"""Gauges and loads on fakes: nobody counted twice, nothing above what there is."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from fakes import CAPACITY_TOKENS, MODEL, FakeBatch, FakeRequest, doors
from sglang_slo.core.slo import BEST_EFFORT
from sglang_slo.observe.window import ALL_CLASSES
from sglang_slo.runtime.report import loads
from sglang_slo.runtime.report.gauges import GaugeReader


def test_each_running_request_is_counted_once_wherever_its_batch_is() -> None:
    decodes, cut, away = FakeRequest(), FakeRequest(), FakeRequest()
    away.is_retracted = True
    found = loads.running([FakeBatch([decodes, away]), None, FakeBatch([decodes])], cut)
    assert found == [decodes, cut]


def test_headroom_is_what_neither_the_queue_nor_those_who_decode_take() -> None:
    ports: Any = doors()
    running, waiting = FakeRequest(prompt_tokens=200), FakeRequest(prompt_tokens=300)
    for req in (running, waiting):
        ports.requests.open(req, BEST_EFFORT, 1.0, MODEL)
    ports.batches.known, ports.waiting.reqs = [FakeBatch([running])], [waiting]
    ports.kv.allocator.free_tokens = CAPACITY_TOKENS - 200
    pool = SimpleNamespace(
        reserve=SimpleNamespace(tokens=10),
        arrivals=SimpleNamespace(tokens=lambda now: 0),
        pinned_tokens=0,
        ledger=lambda decoding, free: SimpleNamespace(peak=250),
    )
    preempt = SimpleNamespace(counts=Counter(), swap_ins=0, figures=dict)
    lately = {ALL_CLASSES: {"prefill_tokens_per_s": 0.0}}
    read = GaugeReader(ports, preempt, pool, dict, None, lambda now: lately)
    gauges = read()
    assert gauges.running == 1 and sum(gauges.queued.values()) == 1
    assert gauges.kv["held"] == 200
    (room,) = gauges.headroom.values()
    assert room.kv_tokens == CAPACITY_TOKENS - 10 - 250 - 300
