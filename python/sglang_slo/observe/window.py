"""What happened lately: attainment, goodput, misses and percentiles over sliding windows, per class.

Attainment is by what each request declared; beside it stand every rule's reading and the longest pause.

A window is a ring of slots (1 s each in the minute, 5 s in five minutes, a minute in the hour). A running
total is kept by adding what comes and taking away the oldest slot when it leaves, so reading costs the same
however much happened, and memory is bounded by slots, classes and bins, whatever the traffic. Time is an
argument and never runs backwards: an earlier `now_s` counts as the latest seen.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from sglang_slo.core.attainment import REASONS, RULES
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import RequestRecord, Verdict, to_ms
from sglang_slo.observe.quantiles import Bins, bin_of, quantiles_s

WINDOWS_S = {"1m": (60.0, 1.0), "5m": (300.0, 5.0), "1h": (3600.0, 60.0)}  # name: length, slot
PREFILLED, JUDGED, ATTAINED = "prefill_tokens", "judged", "attained"
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
LEAST_ELAPSED_S = 1.0  # rates of a server just started are over this much at least
MAX_CLASSES = 64
ALL_CLASSES, OTHER_CLASSES = "(all)", "(other)"


@dataclass(slots=True)
class Tally:
    """Counts of one class over some time. `counts` keys: see `take` and `arrival`."""

    counts: Counter[str] = field(default_factory=Counter)
    ttft: Bins = field(default_factory=Counter)
    pause: Bins = field(default_factory=Counter)  # longest gap of each request
    tail: Bins = field(default_factory=Counter)  # 99th percentile gap of each request
    tpot: Bins = field(default_factory=Counter)
    e2e: Bins = field(default_factory=Counter)

    def take(self, record: RequestRecord, verdict: Verdict) -> None:
        """Count one request."""
        counts, figures = self.counts, verdict.figures
        counts["finished"] += 1
        counts["output_tokens"] += record.output_tokens
        counts["prompt_tokens"] += record.prompt_tokens
        computed = record.prompt_tokens - record.cached_tokens + record.recomputed_tokens
        counts[PREFILLED] += max(computed, 0)
        if verdict.judged:
            counts[JUDGED] += 1
            counts.update("missed_" + reason for reason in verdict.reasons)
            counts.update("kept_" + rule for rule, kept in verdict.by_rule.items() if kept)
            if verdict.attained:
                counts[ATTAINED] += 1
                counts["attained_tokens"] += record.output_tokens
        if verdict.ttft_s is not None:
            self.ttft[bin_of(verdict.ttft_s)] += 1
            self.e2e[bin_of(figures.e2e_s)] += 1
        if record.out.gaps:
            self.pause[bin_of(figures.max_gap_s)] += 1
            self.tail[bin_of(figures.p99_gap_s)] += 1
            self.tpot[bin_of(figures.tpot_s)] += 1

    def add(self, other: Tally, sign: int = 1) -> None:
        """Add another tally (or take it away, sign -1); empty counts are dropped."""
        for name in self.__slots__:
            _add(getattr(self, name), getattr(other, name), sign)

    def report(self, elapsed_s: float) -> dict[str, Any]:
        """Figures over `elapsed_s`. Attainment is None while nothing with a limit has finished."""
        counts, judged = self.counts, self.counts[JUDGED]
        by_rule = {rule: counts["kept_" + rule] / judged if judged else None for rule in RULES}
        return {
            "attainment": counts[ATTAINED] / judged if judged else None,
            "attainment_by_rule": by_rule,
            "longest_pause_ms": {**_percentiles(self.pause), "max": to_ms(quantiles_s(self.pause, [1.0])[0])},
            "judged": judged,
            "attained": counts[ATTAINED],
            "attained_by_rule": {rule: counts["kept_" + rule] for rule in RULES},
            "misses": {reason: counts["missed_" + reason] for reason in REASONS},
            "finished": counts["finished"],
            "arrived": counts["arrived"],
            "without_limits": counts["without_limits"],
            "goodput_rps": counts[ATTAINED] / elapsed_s,
            "goodput_tokens_per_s": counts["attained_tokens"] / elapsed_s,
            "throughput_rps": counts["finished"] / elapsed_s,
            "throughput_tokens_per_s": counts["output_tokens"] / elapsed_s,
            "prefill_tokens_per_s": counts[PREFILLED] / elapsed_s,
            "arrival_rps": counts["arrived"] / elapsed_s,
            "ttft_ms": _percentiles(self.ttft),
            "tbt_p99_ms": _percentiles(self.tail),
            "tpot_ms": _percentiles(self.tpot),
            "e2e_ms": _percentiles(self.e2e),
        }


def arrival(slo: Slo) -> Tally:
    """One request that arrived."""
    return Tally(Counter(arrived=1, without_limits=int(slo.best_effort)))


class SlidingWindow:
    """Tallies per class of the last `length_s`, to within one slot of `slot_s`."""

    def __init__(self, length_s: float, slot_s: float, start_s: float) -> None:
        self._length, self._slot_s = round(length_s / slot_s), slot_s
        self._start_s = self._now_s = start_s
        self._slots: deque[tuple[int, dict[str, Tally]]] = deque()
        self._total: dict[str, Tally] = {}

    def add(self, slo_class: str, tally: Tally, now_s: float) -> None:
        """Count what happened at `now_s`."""
        self._advance(now_s)
        index = int(self._now_s // self._slot_s)
        if not self._slots or self._slots[-1][0] != index:
            self._slots.append((index, {}))
        for tallies in (self._slots[-1][1], self._total):
            tallies.setdefault(slo_class, Tally()).add(tally)

    def report(self, now_s: float) -> dict[str, dict[str, Any]]:
        """Figures per class, and of all classes together under `ALL_CLASSES`."""
        self._advance(now_s)
        elapsed_s = min(max(self._now_s - self._start_s, LEAST_ELAPSED_S), self._length * self._slot_s)
        everyone = Tally()
        for tally in self._total.values():
            everyone.add(tally)
        named = {ALL_CLASSES: everyone, **dict(sorted(self._total.items()))}
        return {name: tally.report(elapsed_s) for name, tally in named.items()}

    def _advance(self, now_s: float) -> None:
        self._now_s = max(now_s, self._now_s)
        oldest = int(self._now_s // self._slot_s) - self._length + 1
        while self._slots and self._slots[0][0] < oldest:
            for name, tally in self._slots.popleft()[1].items():
                self._total[name].add(tally, sign=-1)
                if not self._total[name].counts:
                    del self._total[name]


class Windows:
    """All windows of `WINDOWS_S`."""

    def __init__(self, start_s: float) -> None:
        self._windows = {name: SlidingWindow(*size, start_s) for name, size in WINDOWS_S.items()}
        self._classes: set[str] = set()

    def arrived(self, slo: Slo, now_s: float) -> None:
        """Count an arrival."""
        self._add(slo.slo_class, arrival(slo), now_s)

    def finished(self, record: RequestRecord, verdict: Verdict, now_s: float) -> None:
        """Count a request that left."""
        tally = Tally()
        tally.take(record, verdict)
        self._add(record.slo.slo_class, tally, now_s)

    def report(self, now_s: float) -> dict[str, dict[str, dict[str, Any]]]:
        """Window name to class name to figures."""
        return {name: window.report(now_s) for name, window in self._windows.items()}

    def lately(self, now_s: float) -> dict[str, dict[str, Any]]:
        """Class name to figures of the shortest window."""
        return next(iter(self._windows.values())).report(now_s)

    def _add(self, slo_class: str, tally: Tally, now_s: float) -> None:
        name = self.class_label(slo_class)
        for window in self._windows.values():
            window.add(name, tally, now_s)

    def class_label(self, slo_class: str) -> str:
        """The name a class is reported under: its own, or `OTHER_CLASSES` past `MAX_CLASSES` of them."""
        if slo_class not in self._classes and len(self._classes) >= MAX_CLASSES:
            return OTHER_CLASSES
        self._classes.add(slo_class)
        return slo_class


def _percentiles(bins: Bins) -> dict[str, float | None]:
    return {
        n: to_ms(v) for n, v in zip(PERCENTILES, quantiles_s(bins, list(PERCENTILES.values())), strict=True)
    }


def _add(mine: Counter[Any], theirs: Counter[Any], sign: int) -> None:
    for key, value in theirs.items():
        mine[key] += sign * value
        if not mine[key]:
            del mine[key]
