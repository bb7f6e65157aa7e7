"""docker compose, and the Prometheus that runs in it, as a test drives them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
STARTER = ROOT.parent / "shared" / "bin" / "docker-engine"
"""Starts a Docker engine where none runs; a machine of the project's own has it beside the checkout."""


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """Yield docker's environment for an engine; one is started if none runs, and stopped again.

    RuntimeError if none can be started.
    """
    if _answers({}):
        yield {}
        return
    starter = os.environ.get("DOCKER_ENGINE_STARTER", str(STARTER))
    if not os.access(starter, os.X_OK):
        raise RuntimeError(f"no Docker engine answers, and {starter}, which would start one, is not there")
    words = subprocess.run([starter, "env"], check=True, capture_output=True, text=True).stdout.split()
    environment = dict(word.split("=", 1) for word in words if "=" in word)
    if _answers(environment):
        yield environment
        return
    if subprocess.run([starter, "up"], timeout=300).returncode:
        raise RuntimeError(f"no Docker engine answers, and {starter} could not start one")
    try:
        yield environment
    finally:
        subprocess.run([starter, "down"], check=False)


def _answers(environment: dict[str, str]) -> bool:
    docker = shutil.which("docker")
    return (
        bool(docker)
        and not subprocess.run(["docker", "info"], env=os.environ | environment, capture_output=True).returncode
    )


def give_up(what: str, error: RuntimeError) -> NoReturn:
    """Fail where a person asked for the test; in CI, where no engine may be to be had, skip it and say so loudly."""
    message = f"{what}: {error}"
    if not os.environ.get("CI"):
        pytest.fail(message)
    print(f"\n{'!' * 100}\n{message}\n{'!' * 100}", file=sys.__stderr__, flush=True)
    pytest.skip(message)


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


def build_images() -> None:
    """Build what the compose tests run; say so where no engine is to be had, as they will."""
    with ExitStack() as stack:
        try:
            environment = stack.enter_context(engine())
        except RuntimeError as error:
            print(f"no images were built: {error}")
            return
        Cluster([ROOT / "docker/compose.yaml"], environment).compose("build", seconds=900)


if __name__ == "__main__":
    build_images()
