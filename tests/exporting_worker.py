"""`student-worker` that leaves what it exports at its end: `python -m tests.exporting_worker FILE ARGUMENTS…`."""

from __future__ import annotations

import sys
from pathlib import Path

from prometheus_client import REGISTRY, generate_latest

from student_worker.__main__ import main

if __name__ == "__main__":
    main(sys.argv[2:])
    Path(sys.argv[1]).write_bytes(generate_latest(REGISTRY))
