"""What is deployed beside the server speaks of things that are there: metrics, runbook entries, flags."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_slo.observe import metric_names as names
from sglang_slo.observe.window import WINDOWS_S
from sglang_slo.settings_in import read_yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
SERIES = {
    *(names.PREFIX + name for name in names.GAUGES),
    *(f"{names.PREFIX}{name}_total" for name in names.COUNTERS | names.HTTP_COUNTERS),
    *(f"{names.PREFIX}{name}_bucket" for name in names.HISTOGRAMS),
}
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def queried(text: str) -> set[str]:
    """The series of ours that a query names; those with a colon are the rules' own."""
    return {name for name in re.findall(r"[\w:]*sglang_slo_[\w:]*", text) if ":" not in name}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "sglang-slo.json").read_text())
    return found


def test_the_dashboard_is_what_its_script_writes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "dashboard.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dashboard_alerts_and_autoscaler_ask_for_series_that_exist() -> None:
    targets = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    asked = targets + [rule["expr"] for rule in ALERTS]
    [scaled] = yaml.safe_load_all((DEPLOY / "kubernetes" / "keda.yaml").read_text())
    asked += [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert len(targets) > 20
    for query in asked:
        assert queried(query) <= SERIES, query
        assert set(re.findall(r'window="(\w+)"', query)) <= set(WINDOWS_S)


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_every_alert_has_its_entry_in_the_runbook_and_a_case_in_its_tests() -> None:
    entries = re.findall(r"^#+ (\w+)", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    cases = (DEPLOY / "prometheus" / "alerts.test.yml").read_text()
    for rule in ALERTS:
        if "alert" in rule:
            anchor = rule["annotations"]["runbook"]
            assert anchor == f"docs/runbook.md#{rule['alert'].lower()}" and rule["alert"] in entries
            assert f"runbook: {anchor}" in cases, f"no case in which {rule['alert']} fires"


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
def test_promtool_takes_the_rules_and_passes_their_tests() -> None:
    folder = DEPLOY / "prometheus"
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_manifests_fit_together_and_their_settings_are_read(tmp_path: Path) -> None:
    parts = {
        m["kind"]: m for m in yaml.safe_load_all((DEPLOY / "kubernetes" / "sglang-slo.yaml").read_text())
    }
    assert set(parts) == {"ConfigMap", "Deployment", "Service"}
    (tmp_path / "slo.yaml").write_text(parts["ConfigMap"]["data"]["slo.yaml"])
    assert read_yaml(tmp_path / "slo.yaml")["classes"]
    pod = parts["Deployment"]["spec"]["template"]
    assert parts["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    [server] = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == volumes
    assert "--enable-metrics" in server["args"]
