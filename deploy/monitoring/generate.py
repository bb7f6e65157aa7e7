"""Writes the Grafana dashboard and the Kubernetes PrometheusRule; `--check` fails where a committed file differs.

The dashboard is built with Grafana's foundation SDK, so its JSON follows Grafana's own schema.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

HERE = Path(__file__).parent
DASHBOARD = HERE / "grafana" / "dashboards" / "logitstream.json"
PROMETHEUS_RULE = HERE / "kubernetes" / "prometheus-rule.yaml"
PANEL_WIDTH, PANEL_HEIGHT = 8, 7  # of a grid 24 wide

# Row -> panels of (title, unit, [(query, legend), ...]).
ROWS = {
    "Students": [
        ("Tokens trained on", "suffix: tokens/s", [("logitstream:student_tokens:rate1m", "all students"),
                                           ("rate(logitstream_student_tokens_total[1m])", "{{instance}}")]),
        ("Overhead against cross-entropy", "percentunit", [
            ("logitstream:student_overhead_vs_cross_entropy:ratio", "{{part}}")]),
        ("Where a step's time goes", "suffix: s/s", [
            ("rate(logitstream_student_waiting_seconds_total[1m])", "waiting {{instance}}"),
            ("rate(logitstream_student_decoding_seconds_total[1m])", "decoding {{instance}}"),
            ("rate(logitstream_student_computing_seconds_total[1m])", "computing {{instance}}")]),
        ("Loss", "suffix: nats/token", [('logitstream_student_loss_nats', "{{instance}}")]),
        ("Time spent waiting for targets", "percentunit", [("logitstream:student_waiting:ratio1m", "all students")]),
        ("Batches ready", "suffix: batches", [("logitstream_student_queue_batches", "{{instance}}")]),
        ("In flight and allowed", "suffix: tokens", [
            ("logitstream_student_in_flight_tokens", "in flight {{instance}}"),
            ("logitstream_student_credit_tokens", "allowed {{instance}}")]),
        ("Size of targets", "suffix: per token", [
            ("logitstream:student_target_bytes_per_token:mean1m", "bytes"),
            ("logitstream:student_target_entries_per_token:mean1m", "entries")]),
        ("Sent again, and versions behind", "", [
            ("sum by (reason) (increase(logitstream_student_retries_total[5m]))", "{{reason}} in 5 min"),
            ("max(logitstream_student_teacher_lag_versions)", "versions behind")]),
    ],
    "Teachers": [
        ("Tokens scored", "suffix: tokens/s", [("logitstream:teacher_tokens:rate1m", "all teachers"),
                                       ("rate(logitstream_teacher_tokens_total[1m])", "{{instance}}")]),
        ("Batch fill and padding", "percentunit", [
            ("logitstream:teacher_batch_fill:mean1m", "fill"), ("logitstream:teacher_padding:ratio1m", "padding")]),
        ("Seconds of a batch", "s", [("logitstream:teacher_stage_seconds:mean1m", "{{stage}}")]),
        ("Waiting to be scored", "suffix: tokens", [("logitstream_teacher_queue_tokens", "{{instance}}")]),
        ("Oldest request", "s", [("logitstream_teacher_queue_age_seconds", "{{instance}}")]),
        ("Open streams, replicas up", "", [("logitstream_teacher_clients", "streams {{instance}}"),
                                           ('sum(up{job="teacher"})', "replicas up")]),
        ("Refused", "suffix: requests/s", [
            ("sum by (reason) (rate(logitstream_teacher_rejects_total[1m]))", "{{reason}}"),
            ("sum(rate(logitstream_teacher_unauthenticated_total[1m]))", "no known token")]),
        ("Payload sent", "Bps", [("rate(logitstream_teacher_payload_bytes_total[1m])", "{{instance}}")]),
        ("Weights' version", "", [("logitstream_teacher_version", "{{instance}}")]),
    ],
    "Cache": [
        ("Hits", "percentunit", [("logitstream:cache_hit:ratio1m", "all")]),
        ("Size on disk", "bytes", [('logitstream_cache_bytes', "{{instance}}")]),
        ("Corrupt records, failed writes, hung disks", "", [
            ("sum(increase(logitstream_cache_corrupt_total[5m]))", "corrupt in 5 min"),
            ("sum(increase(logitstream_cache_write_errors_total[5m]))", "failed writes in 5 min"),
            ("sum(increase(logitstream_cache_hangs_total[5m]))", "disk hung in 5 min")]),
    ],
}  # fmt: skip


def dashboard_json() -> str:
    board = (
        Dashboard("logitstream")
        .uid("logitstream")
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    ids = count(1)
    for title, panels in ROWS.items():
        board = board.with_row(Row(title).id(next(ids)))
        for panel_title, unit, queries in panels:
            board = board.with_panel(_panel(panel_title, unit, queries).id(next(ids)))
    return json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(title: str, unit: str, queries: list[tuple[str, str]]) -> Panel:
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    panel = Panel().title(title).unit(unit).datasource(source).span(PANEL_WIDTH).height(PANEL_HEIGHT)
    for letter, (query, legend) in zip("ABCD", queries, strict=False):
        panel = panel.with_target(Dataquery().expr(query).legend_format(legend).ref_id(letter).datasource(source))
    return panel


def prometheus_rule_yaml() -> str:
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "logitstream"},
        "spec": yaml.safe_load((HERE / "rules.yaml").read_text(encoding="utf-8")),
    }
    head = "# Generated from deploy/monitoring/rules.yaml by deploy/monitoring/generate.py (`make deploy-files`).\n"
    return head + yaml.safe_dump(rule, sort_keys=False, width=120)


def main() -> int:
    stale = False
    for path, content in ((DASHBOARD, dashboard_json()), (PROMETHEUS_RULE, prometheus_rule_yaml())):
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != content:
                print(f"{path} differs from what generate.py makes: run `make deploy-files`", file=sys.stderr)
                stale = True
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
