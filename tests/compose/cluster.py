"""docker compose, and the Prometheus that runs in it, as a test drives them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STARTER = ROOT.parent / "shared" / "bin" / "docker-engine"
"""Starts a Docker engine where none runs; a machine of the project's own has it beside the checkout."""


def engine_environment() -> dict[str, str]:
    """What docker needs to reach an engine, which is started where none runs; RuntimeError where that cannot be."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return {}
    starter = os.environ.get("DOCKER_ENGINE_STARTER", str(STARTER))
    if not os.access(starter, os.X_OK):
        raise RuntimeError(f"no Docker engine answers, and {starter}, which would start one, is not there")
    subprocess.run([starter, "up"], check=True, timeout=300)
    lines = subprocess.run([starter, "env"], check=True, capture_output=True, text=True).stdout.split()
    return dict(word.split("=", 1) for word in lines if "=" in word)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """One compose project with names, volumes and ports of its own."""

    files: Sequence[Path]
    environment: dict[str, str]
    project: str = "logitstream-test"
    prometheus_port: int = field(default_factory=free_port)

    def docker(self, *arguments: str, seconds: float = 120, **variables: str) -> str:
        """Standard output of a docker command; RuntimeError with all that it printed where it fails."""
        environment = os.environ | self.environment | {"PROMETHEUS_PORT": str(self.prometheus_port)} | variables
        command = ["docker", *arguments]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def compose(self, *arguments: str, seconds: float = 300, **variables: str) -> str:
        files = [word for file in self.files for word in ("--file", str(file))]
        return self.docker("compose", "--project-name", self.project, *files, *arguments, seconds=seconds, **variables)

    def containers(self, service: str) -> list[str]:
        """Names of a service's containers, running or not."""
        return sorted(self.compose("ps", "--all", "--format", "{{.Name}}", service).split())

    def state(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self.docker("inspect", container))
        return {**found["State"], "RestartCount": found["RestartCount"]}

    def is_healthy(self, container: str) -> bool:
        return bool(self.state(container).get("Health", {}).get("Status") == "healthy")

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "60", "teacher", "student-0", "student-1")

    def query(self, expression: str, *, start: float | None = None, step: str = "5s") -> list[dict[str, Any]]:
        """Prometheus' series of an expression: at this moment, or since a start."""
        parameters = {"query": expression}
        if start is not None:
            parameters |= {"start": str(start), "end": str(time.time()), "step": step}
        kind = "query" if start is None else "query_range"
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            answer = json.load(response)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def samples(self, expression: str, *, start: float) -> list[float]:
        """Every finite sample of an expression since a start."""
        series = self.query(expression, start=start)
        values = [float(value) for one in series for _, value in one["values"]]
        return [value for value in values if math.isfinite(value)]


def wait_until(ready: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(1)
