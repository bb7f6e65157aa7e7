"""The command-line tools that check what is deployed; `make test-deploy` puts them on the PATH."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-deploy" / "bin"


def run_tool(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Its standard output; CalledProcessError where it fails, with what it printed shown by pytest."""
    program = VENV / name if (VENV / name).exists() else shutil.which(name)
    assert program, f"{name} is not installed: run `make test-deploy`"
    done = subprocess.run([str(program), *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr)
    done.check_returncode()
    return done.stdout
