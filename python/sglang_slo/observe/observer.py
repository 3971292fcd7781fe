"""The scheduler's one contact with everything that reports: windows, metrics, request log, counts of trouble.

The scheduler tells it of arrivals, finished requests and fallbacks; it judges, counts and answers
`snapshot`. Nothing in here influences a decision, and nothing in here can stop serving: what raises is
counted and logged once a minute. Only rank 0 of a replica counts; the other ranks judge and forget.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sglang_slo import __version__, clock
from sglang_slo.config import SloConfig
from sglang_slo.core.slo import Slo
from sglang_slo.observe.gauges import Gauges
from sglang_slo.observe.judge import RequestRecord, Verdict, judge, shed_reason
from sglang_slo.observe.metrics import Metrics
from sglang_slo.observe.request_log import RequestLog, replica_path
from sglang_slo.observe.throttle import Throttle
from sglang_slo.observe.window import Windows

logger = logging.getLogger(__name__)

REFRESH_S = 1.0  # gauges reach Prometheus this often

P = ParamSpec("P")
R = TypeVar("R")
Method = Callable[Concatenate["Observer", P], R]


def _harmless(method: Method[P, R]) -> Method[P, R | None]:
    """A method that reports what it raises instead of raising it, and then returns None."""

    @functools.wraps(method)
    def wrapped(self: Observer, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.trouble.happened(f"observing failed in {method.__name__}", clock.now(), error)
            return None

    return wrapped  # type: ignore[return-value]  # functools.wraps forgets that it is a method


class Observer:
    """Counts what became of the requests of one replica.

    `rank0`: whether this process reports. `metric_labels`: labels of SGLang's scheduler metrics, None when
    metrics are off. `dp_rank`: data-parallel rank, None when there is one replica only.
    """

    def __init__(
        self,
        config: SloConfig,
        rank0: bool = True,
        metric_labels: Mapping[str, Any] | None = None,
        dp_rank: int | None = None,
        start_s: float | None = None,
    ) -> None:
        self._config, self._rank0, self._dp_rank = config, rank0, dp_rank
        self._start_s = clock.now() if start_s is None else start_s
        self._refreshed_s = self._start_s - REFRESH_S
        self._windows = Windows(self._start_s)
        self._totals: Counter[str] = Counter()
        self.last_fallback: str | None = None
        self.trouble = Throttle(logger)
        self.fallbacks = Throttle(logger)
        self._metrics: Metrics | None = None
        self._log: RequestLog | None = None
        if rank0 and metric_labels is not None:
            self._start_metrics(metric_labels)
        if rank0 and config.request_log:
            path = replica_path(Path(config.request_log).expanduser(), dp_rank)
            self._log = RequestLog(path, int(config.request_log_mb * 2**20))

    @_harmless
    def _start_metrics(self, labels: Mapping[str, Any]) -> None:
        self._metrics = Metrics(labels, self._config)

    @_harmless
    def arrived(self, slo: Slo, now_s: float) -> None:
        """A request has reached the scheduler."""
        if not self._rank0:
            return
        self._totals["arrived"] += 1
        self._totals["without_limits"] += slo.best_effort
        self._windows.arrived(slo, now_s)
        if self._metrics:
            self._metrics.arrived(self._windows.class_label(slo.slo_class), slo)

    @_harmless
    def finished(self, record: RequestRecord, now_s: float) -> Verdict:
        """A request has left, for whatever reason (`record.finish`). None only if judging raised."""
        verdict = judge(record)
        if self._rank0:
            self._count(record, verdict, now_s)
        return verdict

    def _count(self, record: RequestRecord, verdict: Verdict, now_s: float) -> None:
        totals = self._totals
        totals["finished"] += 1
        totals["judged"] += verdict.judged
        totals["attained"] += verdict.judged and verdict.attained
        if verdict.judged:
            totals.update("missed_" + reason for reason in verdict.reasons)
        if record.finish == "abort" and not verdict.counted:
            totals["left_in_time"] += 1
        if record.finish == "rejected":
            totals["rejected"] += 1
        if record.finish == "shed":
            totals["shed_" + shed_reason(record.message)] += 1
        totals["parked"] += record.parked
        totals["preempted"] += record.preempted
        totals["swapped"] += record.swapped
        totals["unattainable"] += record.unattainable
        totals["prompt_tokens"] += record.prompt_tokens
        totals["cached_tokens"] += record.cached_tokens
        totals["output_tokens"] += record.output_tokens
        totals["recomputed_tokens"] += record.recomputed_tokens
        self._windows.finished(record, verdict, now_s)
        if self._metrics:
            self._metrics.finished(self._windows.class_label(record.slo.slo_class), record, verdict)
        if self._log:
            if not self._config.request_log_text:
                record.text = None
            self._log.write(record, verdict, now_s)

    @_harmless
    def fallback(self, error: BaseException, now_s: float) -> None:
        """Planning raised and stock scheduling took the iteration."""
        self.last_fallback = f"{type(error).__name__}: {error}"
        self.fallbacks.happened("planning failed, stock scheduling took the iteration", now_s, error)
        if self._rank0 and self._metrics:
            self._metrics.count("fallbacks")

    @_harmless
    def refresh(self, now_s: float, gauges: Callable[[], Gauges]) -> None:
        """Bring Prometheus' gauges up to date, at most once a second; cheap to call on every iteration."""
        if self._metrics is None or now_s - self._refreshed_s < REFRESH_S:
            return
        self._refreshed_s = now_s
        self._metrics.gauges(gauges())
        self._metrics.windows(self._windows.report(now_s))
        self._metrics.count_to("observer_errors", self.trouble.count)
        self._metrics.count_to("request_log_rows_lost", self._log.lost_rows if self._log else 0)

    def lately(self, now_s: float) -> dict[str, dict[str, Any]]:
        """Class name to figures of the last minute (`Tally.report`)."""
        return self._windows.lately(now_s)

    def snapshot(self, now_s: float, gauges: Callable[[], Gauges] | None = None) -> dict[str, Any]:
        """Everything known, as JSON values with text keys (`/slo/status`, one per replica). Never raises."""
        return self._snapshot(now_s, gauges) or {
            "policy": self._config.policy,
            "error": "see the server's log",
        }

    @_harmless
    def _snapshot(self, now_s: float, gauges: Callable[[], Gauges] | None) -> dict[str, Any]:
        return {
            "policy": self._config.policy,
            "version": __version__,
            "dp_rank": self._dp_rank or 0,
            "uptime_s": round(now_s - self._start_s, 3),
            "windows": self._windows.report(now_s),
            "totals": {name: count for name, count in sorted(self._totals.items()) if count},
            "now": None if gauges is None else gauges().plain(),
            "fallbacks": {"count": self.fallbacks.count, "last": self.last_fallback},
            "observer_errors": self.trouble.count,
            "request_log_rows_lost": self._log.lost_rows if self._log else 0,
        }

    def close(self) -> None:
        """Write what is left of the request log."""
        if self._log:
            self._log.close()
