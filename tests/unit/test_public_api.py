"""`import logitstream` is quick and offers the whole API."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import logitstream

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there_and_others_are_not() -> None:
    for name in logitstream.__all__:
        assert getattr(logitstream, name) is not None
    with pytest.raises(AttributeError, match="'logitstream' has no attribute 'smaple'"):
        _ = logitstream.smaple


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert logitstream.__version__ == project["version"]


def test_importing_the_package_imports_nothing_slow() -> None:
    program = "import sys, logitstream; assert not {'torch', 'grpc', 'numpy', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
