"""What many tests share: the real teacher, made once, and tiny models for what needs no real one."""

from __future__ import annotations

from pathlib import Path

import pytest

import logitstream.rpc  # noqa: F401  # sets how grpc forks, before any test loads it


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
