"""Prometheus metrics `sglang_slo_*`, beside SGLang's own on the same `/metrics`, with the same labels.

SGLang runs the Prometheus client in multiprocess mode: values live in files of a folder that is named in the
environment before the client is first imported. Hence the import inside, in the scheduler process, never at
module level. One process of each replica reports (rank 0); its labels tell replicas apart.

Names follow Prometheus' conventions: base units, `_total` for what only grows, one meaning a metric. Labels come
from small fixed sets; classes are those the server declares (`Windows.class_label` pools what is beyond its cap).
A gauge whose subject is gone, such as the attainment of a class without traffic, is not shown: it is set to NaN,
which the multiprocess client cannot forget but `hide_gone` leaves out of every scrape.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_slo import __version__
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import GapRule, Slo
from sglang_slo.observe import metric_names as names
from sglang_slo.observe.gauges import Gauges
from sglang_slo.observe.judge import RequestRecord, Verdict, limits_of, shed_reason
from sglang_slo.observe.metric_names import PREFIX
from sglang_slo.observe.window import ALL_CLASSES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """The metrics of one replica. `labels` are SGLang's own (model_name, engine_type, tp_rank, ...)."""

    def __init__(
        self, labels: Mapping[str, Any], config: SloConfig, registry: CollectorRegistry | None = None
    ) -> None:
        import prometheus_client as client

        self._labels = {name: str(value) for name, value in labels.items()}
        own, registry = list(self._labels), registry or client.REGISTRY
        self._counters: dict[str, Counter] = {
            name: client.Counter(PREFIX + name, text, [*own, *extra], registry=registry)
            for name, (text, extra) in names.COUNTERS.items()
        }
        self._histograms: dict[str, Histogram] = {
            name: client.Histogram(
                PREFIX + name, text, [*own, "slo_class"], registry=registry, buckets=buckets
            )
            for name, (text, buckets) in names.HISTOGRAMS.items()
        }
        self._gauges: dict[str, Gauge] = {
            name: client.Gauge(
                PREFIX + name, text, [*own, *extra], registry=registry, multiprocess_mode="mostrecent"
            )
            for name, (text, extra) in names.GAUGES.items()
        }
        self._shown: dict[str, set[Labels]] = {}
        self._counted: dict[tuple[str, Labels], float] = {}
        for name, (_, extra) in names.COUNTERS.items():
            if not extra:
                self.count(name, 0)
        self._constants(config)

    def _constants(self, config: SloConfig) -> None:
        self._show("build_info", {(("policy", config.policy), ("version", __version__)): 1})
        self._show(
            "limit_seconds",
            {
                (("limit", limit), ("slo_class", name)): limit_s
                for name, declared in config.classes.items()
                for limit, limit_s in limits_of(declared.slo(name)).items()
                if math.isfinite(limit_s)
            },
        )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters[name].labels(**self._labels, **labels).inc(amount)

    def count_to(self, name: str, total: float, **labels: str) -> None:
        """Bring a counter up to a total that is kept elsewhere; one that fell is taken for unchanged."""
        key = (name, tuple(sorted(labels.items())))
        before = self._counted.get(key, 0.0)
        if total > before or key not in self._counted:
            self.count(name, max(total - before, 0.0), **labels)
            self._counted[key] = max(total, before)

    def arrived(self, slo_class: str, slo: Slo) -> None:
        """Count an arrival."""
        self.count("requests", slo_class=slo_class)
        self.count("requests_without_limits", int(slo.best_effort), slo_class=slo_class)

    def finished(self, slo_class: str, record: RequestRecord, verdict: Verdict) -> None:
        """Count a request that left."""
        self.count("finished_requests", slo_class=slo_class, finish=record.finish)
        attained = verdict.judged and verdict.attained
        amounts = {
            "judged_requests": verdict.judged,
            "attained_requests": attained,
            "unattainable_requests": record.unattainable,
            "output_tokens": record.output_tokens,
            "attained_output_tokens": record.output_tokens if attained else 0,
            "parks": record.parked,
            "recomputed_tokens": record.recomputed_tokens,
        }
        for name, amount in amounts.items():
            self.count(name, amount, slo_class=slo_class)
        if verdict.judged:
            for rule, kept in verdict.by_rule.items():
                self.count("attained_by_rule_requests", kept, slo_class=slo_class, rule=rule)
            for reason in verdict.reasons:
                self.count("missed_requests", slo_class=slo_class, reason=reason)
        if record.finish == "shed":
            self.count("shed_requests", slo_class=slo_class, reason=shed_reason(record.message))
        for name, value in _durations(record, verdict).items():
            self._histograms[name].labels(**self._labels, slo_class=slo_class).observe(value)

    def windows(self, report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Set the gauges of sliding windows (`Windows.report`); a class without traffic has none."""
        rows = [
            (figures, (("slo_class", slo_class), ("window", window)))
            for window, classes in report.items()
            for slo_class, figures in classes.items()
            if slo_class != ALL_CLASSES
        ]
        for name, figure in names.WINDOW_GAUGES.items():
            self._show(name, {labels: _picked(figures, figure) for figures, labels in rows})
        by_rule = {
            tuple(sorted((*labels, ("rule", rule)))): share
            for figures, labels in rows
            for rule, share in figures["attainment_by_rule"].items()
        }
        self._show("attainment_by_rule_ratio", by_rule)

    def gauges(self, gauges: Gauges) -> None:
        """Set the gauges of the scheduler's state."""
        single = {
            "oldest_waiting_seconds": gauges.oldest_waiting_s,
            "running_requests": gauges.running,
            "parked_requests": gauges.parked,
            "preempted_requests": gauges.preempted,
            "given_up_requests": gauges.given_up,
            "budget_seconds": gauges.budget_s,
            "planned_prefill_tokens": gauges.chunk_tokens,
            "plan_seconds": gauges.plan_s,
            **_named(names.KV, gauges.kv),
            **_named(names.SWAP, gauges.swap),
            **_named(names.LATENCY, gauges.latency),
            **_named(names.LENGTHS, gauges.lengths),
        }
        for name, value in single.items():
            self._show(name, {(): value})
        coefficients = {k: v for k, v in gauges.latency.items() if k not in names.NO_COEFFICIENT}
        self._show("latency_coefficient_seconds", {(("coefficient", k),): v for k, v in coefficients.items()})
        self._show("waiting_requests", {(("slo_class", c),): n for c, n in gauges.queued.items()})
        spare = gauges.headroom.items()
        self._show("headroom_tokens_per_second", {(("slo_class", c),): h.tokens_per_s for c, h in spare})
        self._show("headroom_kv_tokens", {(("slo_class", c),): h.kv_tokens for c, h in spare})
        for mode, number in gauges.preemptions.items():
            self.count_to("preemptions", number, mode=mode)
        self.count_to("swap_ins", gauges.swap_ins)
        self.count_to("failed_copies", gauges.swap.get("failed_copies", 0))
        self.count_to("latency_refits", gauges.latency.get("refits", 0))
        for key, name in names.LENGTH_COUNTERS.items():
            self.count_to(name, float(gauges.lengths.get(key, 0)))

    def _show(self, name: str, values: Mapping[Labels, float | None]) -> None:
        """Set a gauge for these labels, and for no others any more; None: there is no figure."""
        current = {labels: float(v) for labels, v in values.items() if v is not None and not math.isnan(v)}
        shown = self._shown.setdefault(name, set())
        gauge = self._gauges[name]
        for labels, value in current.items():
            gauge.labels(**self._labels, **dict(labels)).set(value)
        for labels in shown - current.keys():
            gauge.labels(**self._labels, **dict(labels)).set(math.nan)
            self._remove(gauge, dict(labels))
        self._shown[name] = set(current)

    def _remove(self, gauge: Gauge, labels: dict[str, str]) -> None:
        everything = {**self._labels, **labels}
        if not everything:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in multiprocess mode the value stays, as NaN; see `hide_gone`
            gauge.remove(*(everything[name] for name in gauge._labelnames))


def _named(table: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: values.get(key) for key, name in table.items()}


def _picked(figures: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """A figure of a report; milliseconds become seconds."""
    value: Any = figures
    for key in path:
        value = value[key]
    figure: float | None = value
    return figure / 1e3 if figure is not None and path[0].endswith("_ms") else figure


def _durations(record: RequestRecord, verdict: Verdict) -> dict[str, float]:
    values: dict[str, float] = {}
    figures = verdict.figures
    if verdict.ttft_s is not None:
        values |= {"ttft_seconds": verdict.ttft_s, "e2e_seconds": figures.e2e_s}
    if record.out.gaps:
        values |= {"longest_pause_seconds": figures.max_gap_s, "tbt_p99_seconds": figures.p99_gap_s}
        values["tpot_seconds"] = figures.tpot_s
    if verdict.counted and math.isfinite(record.slo.ttft_s):
        values["ttft_limit_used_ratio"] = verdict.ttft_used
    gap_limit = math.isfinite(record.slo.tbt_s) and record.slo.gap_rule is not GapRule.PACE
    if verdict.counted and gap_limit and record.out.gaps:
        values["tbt_limit_used_ratio"] = verdict.gap_used
    return values


def hide_gone() -> None:
    """In this process, leave our gauges that are NaN, whose subject is gone, out of every scrape. Idempotent."""
    from prometheus_client.multiprocess import MultiProcessCollector

    original: Any = MultiProcessCollector.collect
    if getattr(original, "hides_gone", False):
        return

    def collect(self: Any) -> Any:
        for metric in original(self):
            if metric.name.startswith(PREFIX):
                metric.samples = [sample for sample in metric.samples if not math.isnan(sample.value)]
            if metric.samples:
                yield metric

    collect.hides_gone = True  # type: ignore[attr-defined]
    MultiProcessCollector.collect = collect  # type: ignore[method-assign]
