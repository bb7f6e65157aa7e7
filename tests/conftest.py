"""The things that many tests share: the real teacher, made once, and an end for every process that they start."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes test: each of them and of what they start takes one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if not list(Path("/dev").glob("nvidia[0-9]*")):  # before anything imports Triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

import logitstream.rpc  # noqa: F401  # sets how grpc forks, before any test loads it

hypothesis.settings.register_profile("house", deadline=None)  # no test asserts a duration
hypothesis.settings.load_profile("house")

MARK = "LOGITSTREAM_TEST_RUN"
os.environ[MARK] = uuid.uuid4().hex  # which all that the tests start inherit
guard = subprocess.Popen(
    [sys.executable, str(Path(__file__).with_name("guard.py")), MARK, os.environ[MARK]],
    stdin=subprocess.PIPE,
    env={name: value for name, value in os.environ.items() if name != MARK},
    start_new_session=True,  # Ctrl-C is not for it
)


def pytest_unconfigure() -> None:
    """Nothing that a test started is left; a run that is killed leaves that to the guard too."""
    guard.communicate(timeout=30)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread: small matrices only lose by being shared out."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def teacher_dir() -> Path:
    """SmolLM2-135M-Instruct as safetensors; downloaded and converted once per machine."""
    from demo.assets import teacher_folder

    return teacher_folder()


@pytest.fixture(scope="session")
def text_path() -> Path:
    """More than 1 MB of English help text."""
    from demo.assets import text_file

    return text_file()
