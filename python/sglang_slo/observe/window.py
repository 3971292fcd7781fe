"""What happened lately: attainment, goodput and percentiles over sliding windows, per class.

A window is a ring of slots (1 s each in the minute, 5 s in five minutes, a minute in the hour). A running
total is kept by adding what comes and taking away the oldest slot when it leaves, so reading costs the same
however much happened, and memory is bounded by slots, classes and bins, whatever the traffic. Time is an
argument and never runs backwards: an earlier `now_s` counts as the latest seen.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from sglang_slo.observe.judge import RequestRecord, Verdict, to_ms
from sglang_slo.observe.quantiles import Bins, bin_of, quantiles_s

WINDOWS_S = {"1m": (60.0, 1.0), "5m": (300.0, 5.0), "1h": (3600.0, 60.0)}  # name: length, slot
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
LEAST_ELAPSED_S = 1.0  # rates of a server just started are over this much at least
MAX_CLASSES = 64
ALL_CLASSES, OTHER_CLASSES = "(all)", "(other)"


@dataclass(slots=True)
class Tally:
    """Counts of one class over some time. `counts` keys: see `take`, and `arrived`."""

    counts: Counter[str] = field(default_factory=Counter)
    ttft: Bins = field(default_factory=Counter)
    tbt: Bins = field(default_factory=Counter)
    tpot: Bins = field(default_factory=Counter)

    def take(self, record: RequestRecord, verdict: Verdict) -> None:
        """Count one request."""
        self.counts["finished"] += 1
        self.counts["output_tokens"] += record.output_tokens
        self.counts["prompt_tokens"] += record.prompt_tokens
        if verdict.missed:
            self.counts["missed_" + verdict.missed] += 1
        if verdict.promised and verdict.counted:
            self.counts["judged"] += 1
            if verdict.attained:
                self.counts["attained"] += 1
                self.counts["attained_tokens"] += record.output_tokens
        if verdict.ttft_s is not None:
            self.ttft[bin_of(verdict.ttft_s)] += 1
        if record.gaps.count:
            self.tbt[bin_of(verdict.tbt_p99_s)] += 1
            self.tpot[bin_of(verdict.tpot_s)] += 1

    def add(self, other: Tally, sign: int = 1) -> None:
        """Add another tally (or take it away, sign -1); empty counts are dropped."""
        _add(self.counts, other.counts, sign)
        _add(self.ttft, other.ttft, sign)
        _add(self.tbt, other.tbt, sign)
        _add(self.tpot, other.tpot, sign)

    def report(self, elapsed_s: float) -> dict[str, object]:
        """Figures over `elapsed_s`. Attainment is None while nothing with a limit has finished."""
        counts, judged = self.counts, self.counts["judged"]
        return {
            "attainment": counts["attained"] / judged if judged else None,
            "judged": judged,
            "attained": counts["attained"],
            "finished": counts["finished"],
            "arrived": counts["arrived"],
            "missed": {
                k.removeprefix("missed_"): v for k, v in sorted(counts.items()) if k.startswith("missed_")
            },
            "goodput_rps": counts["attained"] / elapsed_s,
            "goodput_tokens_per_s": counts["attained_tokens"] / elapsed_s,
            "throughput_rps": counts["finished"] / elapsed_s,
            "throughput_tokens_per_s": counts["output_tokens"] / elapsed_s,
            "arrival_rps": counts["arrived"] / elapsed_s,
            "ttft_ms": _percentiles(self.ttft),
            "tbt_p99_ms": _percentiles(self.tbt),
            "tpot_ms": _percentiles(self.tpot),
        }


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

    def report(self, now_s: float) -> dict[str, dict[str, object]]:
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

    def arrived(self, slo_class: str, now_s: float) -> None:
        """Count an arrival."""
        self._add(slo_class, Tally(Counter(arrived=1)), now_s)

    def finished(self, record: RequestRecord, verdict: Verdict, now_s: float) -> None:
        """Count a request that left."""
        tally = Tally()
        tally.take(record, verdict)
        self._add(record.slo.slo_class, tally, now_s)

    def report(self, now_s: float) -> dict[str, dict[str, dict[str, object]]]:
        """Window name to class name to figures."""
        return {name: window.report(now_s) for name, window in self._windows.items()}

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
