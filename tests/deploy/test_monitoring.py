"""Prometheus rules, the dashboard and the Dockerfiles, by their own tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import ROOT, run_tool

pytestmark = pytest.mark.deploy

MONITORING = ROOT / "deploy" / "monitoring"
METRIC = re.compile(r"logitstream_\w+")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    dashboard = json.loads((MONITORING / "grafana/dashboards/logitstream.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_promtool_accepts_configuration_and_rules() -> None:
    run_tool("promtool", "check", "config", "prometheus.yaml", cwd=MONITORING)
    run_tool("promtool", "check", "rules", "rules.yaml", cwd=MONITORING)


def test_rules_and_alerts_do_what_their_tests_say() -> None:
    run_tool("promtool", "test", "rules", "rules_test.yaml", cwd=MONITORING)


def test_every_rule_and_alert_is_tested() -> None:
    text = (MONITORING / "rules_test.yaml").read_text()
    for rule in rules():
        if "alert" in rule:
            assert re.search(
                rf"alertname: {rule['alert']}\n\s+eval_time: \w+\n\s+exp_alerts:\n\s+- exp_labels", text
            ), rule
        else:
            assert f"labels: {rule['record']}" in text.replace('"', "").replace("'", ""), rule


def test_generated_files_are_up_to_date() -> None:
    run_tool("python", str(MONITORING / "generate.py"), "--check")


def test_queries_name_metrics_that_are_documented() -> None:
    document = (ROOT / "docs" / "metrics.md").read_text()
    for query in [*dashboard_queries(), *(rule["expr"] for rule in rules())]:
        for name in METRIC.findall(query):
            base = re.sub(r"_(sum|count|bucket)$", "", name)
            assert f"`{name}`" in document or f"`{base}`" in document, f"{name} in {query}"


def test_each_alert_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    alerts = [rule for rule in rules() if "alert" in rule]
    assert sections == [alert["alert"] for alert in alerts]
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"docs/operating.md#{alert['alert'].lower()}"


@pytest.mark.parametrize("dockerfile", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_hadolint_and_checkov_find_nothing_in_a_dockerfile(dockerfile: Path) -> None:
    run_tool("hadolint", str(dockerfile))
    run_tool(
        "checkov", "--skip-download", "--quiet", "--compact", "--framework", "dockerfile", "--file", str(dockerfile)
    )
