"""Writes deploy/grafana/sglang-slo.json: a Grafana dashboard of our metrics, from the table of panels below.

scripts/run.sh -- scripts/dashboard.py            writes it
scripts/run.sh -- scripts/dashboard.py --check    says whether it is out of date; exit status 1 if it is
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "sglang-slo.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
HERE = 'instance=~"$instance"'
OF_CLASS = f'{HERE}, slo_class=~"$slo_class"'
WIDTH, HEIGHT = 8, 8  # of 24 columns


def rate(metric: str, by: str, where: str = OF_CLASS) -> str:
    """What is added to a counter a second."""
    return f"sum by ({by}) (rate(sglang_slo_{metric}{{{where}}}[$__rate_interval]))"


def p99(metric: str) -> str:
    """The 99th percentile of a histogram, by class."""
    buckets = rate(f"{metric}_bucket", "slo_class, le")
    return f"histogram_quantile(0.99, {buckets})"


def now(how: str, metric: str, where: str = HERE) -> str:
    """A gauge over replicas; `how`: an aggregation."""
    return f"{how} (sglang_slo_{metric}{{{where}}})"


BY_CLASS, BY_INSTANCE = "sum by (slo_class)", "max by (instance)"
WITHOUT = HERE + ', limits="without"'
KEPT = rate("attained_requests_total", "slo_class") + " / " + rate("judged_requests_total", "slo_class")
UNLIMITED = f"{rate('http_requests_total', 'endpoint', WITHOUT)} / "
UNLIMITED += rate("http_requests_total", "endpoint", HERE)

# Row of panels, its panels: title, unit, queries with their legends.
Panel = tuple[str, str, dict[str, str]]
ROWS: dict[str, list[Panel]] = {
    "Promises": [
        (
            "Kept, by class",
            "percentunit",
            {KEPT: "{{slo_class}}"},
        ),
        (
            "Misses by reason",
            "reqps",
            {rate("missed_requests_total", "slo_class, reason"): "{{slo_class}} {{reason}}"},
        ),
        (
            "Kept, by every rule, last 5 minutes",
            "percentunit",
            {
                now(
                    "avg by (slo_class, rule)", "attainment_by_rule_ratio", OF_CLASS + ', window="5m"'
                ): "{{slo_class}} {{rule}}"
            },
        ),
    ],
    "Times": [
        (
            "First token, 99th percentile and limit",
            "s",
            {
                p99("ttft_seconds"): "{{slo_class}}",
                now(
                    "max by (slo_class)", "limit_seconds", OF_CLASS + ', limit="ttft"'
                ): "{{slo_class}} limit",
            },
        ),
        (
            "Longest pause of a request, 99th percentile and limit",
            "s",
            {
                p99("longest_pause_seconds"): "{{slo_class}}",
                now("max by (slo_class)", "limit_seconds", OF_CLASS + ', limit="tbt"'): "{{slo_class}} limit",
            },
        ),
        ("Mean time per token, 99th percentile", "s", {p99("tpot_seconds"): "{{slo_class}}"}),
    ],
    "Load": [
        (
            "Arrivals and goodput",
            "reqps",
            {
                rate("requests_total", "slo_class"): "{{slo_class}} arrive",
                rate("attained_requests_total", "slo_class"): "{{slo_class}} kept",
            },
        ),
        (
            "Waiting and running",
            "short",
            {
                now(BY_CLASS, "waiting_requests", OF_CLASS): "{{slo_class}} waiting",
                now("sum", "running_requests"): "running",
                now("sum", "given_up_requests"): "given up for now",
            },
        ),
        ("Longest wait without a token", "s", {now(BY_INSTANCE, "oldest_waiting_seconds"): "{{instance}}"}),
        (
            "Headroom",
            "short",
            {now(BY_CLASS, "headroom_tokens_per_second", OF_CLASS): "{{slo_class}}, prefill tokens/s"},
        ),
        (
            "Without limits, by endpoint",
            "percentunit",
            {UNLIMITED: "{{endpoint}}"},
        ),
        (
            "Preemptions",
            "ops",
            {
                rate("preemptions_total", "mode", HERE): "{{mode}}",
                rate("swap_ins_total", "instance", HERE): "{{instance}} back from the host",
            },
        ),
    ],
    "Engine": [
        (
            "KV cache, tokens",
            "short",
            {
                now("sum", f"kv_{part}_tokens"): part.replace("_", " ")
                for part in ("capacity", "held", "evictable", "forecast_peak")
            },
        ),
        (
            "Latency model: measured over profile",
            "short",
            {
                now(BY_INSTANCE, "latency_drift_ratio"): "{{instance}} drift",
                now(BY_INSTANCE, "latency_margin_extend_ratio"): "{{instance}} margin",
            },
        ),
        (
            "Trouble since the start",
            "short",
            {
                now(BY_INSTANCE, "fallbacks_total"): "{{instance}} planning failed",
                now(BY_INSTANCE, "observer_errors_total"): "{{instance}} figures lost",
                now(BY_INSTANCE, "request_log_rows_lost_total"): "{{instance}} log rows lost",
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, its in ROWS.items():
        panels.append(_placed({"type": "row", "title": row, "panels": []}, len(panels), 0, y, 24, 1))
        y += 1
        for i, panel in enumerate(its):
            x, below = i % 3 * WIDTH, i // 3 * HEIGHT
            panels.append(_placed(_panel(*panel), len(panels), x, y + below, WIDTH, HEIGHT))
        y += -(-len(its) // 3) * HEIGHT
    return {
        "title": "sglang-slo",
        "uid": "sglang-slo",
        "schemaVersion": 39,
        "tags": ["sglang", "slo"],
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def queries() -> list[str]:
    """Every query of every panel."""
    return [query for its in ROWS.values() for _, _, targets in its for query in targets]


def _placed(panel: dict[str, Any], number: int, x: int, y: int, w: int, h: int) -> dict[str, Any]:
    return {"id": number + 1, "gridPos": {"x": x, "y": y, "w": w, "h": h}, **panel}


def _panel(title: str, unit: str, targets: dict[str, str]) -> dict[str, Any]:
    limits = {"min": 0, "max": 1} if unit == "percentunit" else {"min": 0}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, **limits}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for i, (query, legend) in enumerate(targets.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return [source, *(_label(name, series) for name, series in VARIABLES.items())]


VARIABLES = {"instance": "sglang_slo_build_info", "slo_class": "sglang_slo_requests_total"}


def _label(name: str, series: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "label": name.removeprefix("slo_"),
        "datasource": SOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": "A"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if FILE.exists() and FILE.read_text() == text:
        return 0
    if "--check" in argv:
        print(f"{FILE.name} is out of date: run scripts/dashboard.py", file=sys.stderr)
        return 1
    FILE.write_text(text)
    print(f"written: {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
