"""docs/metrics.md against what the two sides export."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from logitstream import metrics
from logitstream.errors import REQUEST_ERRORS

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \| (?P<unit>[\w ]+) \| (?P<labels>[^|]*) \| (?P<meaning>[^|]+) \|$"
)
LABELLED = {
    metrics.STUDENT_OVERHEAD: "total",
    metrics.CACHE_DISK_FREE: "/cache",
}
"""Metrics with labels that export nothing until a label has a value."""


def documented() -> dict[str, tuple[str, str, str]]:
    """Name -> type, labels, meaning."""
    rows = [ROW.match(line) for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert all(rows), "a row of docs/metrics.md does not read as name, type, unit, labels, meaning"
    found = [row for row in rows if row]
    table = {
        row["name"]: (row["type"], ", ".join(sorted(re.findall(r"`(\w+)`", row["labels"]))), row["meaning"])
        for row in found
    }
    assert len(table) == len(found), "a metric is documented twice"
    return table


def exported(side: str) -> dict[str, tuple[str, str, str]]:
    """Return the scrape of one side, without process metrics and creation times."""
    for metric, value in LABELLED.items():
        metric.labels(value)
    port = metrics.serve(0, side=side, address="127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("logitstream_") and not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, ", ".join(sorted(labels)), family.documentation)
    return found


@pytest.mark.parametrize(("side", "other"), [("teacher", "student"), ("student", "teacher")])
def test_a_scrape_shows_the_documented_metrics_and_no_others(side: str, other: str) -> None:
    expected = {name: row for name, row in documented().items() if not name.startswith(f"logitstream_{other}_")}
    assert exported(side) == expected


def test_names_end_in_their_unit() -> None:
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        row = ROW.match(line)
        if row and row["unit"] in ("seconds", "bytes", "ratio"):
            assert row["name"].removesuffix("_total").endswith(f"_{row['unit']}")


def test_refusals_and_stages_are_exported_before_the_first_one() -> None:
    for reason in REQUEST_ERRORS:
        assert REGISTRY.get_sample_value("logitstream_teacher_rejects_total", {"reason": reason}) is not None
    for stage in metrics.STAGES:
        assert REGISTRY.get_sample_value("logitstream_teacher_stage_seconds_count", {"stage": stage}) is not None
