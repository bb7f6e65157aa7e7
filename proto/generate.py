"""Generate logitstream/rpc/v1 from the .proto files beside this one; `--check` compares only."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = "logitstream/rpc/v1/teacher.proto"


def generate(out: Path) -> list[Path]:
    """Write the generated modules under `out`."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", PROTO]
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    return sorted((out / PROTO).parent.glob("teacher_pb2*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        stale = [
            path.name
            for path in generate(Path(folder))
            if not (committed := (ROOT / PROTO).parent / path.name).exists()
            or committed.read_bytes() != path.read_bytes()
        ]
    if stale:
        raise SystemExit(f"generated code is out of step with proto/: {', '.join(stale)}; run `make proto`")


if __name__ == "__main__":
    main()
