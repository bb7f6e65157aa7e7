"""The Kubernetes overlays: schemas, checkov, and what neither sees. No API server was to be had to apply them."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitstream.settings import parse
from student_worker.config import parse_student
from teacher_server.config import TeacherConfig
from tests.deploy import manifests as checks
from tests.deploy.tools import ROOT, run_tool

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore::UserWarning")]

OVERLAYS = sorted(path.name for path in (ROOT / "deploy/kubernetes/overlays").iterdir())
NEWEST_VERSIONS = 3
CUSTOM_KINDS = {"Certificate", "Issuer", "JobSet", "PodMonitor", "PrometheusRule"}
"""Kinds of operators: Kubernetes' own schemas do not know them; only the checks of manifests.py do."""


@cache
def _built(overlay: str) -> str:
    return run_tool("kubectl", "kustomize", str(ROOT / "deploy/kubernetes/overlays" / overlay))


def manifests_of(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_built(overlay)))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_follows_the_schemas_of_the_newest_kubernetes_versions(overlay: str, tmp_path: Path) -> None:
    listing = "import kubernetes_validate.utils as u; print(*u.all_versions())"
    versions = run_tool("python", "-c", listing).split()[-NEWEST_VERSIONS:]
    file = tmp_path / "overlay.yaml"
    file.write_text(_built(overlay))
    output = run_tool("kubernetes-validate", "--strict", *[f"-k={version}" for version in versions], str(file))
    native = [manifest for manifest in manifests_of(overlay) if manifest["kind"] not in CUSTOM_KINDS]
    assert output.count("INFO") == len(native) * NEWEST_VERSIONS


def test_a_misspelt_field_does_not_pass_the_schemas(tmp_path: Path) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text(_built("cpu-local").replace("terminationGracePeriodSeconds", "terminationGraceSeconds"))
    with pytest.raises(subprocess.CalledProcessError):
        run_tool("kubernetes-validate", "--strict", str(file))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_checkov_finds_nothing_and_every_skip_gives_its_reason(overlay: str, tmp_path: Path) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text(_built(overlay))
    run_tool("checkov", "--skip-download", "--quiet", "--compact", "--framework", "kubernetes", "--file", str(file))
    for manifest in manifests_of(overlay):
        for key, skip in manifest["metadata"].get("annotations", {}).items():
            if key.startswith("checkov.io/skip"):
                assert len(skip.partition("=")[2]) > 20, f"{skip} gives no reason"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_an_overlay_fits_together(overlay: str, check: Callable[[Any], Any]) -> None:
    assert list(check(manifests_of(overlay))) == []


def find(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def _pod(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    pod: dict[str, Any] = find(manifests, kind, name)["spec"]["template"]["spec"]
    return pod


def _container(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    container: dict[str, Any] = _pod(manifests, kind, name)["containers"][0]
    return container


NOBODY = {"matchLabels": {"app.kubernetes.io/name": "nobody"}}
BREAKS: dict[str, tuple[Callable[[Any], Iterator[str]], str, Callable[[list[dict[str, Any]]], Any]]] = {
    "a pod's label": (
        checks.selector_problems, "does not select its own pods",
        lambda m: find(m, "Deployment", "teacher")["spec"]["selector"]["matchLabels"].update(app="t"),
    ),
    "a service's selector": (
        checks.selector_problems, "Service teacher selects no pod",
        lambda m: find(m, "Service", "teacher")["spec"]["selector"].update(app="teacher"),
    ),
    "a network policy's peer": (
        checks.selector_problems, "NetworkPolicy teacher selects no pod",
        lambda m: find(m, "NetworkPolicy", "teacher")["spec"]["ingress"][0]["from"][0].update(podSelector=NOBODY),
    ),
    "a service's port": (
        checks.port_problems, "Service teacher: no pod opens rpc",
        lambda m: find(m, "Service", "teacher")["spec"]["ports"][0].update(targetPort="rpc"),
    ),
    "a monitor's port": (
        checks.port_problems, "PodMonitor student: no pod opens prometheus",
        lambda m: find(m, "PodMonitor", "student")["spec"]["podMetricsEndpoints"][0].update(port="prometheus"),
    ),
    "a policy's port": (
        checks.port_problems, "NetworkPolicy teacher: no pod opens tls",
        lambda m: find(m, "NetworkPolicy", "teacher")["spec"]["ingress"][0]["ports"][0].update(port="tls"),
    ),
    "a probe's port": (
        checks.port_problems, "readinessProbe asks port 50053",
        lambda m: _container(m, "Deployment", "teacher")["readinessProbe"]["grpc"].update(port=50053),
    ),
    "the settings' port": (
        checks.port_problems, "health_address is 0.0.0.0:50052",
        lambda m: _container(m, "Deployment", "teacher").update(ports=[{"name": "grpc", "containerPort": 50051}]),
    ),
    "a claim's name": (
        checks.reference_problems, "no PersistentVolumeClaim cache",
        lambda m: _pod(m, "Job", "students")["volumes"][4]["persistentVolumeClaim"].update(claimName="cache"),
    ),
    "a secret's name": (
        checks.reference_problems, "no Secret tls",
        lambda m: _pod(m, "Deployment", "teacher")["volumes"][2]["secret"].update(secretName="tls"),
    ),
    "a volume that is not mounted": (
        checks.reference_problems, "volume token is not both mounted and defined",
        lambda m: _container(m, "Job", "students")["volumeMounts"].pop(3),
    ),
    "the settings' file": (
        checks.reference_problems, "names a file that no ConfigMap holds",
        lambda m: _container(m, "Deployment", "teacher").update(args=["--config", "/settings/server.yaml"]),
    ),
    "a read-only cache": (
        checks.reference_problems, "cache.path is /data/cache, which is read-only",
        lambda m: _container(m, "Job", "students")["volumeMounts"][4].update(readOnly=True),
    ),
    "the autoscaler's target": (
        checks.reference_problems, "scales Deployment server",
        lambda m: find(m, "HorizontalPodAutoscaler", "teacher")["spec"]["scaleTargetRef"].update(name="server"),
    ),
    "a request above its limit": (
        checks.quantity_problems, "asks for 100 of cpu",
        lambda m: _container(m, "Deployment", "teacher")["resources"]["requests"].update(cpu="100"),
    ),
    "a quantity": (
        checks.quantity_problems, "expected a quantity",
        lambda m: _container(m, "Job", "students")["resources"]["limits"].update(memory="8GB"),
    ),
    "no bound on memory": (
        checks.quantity_problems, "expected a quantity",
        lambda m: _container(m, "Job", "students")["resources"]["limits"].pop("memory"),
    ),
    "more threads than CPUs": (
        checks.quantity_problems, "2 threads, its limit is 1 CPUs",
        lambda m: _container(m, "Deployment", "teacher")["resources"]["limits"].update(cpu="1"),
    ),
    "a short grace period": (
        checks.timing_problems, "is killed 30 s after it is told to stop",
        lambda m: _pod(m, "Deployment", "teacher").update(terminationGracePeriodSeconds=30),
    ),
    "a hasty liveness probe": (
        checks.timing_problems, "is killed before it is taken out of service",
        lambda m: _container(m, "Deployment", "teacher")["livenessProbe"].update(failureThreshold=1),
    ),
    "a hasty startup probe": (
        checks.timing_problems, "s to load",
        lambda m: _container(m, "Deployment", "teacher")["startupProbe"].update(failureThreshold=3),
    ),
    "a world of another size": (
        checks.rendezvous_problems, "completions, parallelism and PET_NNODES differ",
        lambda m: find(m, "Job", "students")["spec"].update(completions=4),
    ),
    "another master": (
        checks.rendezvous_problems, "the first pod is students-0.students",
        lambda m: _container(m, "Job", "students")["env"][2].update(value="student-0.students"),
    ),
    "no names for pods that are not ready": (
        checks.rendezvous_problems, "names pods before they are ready",
        lambda m: find(m, "Service", "students")["spec"].pop("publishNotReadyAddresses"),
    ),
    "a service with one address for all": (
        checks.rendezvous_problems, "no headless Service teacher",
        lambda m: find(m, "Service", "teacher")["spec"].pop("clusterIP"),
    ),
    "a certificate for another name": (
        checks.rendezvous_problems, "certificate does not name teacher",
        lambda m: find(m, "Certificate", "teacher")["spec"].update(dnsNames=["server"]),
    ),
    "two hands on the replicas": (
        checks.replica_problems, "by one alone",
        lambda m: find(m, "Deployment", "teacher")["spec"].update(replicas=2),
    ),
    "a budget of none": (
        checks.replica_problems, "no pod may ever be evicted",
        lambda m: find(m, "PodDisruptionBudget", "teacher")["spec"].update(maxUnavailable=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_check_finds_what_is_broken(name: str) -> None:
    check, finding, damage = BREAKS[name]
    manifests = copy.deepcopy(manifests_of("multi-teacher"))
    damage(manifests)
    assert any(finding in problem for problem in check(manifests))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_in_the_config_maps_are_the_commands_own(overlay: str, tmp_path: Path) -> None:
    config_maps = [m for m in manifests_of(overlay) if m["kind"] == "ConfigMap"]
    files = {name: text for config_map in config_maps for name, text in config_map["data"].items()}
    for name in ("teacher.yaml", "student.yaml"):
        (tmp_path / name).write_text(files[name])
    parse(TeacherConfig, ["--config", str(tmp_path / "teacher.yaml")], command="teacher", description="")
    parse_student(["--config", str(tmp_path / "student.yaml")])


def test_the_pods_run_as_the_user_of_the_images() -> None:
    for overlay in OVERLAYS:
        for pod in checks.pod_templates(manifests_of(overlay)).values():
            user = pod["spec"]["securityContext"]["runAsUser"]
            for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
                assert f"USER {user}:{user}" in dockerfile.read_text()
