"""Prometheus says what the observer counted, beside SGLang's own labels."""

from __future__ import annotations

import math

import pytest
from observed import make_record
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_slo.core.slo import Slo
from sglang_slo.observe.gauges import Gauges, Headroom
from sglang_slo.observe.judge import judge
from sglang_slo.observe.metrics import COUNTERS, GAUGES, HISTOGRAMS, PREFIX, Metrics
from sglang_slo.observe.window import Windows

LABELS = {"model_name": "m", "tp_rank": 0}
CHAT = Slo(0.5, 0.05, "chat")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_counters_and_histograms_add_up(registry: CollectorRegistry) -> None:
    metrics = Metrics(LABELS, registry)
    records = [
        make_record(0.1, (0.01,), CHAT, output_tokens=10, parked=2),
        make_record(0.9, (0.01,), CHAT, output_tokens=20),
        make_record(9.0, (9.0,)),
        make_record(None, (), CHAT, finish="abort", finished_s=100.1),
    ]
    for record in records:
        metrics.finished(record.slo.slo_class, record, judge(record))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(PREFIX + name, {"model_name": "m", "tp_rank": "0", **labels})

    assert value("finished_total", slo_class="chat", missed="none") == 1
    assert value("finished_total", slo_class="chat", missed="ttft") == 1
    assert value("finished_total", slo_class="chat", missed="aborted") == 1
    assert value("judged_total", slo_class="chat") == 2
    assert value("attained_total", slo_class="chat") == 1
    assert value("attained_total", slo_class="default") == 0
    assert value("attained_tokens_total", slo_class="chat") == 10
    assert value("parked_total", slo_class="chat") == 2
    assert value("ttft_seconds_count", slo_class="chat") == 2
    assert value("ttft_limit_used_bucket", slo_class="chat", le="1.0") == 1
    assert value("ttft_limit_used_count", slo_class="default") is None
    assert value("fallbacks_total") == 0


def test_gauges_follow_the_scheduler_and_keep_nothing_stale(registry: CollectorRegistry) -> None:
    metrics = Metrics(LABELS, registry)
    metrics.gauges(Gauges(queued={0: 4}, headroom={0: Headroom(5.0, 6)}, kv={"free": 7}, budget_s=0.02))
    metrics.gauges(Gauges(queued={3: 1}))
    own = {"model_name": "m", "tp_rank": "0"}
    assert registry.get_sample_value(PREFIX + "queue", {**own, "bucket": "0"}) == 0
    assert registry.get_sample_value(PREFIX + "queue", {**own, "bucket": "3"}) == 1
    assert math.isnan(registry.get_sample_value(PREFIX + "headroom_kv_tokens", {**own, "bucket": "0"}) or 0)
    assert math.isnan(registry.get_sample_value(PREFIX + "budget_seconds", own) or 0)


def test_attainment_is_nan_while_nothing_was_judged(registry: CollectorRegistry) -> None:
    metrics, windows = Metrics(LABELS, registry), Windows(0.0)
    windows.arrived("chat", 1.0)
    metrics.windows(windows.report(1.0))
    labels = {"model_name": "m", "tp_rank": "0", "slo_class": "chat", "window": "5m"}
    assert math.isnan(registry.get_sample_value(PREFIX + "attainment", labels) or 0)


def test_every_metric_parses_and_has_help(registry: CollectorRegistry) -> None:
    Metrics(LABELS, registry)
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {PREFIX + n for n in (*COUNTERS, *HISTOGRAMS, *GAUGES)} <= families.keys()
    assert all(f.documentation for f in families.values())
