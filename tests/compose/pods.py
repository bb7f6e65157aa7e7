"""Pods as containers on a Docker engine: the same image, command, environment, volumes, limits and security context.

A kubelet's work around them is done here too: init containers, volumes of ConfigMaps and Secrets with their modes,
the pod's group on volumes, probes from outside, preStop and SIGTERM within the grace period.
"""

from __future__ import annotations

import base64
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.deploy.manifests import Manifest, of_kind, quantity

Docker = Callable[..., str]
"""docker's arguments -> its standard output."""


@dataclass
class Node:
    """One machine's worth of Kubernetes: its volumes lie in a folder, its pods share a network."""

    docker: Docker
    manifests: list[Manifest]
    folder: Path
    network: str = "logitstream-pods"
    containers: list[str] = field(default_factory=list)

    def start(
        self, name: str, template: Manifest, *, hostname: str, aliases: list[str], index: int | None = None
    ) -> str:
        """Run a pod's init containers, then start its container; the container's name."""
        spec = template["spec"]
        for volume in spec["volumes"]:
            self._prepare(name, volume, spec["securityContext"])
        for init in spec.get("initContainers", []):
            self.docker(
                "run", "--rm", *self._options(name, spec, init, index), init["image"], *_words(init), seconds=120
            )
        (main,) = spec["containers"]
        names = [word for alias in aliases for word in ("--network-alias", alias)]
        options = [*self._options(name, spec, main, index), "--network", self.network, *names, "--hostname", hostname]
        self.containers.append(name)
        self.docker("run", "--detach", "--name", name, *options, main["image"], *_words(main))
        return name

    def _options(self, pod: str, spec: Manifest, container: Manifest, index: int | None) -> list[str]:
        security, limits = spec["securityContext"] | container["securityContext"], container["resources"]["limits"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        options = [
            "--read-only",
            "--security-opt",
            "no-new-privileges",
            "--user",
            f"{security['runAsUser']}:{security['runAsGroup']}",
        ]
        options += [f"--cap-drop={capability}" for capability in security["capabilities"]["drop"]]
        options += [f"--cpus={quantity(limits['cpu'])}", f"--memory={int(quantity(limits['memory']))}"]
        if "command" in container:
            options.append(f"--entrypoint={container['command'][0]}")
        for variable in container.get("env", []):
            options.append(f"--env={variable['name']}={variable.get('value', index)}")  # the one fieldRef is the index
        for mount in container["volumeMounts"]:
            source = self._place(pod, mount["name"], spec)
            options.append(f"--volume={source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}")
        return options

    def _place(self, pod: str, volume_name: str, spec: Manifest) -> Path:
        """Return the folder of a volume: claims are shared between pods, everything else is the pod's own."""
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == volume_name]
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        return self.folder / "claims" / claim if claim else self.folder / pod / volume_name

    def _prepare(self, pod: str, volume: Manifest, security: Manifest) -> None:
        place = self._place(pod, volume["name"], {"volumes": [volume]})
        place.mkdir(parents=True, exist_ok=True)
        _own(place, security["fsGroup"], 0o2775)
        for file, content in self._files(volume).items():
            (place / file).write_bytes(content)
            _own(place / file, security["fsGroup"], volume.get("secret", {}).get("defaultMode", 0o644))

    def _files(self, volume: Manifest) -> dict[str, bytes]:
        if "configMap" in volume:
            (found,) = [
                m for m in of_kind(self.manifests, "ConfigMap") if m["metadata"]["name"] == volume["configMap"]["name"]
            ]
            return {name: text.encode() for name, text in found["data"].items()}
        if "secret" in volume:
            wanted = volume["secret"]
            (found,) = [m for m in of_kind(self.manifests, "Secret") if m["metadata"]["name"] == wanted["secretName"]]
            data = {name: base64.b64decode(text) for name, text in found["data"].items()}
            return {i["path"]: data[i["key"]] for i in wanted["items"]} if "items" in wanted else data
        return {}

    def address(self, container: str) -> str:
        return self.docker(
            "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container
        ).strip()

    def is_running(self, container: str) -> bool:
        return self.docker("inspect", "--format", "{{.State.Running}}", container).strip() == "true"

    def exit_code(self, container: str) -> int:
        return int(self.docker("inspect", "--format", "{{.State.ExitCode}}", container))

    def wait_for_probe(self, container: str, probe: Manifest, ports: list[Manifest]) -> None:
        """Ask as the kubelet does; RuntimeError once failureThreshold is reached."""
        for _ in range(probe["failureThreshold"]):
            if probe_succeeds(self.address(container), probe, ports):
                return
            if not self.is_running(container):
                break
            time.sleep(probe["periodSeconds"])
        raise RuntimeError(f"{container} fails its probe {probe}: {self.docker('logs', '--tail', '40', container)}")

    def stop(self, container: str, spec: Manifest) -> tuple[int, float]:
        """preStop, SIGTERM, and SIGKILL after the grace period; exit status and seconds that it took."""
        started, grace = time.monotonic(), spec["terminationGracePeriodSeconds"]
        pre_stop = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        time.sleep(pre_stop)
        self.docker("stop", "--time", str(grace - pre_stop), container, seconds=grace + 30)
        return self.exit_code(container), time.monotonic() - started

    def remove(self) -> None:
        for container in self.containers:
            self.docker("rm", "--force", container)
        shutil.rmtree(self.folder, ignore_errors=True)


def _words(container: Manifest) -> Iterator[str]:
    yield from container.get("command", [])[1:]
    yield from container.get("args", [])


def _own(path: Path, group: int, mode: int) -> None:
    os.chown(path, 0, group)
    path.chmod(mode)


def probe_succeeds(address: str, probe: dict[str, Any], ports: list[Manifest]) -> bool:
    """One gRPC or HTTP probe from outside the container."""
    if "grpc" in probe:
        with grpc.insecure_channel(f"{address}:{probe['grpc']['port']}") as channel:
            try:
                answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=probe["timeoutSeconds"])
            except grpc.RpcError:
                return False
            return bool(answer.status == HealthCheckResponse.SERVING)
    (port,) = [port["containerPort"] for port in ports if port["name"] == probe["httpGet"]["port"]]
    try:
        url = f"http://{address}:{port}{probe['httpGet']['path']}"
        with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as response:
            return bool(200 <= response.status < 400)
    except OSError:
        return False
