"""The compose cluster as a user starts it, on the real teacher: trained through a killed and two restarted replicas,
scraped, stopped, and trained again out of its cache volume. `make test-compose` runs it, in about ten minutes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose.cluster import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

NUM_SEQUENCES, SEQUENCE_TOKENS, SEQUENCES_PER_STEP, EPOCHS = 416, 128, 8, 2
NUM_STEPS = EPOCHS * NUM_SEQUENCES // SEQUENCES_PER_STEP
ONLINE_STEPS = NUM_SEQUENCES // SEQUENCES_PER_STEP
STOP_SECONDS = 45
STUDENTS = ("student-0", "student-1")
OVERHEAD = 'logitstream_student_overhead_vs_cross_entropy_ratio{part="total"}'
REFUSED_CALLS = """
import grpc
from logitstream.rpc.v1 import teacher_pb2, teacher_pb2_grpc
tls = grpc.ssl_channel_credentials(open("/secrets/ca.crt", "rb").read())
for channel in (grpc.insecure_channel("teacher:50051"), grpc.secure_channel("teacher:50051", tls)):
    try:
        teacher_pb2_grpc.TeacherServiceStub(channel).Describe(teacher_pb2.DescribeRequest(), timeout=20)
    except grpc.RpcError as error:
        print(error.code().name)
"""


@dataclass
class Run:
    """The records of the cluster's two runs."""

    cluster: Cluster
    started: float
    steps_at: dict[str, int]
    refused_calls: list[str]
    certificate_expiry: list[float]
    online: dict[str, Any]
    online_progress: list[dict[str, Any]]
    online_states: list[dict[str, Any]]
    teacher_states: list[dict[str, Any]]
    series: dict[str, list[float]]
    shown_overhead: float
    replayed: dict[str, Any]
    replayed_states: list[dict[str, Any]]


@pytest.fixture(scope="module")
def cluster(docker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("compose")
    cluster = Cluster([ROOT / "docker/compose.yaml", _smaller(folder)], docker_environment)
    cluster.compose("down", "--volumes", "--remove-orphans")
    try:
        yield cluster
    finally:
        cluster.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


def _smaller(folder: Path) -> Path:
    """A compose file that gives the students fewer sequences and lets Prometheus look more often."""
    settings = yaml.safe_load((ROOT / "docker/student.yaml").read_text())
    settings["data"]["max_sequences"] = NUM_SEQUENCES
    settings["training"]["num_train_epochs"] = EPOCHS
    settings["loss"]["overhead_every"] = 4
    assert settings["data"]["sequence_tokens"] == SEQUENCE_TOKENS
    assert settings["training"]["per_device_train_batch_size"] * len(STUDENTS) == SEQUENCES_PER_STEP
    (folder / "student.yaml").write_text(yaml.safe_dump(settings))
    prometheus = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yaml").read_text())
    prometheus["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(prometheus))
    override = folder / "compose.test.yaml"
    files = {name: {"file": str(folder / name)} for name in ("student.yaml", "prometheus.yaml")}
    override.write_text(yaml.safe_dump({"configs": files}))
    return override


@pytest.fixture(scope="module")
def run(cluster: Cluster) -> Run:
    """Both runs; what they left is read before the cluster goes."""
    try:
        return _run(cluster)
    except (RuntimeError, TimeoutError) as error:
        pytest.fail(f"{error}\n{cluster.logs()}")


def _run(cluster: Cluster) -> Run:
    cluster.compose("build", seconds=600)
    started = time.time()
    cluster.compose("up", "--detach", seconds=400, TEACHERS="2")
    refused = cluster.compose("exec", "-T", "student-0", "python", "-c", REFUSED_CALLS).split()
    steps_at = _disturb(cluster)
    _wait_for_the_end(cluster)
    online, progress = _read(cluster, "first/report.json"), _read(cluster, "first/progress.jsonl")
    online_states = [cluster.state(cluster.containers(name)[0]) for name in STUDENTS]
    series = {expression: cluster.samples(expression, start=started) for expression in _expressions()}
    expiry = cluster.samples("logitstream_teacher_certificate_expiry_timestamp_seconds", start=started)
    shown = cluster.query(f"avg(last_over_time({OVERHEAD}[10m]))")  # of both students, the moment each ended
    cluster.compose("stop", "--timeout", str(STOP_SECONDS), "teacher")
    teacher_states = [cluster.state(container) for container in cluster.containers("teacher")]
    cluster.compose("down")
    cluster.compose("up", "--detach", "--no-deps", *STUDENTS, TARGETS="cache", RUN="second")
    _wait_for_the_end(cluster)
    return Run(
        cluster=cluster,
        started=started,
        steps_at=steps_at,
        refused_calls=refused,
        certificate_expiry=expiry,
        online=online[0],
        online_progress=progress,
        online_states=online_states,
        teacher_states=teacher_states,
        series=series,
        shown_overhead=float(shown[0]["value"][1]),
        replayed=_read(cluster, "second/report.json")[0],
        replayed_states=[cluster.state(cluster.containers(name)[0]) for name in STUDENTS],
    )


def _disturb(cluster: Cluster) -> dict[str, int]:
    """Kill a replica, bring it back, restart both one after the other; the step at which each began or ended."""
    first, second = cluster.containers("teacher")
    wait_until(lambda: _step(cluster) >= 2, seconds=300, what="the second step")
    steps = {"killed": _step(cluster)}
    cluster.docker("kill", "--signal", "KILL", first)
    wait_until(lambda: _step(cluster) >= steps["killed"] + 2, seconds=200, what="two steps with one teacher")
    cluster.docker("start", first)
    for number, container in enumerate((second, first)):
        other = first if container == second else second
        wait_until(partial(cluster.is_healthy, other), seconds=200, what=f"{other} to be healthy")
        steps[f"restart {number}"] = _step(cluster)
        cluster.docker("restart", "--time", str(STOP_SECONDS), container)
    steps["restarted"] = _step(cluster)
    return steps


def _step(cluster: Cluster) -> int:
    """The newest optimizer step that Prometheus knows of."""
    found = cluster.query("max(logitstream_student_steps_total)")
    return int(float(found[0]["value"][1])) if found else 0


def _wait_for_the_end(cluster: Cluster) -> None:
    containers = [cluster.containers(name)[0] for name in STUDENTS]

    def ended() -> bool:
        states = [cluster.state(container) for container in containers]
        if any(state["RestartCount"] for state in states):
            raise RuntimeError(f"a student failed and was started again:\n{cluster.logs()}")
        return not any(state["Running"] for state in states)

    wait_until(ended, seconds=600, what="the end of training")


def _read(cluster: Cluster, name: str) -> list[Any]:
    """The JSON lines, or the one JSON object, of a file that the run left."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        cluster.compose("cp", f"student-0:/runs/{name}", str(copy), seconds=60)
        body = copy.read_text()
    return [json.loads(body)] if name.endswith(".json") else [json.loads(line) for line in body.splitlines()]


def _expressions() -> list[str]:
    """Every query of the dashboard and every recording rule."""
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana/dashboards/logitstream.json").read_text())
    rules = yaml.safe_load((ROOT / "deploy/monitoring/rules.yaml").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    records = [rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule]
    assert len(queries) > 20
    assert len(records) >= 10
    return sorted({*queries, *records})


def test_training_completes_and_no_sequence_is_lost(run: Run) -> None:
    assert [state["ExitCode"] for state in run.online_states] == [0, 0]
    assert run.online["tokens_trained"] == EPOCHS * NUM_SEQUENCES * SEQUENCE_TOKENS
    assert run.online["heldout_loss_after"] < run.online["heldout_loss_before"] - 1
    assert run.online_progress[-1]["step"] == NUM_STEPS


def test_a_killed_and_two_restarted_teachers_fail_no_step(run: Run) -> None:
    assert run.steps_at["killed"] < run.steps_at["restart 0"] < ONLINE_STEPS, "the disturbances came too late"
    assert run.steps_at["restart 1"] < ONLINE_STEPS, "the last restart came after the online epoch"
    assert [state["RestartCount"] for state in run.online_states] == [0, 0]
    steps = [row["step"] for row in run.online_progress if "loss" in row]
    assert steps == sorted(set(steps))
    assert set(range(1, NUM_STEPS + 1)) <= set(steps)


def test_plaintext_and_calls_without_a_token_are_refused(run: Run) -> None:
    assert run.refused_calls == ["UNAVAILABLE", "UNAUTHENTICATED"]
    assert min(run.certificate_expiry) > time.time() + 300 * 86400


def test_every_dashboard_query_and_recording_rule_has_data(run: Run) -> None:
    assert [expression for expression, samples in run.series.items() if not samples] == []


def test_prometheus_shows_the_overhead_that_the_report_ends_with(run: Run) -> None:
    assert run.shown_overhead == pytest.approx(run.online["epochs"][-1]["overhead_vs_cross_entropy"], abs=0.01)


def test_teachers_end_by_themselves_when_told_to(run: Run) -> None:
    assert [state["ExitCode"] for state in run.teacher_states] == [0, 0]


def test_a_stopped_cluster_trains_again_from_the_cache_volume_without_a_teacher(run: Run) -> None:
    assert [state["ExitCode"] for state in run.replayed_states] == [0, 0]
    assert run.replayed["tokens_trained"] == run.online["tokens_trained"]
    assert sum(epoch["received_bytes"] for epoch in run.replayed["epochs"]) == 0
    assert run.replayed["heldout_loss_after"] == pytest.approx(run.online["heldout_loss_after"], abs=0.02)
