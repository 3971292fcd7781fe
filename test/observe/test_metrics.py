"""Every dial moves when its thing happens, and what is gone disappears; names follow the conventions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from observed import make_record
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import GapRule, Slo, SloClass
from sglang_slo.observe import metric_names as names
from sglang_slo.observe.gauges import Gauges, Headroom
from sglang_slo.observe.judge import SHED_REASONS, judge
from sglang_slo.observe.metric_names import PREFIX
from sglang_slo.observe.metrics import Metrics
from sglang_slo.observe.window import Windows

LABELS = {"model_name": "m", "tp_rank": 0}
OWN = {"model_name": "m", "tp_rank": "0"}
CHAT = Slo(0.5, 0.05, "chat")
CONFIG = SloConfig(classes={"chat": SloClass(500, 50), "reader": SloClass(tbt_ms=100, pace=True)})
BUSY = Gauges(
    running=1,
    queued={"chat": 4},
    oldest_waiting_s=8.0,
    parked=1,
    preempted=2,
    given_up=3,
    budget_s=0.02,
    chunk_tokens=512,
    plan_s=1e-3,
    kv={figure: i + 1 for i, figure in enumerate(names.KV)},
    preemptions={"keep": 1, "swap": 2},
    swap_ins=2,
    swap={"host_used": 5, "host_capacity": 9, "crossing": 100, "failed_copies": 1},
    latency={
        "drift": 1.1,
        "margin_extend": 1.2,
        "margin_decode": 1.1,
        "samples": 30,
        "refits": 2,
        "c_tok": 1e-5,
    },
    lengths={**{k: i + 1 for i, k in enumerate(names.LENGTHS)}, **dict.fromkeys(names.LENGTH_COUNTERS, 3)},
    headroom={"chat": Headroom(5.0, 6)},
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(LABELS, CONFIG, registry)


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for s in family.samples:
            labels = tuple(sorted((k, v) for k, v in s.labels.items() if k not in OWN))
            if not s.name.endswith("_created"):
                found[s.name.removeprefix(PREFIX), labels] = s.value
    return found


def everything_happens(metrics: Metrics) -> None:
    """All that can be counted, once or more."""
    windows = Windows(0.0)
    records = [
        make_record(0.1, (0.01,), CHAT, output_tokens=10, parked=2, recomputed_tokens=5, unattainable=True),
        make_record(0.9, (9.0,), Slo(0.5, 0.05, "chat", 0.01, 1.0)),
        make_record(0.1, (0.3,), Slo(0.5, 0.05, "chat", gap_rule=GapRule.P99, max_pause_s=0.2)),
        make_record(0.1, (0.3,), Slo(0.5, 0.05, "chat", gap_rule=GapRule.PACE)),
        make_record(9.0, (9.0,)),
        make_record(None, (), CHAT, finish="abort", finished_s=100.1),
        make_record(None, (), CHAT, finish="error"),
        *(make_record(None, (), CHAT, finish="shed", message=m) for m in (*SHED_REASONS, "new")),
    ]
    for record in records:
        verdict = judge(record)
        metrics.arrived(record.slo.slo_class, record.slo)
        metrics.finished(record.slo.slo_class, record, verdict)
        windows.arrived(record.slo, 1.0)
        windows.finished(record, verdict, 1.0)
    metrics.windows(windows.report(1.0))
    metrics.gauges(BUSY)
    for name in ("fallbacks", "observer_errors", "request_log_rows_lost"):
        metrics.count_to(name, 2)


def test_no_metric_exists_that_nothing_moves(registry: CollectorRegistry, metrics: Metrics) -> None:
    before = samples(registry)
    everything_happens(metrics)
    after = samples(registry)
    moved = {name for (name, labels), value in after.items() if before.get((name, labels)) != value}
    expected = (
        {n + "_total" for n in names.COUNTERS} | {n + "_count" for n in names.HISTOGRAMS} | {*names.GAUGES}
    )
    constant = {"build_info", "limit_seconds"}
    assert expected - constant - moved == set()
    assert all((name in {key[0] for key in before}) for name in constant)


def test_every_reason_of_a_miss_and_of_shedding_has_its_own_count(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    everything_happens(metrics)
    found = samples(registry)
    missed = {dict(k[1])["reason"] for k in found if k[0] == "missed_requests_total"}
    assert missed == {"ttft", "gap", "pause", "pace", "tpot", "e2e", "shed", "error"}
    shed = {dict(k[1])["reason"] for k in found if k[0] == "shed_requests_total"}
    assert shed == {*SHED_REASONS.values(), "other"}
    chat = (("slo_class", "chat"),)
    assert found["judged_requests_total", chat] == 4 + 1 + len(SHED_REASONS) + 1
    assert found["attained_requests_total", chat] == 1
    assert found["requests_without_limits_total", (("slo_class", "default"),)] == 1


def test_gauges_of_what_is_gone_disappear(registry: CollectorRegistry, metrics: Metrics) -> None:
    everything_happens(metrics)
    quiet = Windows(0.0)
    metrics.windows(quiet.report(1e5))
    metrics.gauges(Gauges())
    left = {name for name, _ in samples(registry)} & {*names.GAUGES}
    alone = {n for n, (_, labels) in names.GAUGES.items() if not labels}
    still = {"running_requests", "parked_requests", "preempted_requests", "given_up_requests"}
    still |= {
        "planned_prefill_tokens",
        "plan_seconds",
        "oldest_waiting_seconds",
        "build_info",
        "limit_seconds",
    }
    assert left == still
    assert still & alone  # each of one process: 0 is a figure, a class without traffic has none


def test_a_quiet_class_has_no_attainment_two_hours_later(
    registry: CollectorRegistry, metrics: Metrics
) -> None:
    windows, record = Windows(0.0), make_record(0.1, (0.01,), CHAT)
    windows.finished(record, judge(record), 10.0)
    metrics.windows(windows.report(20.0))
    assert samples(registry)["attainment_ratio", (("slo_class", "chat"), ("window", "1h"))] == 1
    metrics.windows(windows.report(7300.0))
    assert not [key for key in samples(registry) if key[0].startswith(("attainment", "longest_pause_", "goodput"))
                and dict(key[1]).get("slo_class") == "chat" and "window" in dict(key[1])]  # fmt: skip


def test_limits_of_each_class_are_shown(registry: CollectorRegistry, metrics: Metrics) -> None:
    found = {labels: v for (name, labels), v in samples(registry).items() if name == "limit_seconds"}
    assert found == {
        (("limit", "ttft"), ("slo_class", "chat")): 0.5,
        (("limit", "tbt"), ("slo_class", "chat")): 0.05,
        (("limit", "tbt"), ("slo_class", "reader")): 0.1,
    }


def test_a_count_kept_elsewhere_never_goes_back(registry: CollectorRegistry, metrics: Metrics) -> None:
    for total in (3, 2, 5):
        metrics.count_to("swap_ins", total)
    assert samples(registry)["swap_ins_total", ()] == 5


UNITS = ("seconds", "ratio", "tokens", "requests", "per_second", "info", "total", "samples")
UNITLESS = {"length_level", "length_model_rows", "length_kept_rows", "length_training"}


def test_names_follow_the_conventions(registry: CollectorRegistry, metrics: Metrics) -> None:
    assert len({*names.COUNTERS, *names.HISTOGRAMS, *names.GAUGES}) == sum(
        map(len, (names.COUNTERS, names.HISTOGRAMS, names.GAUGES))
    )
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert re.fullmatch(r"sglang_slo_[a-z][a-z0-9_]*", family.name) and family.documentation
    for name in names.COUNTERS:
        assert not name.endswith("_total")
    for name in (*names.GAUGES, *names.HISTOGRAMS):
        assert name.endswith(UNITS) or name in UNITLESS, name
        assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name


def test_what_is_nan_is_left_out_of_a_multiprocess_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client.metrics_core import GaugeMetricFamily
    from prometheus_client.multiprocess import MultiProcessCollector

    from sglang_slo.observe.metrics import hide_gone

    def collect(self: Any) -> Any:
        for name in (PREFIX + "attainment_ratio", "sglang:other"):
            family = GaugeMetricFamily(name, "h", labels=["slo_class"])
            family.add_metric(["gone"], float("nan"))
            family.add_metric(["here"], 1.0)
            yield family

    monkeypatch.setattr(MultiProcessCollector, "collect", collect)
    hide_gone()
    hide_gone()
    collector = MultiProcessCollector.__new__(MultiProcessCollector)
    shown = {family.name: len(family.samples) for family in collector.collect()}
    assert shown == {PREFIX + "attainment_ratio": 1, "sglang:other": 2}
