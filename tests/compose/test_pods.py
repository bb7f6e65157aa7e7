"""The workloads of the `cpu-local` overlay, run as containers just as their manifests say, train to the end.

No Kubernetes API server was to be had, so nothing here shows that one would admit or schedule them.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose.cluster import ROOT, Cluster, wait_until
from tests.compose.pods import Node, probe_succeeds
from tests.deploy.manifests import Manifest, of_kind, pod_templates
from tests.deploy.tools import run_tool

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1200)]

NUM_SEQUENCES, SEQUENCE_TOKENS, EPOCHS = 48, 128, 2


@pytest.fixture(scope="module")
def node(docker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    cluster = Cluster([ROOT / "docker/compose.yaml"], docker_environment, project="logitstream-pods")
    cluster.compose("build", seconds=900)
    manifests = list(
        yaml.safe_load_all(run_tool("kubectl", "kustomize", str(ROOT / "deploy/kubernetes/overlays/cpu-local")))
    )
    for image in {c["image"] for pod in pod_templates(manifests).values() for c in _all_containers(pod)}:
        cluster.docker("tag", image.partition(":")[0], image)
    folder = tmp_path_factory.mktemp("node")
    folder.chmod(0o755)
    node = Node(cluster.docker, [*manifests, *_secrets(folder)], folder)
    _make_smaller(manifests)
    cluster.docker("network", "create", node.network)
    try:
        yield node
    finally:
        node.remove()
        cluster.docker("network", "rm", node.network)


def _all_containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]


def _make_smaller(manifests: list[Manifest]) -> None:
    """Fewer sequences; every other setting stays."""
    (settings,) = [m for m in of_kind(manifests, "ConfigMap") if "student.yaml" in m["data"]]
    values = yaml.safe_load(settings["data"]["student.yaml"])
    values["data"]["max_sequences"] = NUM_SEQUENCES
    values["training"]["num_train_epochs"] = EPOCHS
    settings["data"]["student.yaml"] = yaml.safe_dump(values)


def _secrets(folder: Path) -> list[Manifest]:
    """The two secrets that base leaves to the user, made with openssl as docs/operating.md has it."""
    work = folder / "making"
    work.mkdir()
    openssl = partial(run_tool, "openssl", cwd=work)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout")
    openssl("req", "-x509", *key, "ca.key", "-out", "ca.crt", "-subj", "/CN=test")
    openssl("req", *key, "tls.key", "-out", "tls.csr", "-subj", "/CN=teacher")
    (work / "ext").write_text("subjectAltName=DNS:teacher\n")
    authority = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial")
    openssl("x509", "-req", "-in", "tls.csr", *authority, "-extfile", "ext", "-out", "tls.crt")
    files = {name: (work / name).read_bytes() for name in ("tls.crt", "tls.key", "ca.crt")}
    return [_secret("teacher-tls", files), _secret("logitstream-token", {"token": secrets.token_hex(32).encode()})]


def _secret(name: str, files: dict[str, bytes]) -> Manifest:
    data = {key: base64.b64encode(content).decode() for key, content in files.items()}
    return {"kind": "Secret", "metadata": {"name": name}, "data": data}


def test_the_workloads_of_cpu_local_train_to_the_end_as_containers(node: Node) -> None:
    pods = pod_templates(node.manifests)
    teacher = pods["Deployment/teacher"]
    server = teacher["spec"]["containers"][0]
    container = node.start("pod-teacher", teacher, hostname="teacher-0", aliases=["teacher"])
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        node.wait_for_probe(container, server[kind], server["ports"])

    students = _start_students(node, pods["Job/students"])
    wait_until(lambda: not any(map(node.is_running, students)), seconds=600, what="the end of training")
    for student in students:
        assert node.exit_code(student) == 0, node.docker("logs", "--tail", "60", student)
    report = _report(node)
    assert report["tokens_trained"] == EPOCHS * NUM_SEQUENCES * SEQUENCE_TOKENS
    assert report["heldout_loss_after"] < report["heldout_loss_before"]

    exit_code, seconds = node.stop(container, teacher["spec"])
    assert exit_code == 0
    assert seconds < teacher["spec"]["terminationGracePeriodSeconds"]
    assert not probe_succeeds("127.0.0.1", server["readinessProbe"], server["ports"])


def _start_students(node: Node, job: Manifest) -> list[str]:
    """Both indexes of the Job, started at once; each passes its startup probe."""
    subdomain, (main,) = job["spec"]["subdomain"], job["spec"]["containers"]
    names = [f"students-{index}" for index in range(2)]
    for index, name in enumerate(names):
        node.start(name, job, hostname=name, aliases=[f"{name}.{subdomain}"], index=index)
    for name in names:
        node.wait_for_probe(name, main["startupProbe"], main["ports"])
    return names


def _report(node: Node) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((node.folder / "claims" / "data" / "runs" / "report.json").read_text())
    return report
