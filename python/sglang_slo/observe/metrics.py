"""Prometheus metrics `sglang_slo:*`, beside SGLang's own on the same `/metrics`, with the same labels.

SGLang runs the Prometheus client in multiprocess mode: values live in files of a folder that is named in the
environment before the client is first imported. Hence the import inside, in the scheduler process, never at
module level. One process of each replica reports (rank 0); its labels tell replicas apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_slo.observe.gauges import Gauges
from sglang_slo.observe.judge import RequestRecord, Verdict
from sglang_slo.observe.window import ALL_CLASSES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "sglang_slo:"
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
TBT_BUCKETS_S = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2,
    5,
    10,
)
USED_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)

COUNTERS = {
    "requests": ("Requests that arrived", ("slo_class",)),
    "finished": (
        "Requests that left; missed: none, ttft, tbt, both, aborted, shed, error",
        ("slo_class", "missed"),
    ),
    "judged": ("Requests with a limit that count towards attainment", ("slo_class",)),
    "attained": ("Of these, requests that were given what they were promised", ("slo_class",)),
    "output_tokens": ("Tokens generated for finished requests", ("slo_class",)),
    "attained_tokens": ("Tokens generated for requests that attained their limits", ("slo_class",)),
    "parked": ("Times a half-prefilled request was set aside", ("slo_class",)),
    "preempted": ("Times a decoding request was taken out", ("slo_class",)),
    "swapped": ("Times KV was moved to host memory", ("slo_class",)),
    "lost": ("Requests that were given up as unable to meet their TTFT limit", ("slo_class",)),
    "recomputed_tokens": ("Tokens prefilled again after a preemption", ("slo_class",)),
    "fallbacks": ("Iterations planned by stock scheduling because ours raised", ()),
    "log_rows_lost": ("Rows of the request log that could not be written", ()),
}
HISTOGRAMS = {
    "ttft_seconds": ("Arrival to first token", TTFT_BUCKETS_S),
    "tbt_p99_seconds": ("99th percentile gap between tokens of a request", TBT_BUCKETS_S),
    "tpot_seconds": ("Mean gap between tokens of a request", TBT_BUCKETS_S),
    "ttft_limit_used": ("TTFT as a share of its limit", USED_BUCKETS),
    "tbt_limit_used": ("TBT as a share of its limit", USED_BUCKETS),
}
GAUGES = {
    "attainment": ("Share of judged requests that attained", ("slo_class", "window")),
    "goodput_rps": ("Attained requests per second", ("slo_class", "window")),
    "goodput_tokens_per_s": ("Output tokens of attained requests per second", ("slo_class", "window")),
    "queue": ("Waiting requests by tightness bucket (0: tightest)", ("bucket",)),
    "running": ("Requests decoding", ()),
    "parked_now": ("Half-prefilled requests set aside", ()),
    "preempted_now": ("Preempted requests waiting to come back", ()),
    "lost_now": ("Waiting requests given up, for now", ()),
    "budget_seconds": ("Time the planned iteration may take (NaN: no limit in force)", ()),
    "chunk_tokens": ("Prefill tokens of the planned iteration", ()),
    "plan_seconds": ("Time the last plan took", ()),
    "kv_tokens": ("Figures of the KV ledger", ("figure",)),
    "ways_out": ("Preemptions so far, by where the KV went (stock: SGLang's retractions)", ("way",)),
    "swap_tokens": (
        "Host KV used and there; crossing: context from which swapping pays (+Inf: never)",
        ("figure",),
    ),
    "latency_model": ("Parameters and drift of the latency model", ("figure",)),
    "headroom_tokens_per_s": ("Prefill tokens a second to spare inside the bucket's limit", ("bucket",)),
    "headroom_kv_tokens": ("KV to spare for the bucket", ("bucket",)),
}


class Metrics:
    """The metrics of one replica. `labels` are SGLang's own (model_name, engine_type, tp_rank, ...)."""

    def __init__(self, labels: Mapping[str, Any], registry: CollectorRegistry | None = None) -> None:
        import prometheus_client as client

        self._labels = {name: str(value) for name, value in labels.items()}
        own, registry = list(self._labels), registry or client.REGISTRY
        self._counters: dict[str, Counter] = {
            name: client.Counter(PREFIX + name, text, [*own, *extra], registry=registry)
            for name, (text, extra) in COUNTERS.items()
        }
        self._histograms: dict[str, Histogram] = {
            name: client.Histogram(
                PREFIX + name, text, [*own, "slo_class"], registry=registry, buckets=buckets
            )
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._gauges: dict[str, Gauge] = {
            name: client.Gauge(
                PREFIX + name, text, [*own, *extra], registry=registry, multiprocess_mode="mostrecent"
            )
            for name, (text, extra) in GAUGES.items()
        }
        self._keys: dict[str, set[str]] = {}
        self.count("fallbacks", 0)
        self.count("log_rows_lost", 0)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters[name].labels(**self._labels, **labels).inc(amount)

    def finished(self, slo_class: str, record: RequestRecord, verdict: Verdict) -> None:
        """Count a request that left."""
        self.count("finished", slo_class=slo_class, missed=verdict.missed or "none")
        judged = verdict.promised and verdict.counted
        attained = judged and verdict.attained
        amounts = {
            "judged": judged,
            "attained": attained,
            "output_tokens": record.output_tokens,
            "attained_tokens": record.output_tokens if attained else 0,
            "parked": record.parked,
            "preempted": record.preempted,
            "swapped": record.swapped,
            "lost": record.lost,
            "recomputed_tokens": record.recomputed_tokens,
        }
        for name, amount in amounts.items():
            self.count(name, amount, slo_class=slo_class)
        for name, value in _durations(record, verdict).items():
            self._histograms[name].labels(**self._labels, slo_class=slo_class).observe(value)

    def windows(self, report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Set the gauges of sliding windows (`Windows.report`); NaN where nothing was judged."""
        for name in ("attainment", "goodput_rps", "goodput_tokens_per_s"):
            values = {
                (slo_class, window): math.nan if figures[name] is None else figures[name]
                for window, classes in report.items()
                for slo_class, figures in classes.items()
                if slo_class != ALL_CLASSES
            }
            for (slo_class, window), value in values.items():
                self._set(name, value, slo_class=slo_class, window=window)

    def gauges(self, gauges: Gauges) -> None:
        """Set the gauges of the scheduler's state; an empty queue is 0, a figure that is gone is NaN."""
        for name, value in {
            "running": gauges.running,
            "parked_now": gauges.parked,
            "preempted_now": gauges.preempted,
            "lost_now": gauges.lost,
            "budget_seconds": math.nan if gauges.budget_s is None else gauges.budget_s,
            "chunk_tokens": gauges.chunk_tokens,
            "plan_seconds": gauges.plan_s,
        }.items():
            self._set(name, value)
        self._mapped("queue", "bucket", gauges.queued, gone=0.0)
        self._mapped("kv_tokens", "figure", gauges.kv)
        self._mapped("ways_out", "way", gauges.ways_out)
        self._mapped("swap_tokens", "figure", gauges.swap)
        self._mapped("latency_model", "figure", gauges.latency)
        spare = gauges.headroom.items()
        self._mapped("headroom_tokens_per_s", "bucket", {bucket: h.tokens_per_s for bucket, h in spare})
        self._mapped("headroom_kv_tokens", "bucket", {bucket: h.kv_tokens for bucket, h in spare})

    def _mapped(self, name: str, label: str, values: Mapping[Any, float], gone: float = math.nan) -> None:
        current = {str(key): float(value) for key, value in values.items()}
        known = self._keys.setdefault(name, set())
        known.update(current)
        for key in known:
            self._set(name, current.get(key, gone), **{label: key})

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].labels(**self._labels, **labels).set(value)


def _durations(record: RequestRecord, verdict: Verdict) -> dict[str, float]:
    values: dict[str, float] = {}
    if verdict.ttft_s is not None:
        values["ttft_seconds"] = verdict.ttft_s
    if record.gaps.count:
        values |= {"tbt_p99_seconds": verdict.tbt_p99_s, "tpot_seconds": verdict.tpot_s}
    if verdict.counted and math.isfinite(record.slo.ttft_s):
        values["ttft_limit_used"] = verdict.ttft_used
    if verdict.counted and math.isfinite(record.slo.tbt_s) and record.gaps.count:
        values["tbt_limit_used"] = verdict.tbt_used
    return values
