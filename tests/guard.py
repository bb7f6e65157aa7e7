"""Ends what a test run leaves: `python tests/guard.py NAME VALUE` waits for the end of its stdin, however that comes.

Then it kills each process that was started with the environment variable NAME=VALUE.
"""

from __future__ import annotations

import contextlib
import sys

import psutil


def main() -> None:
    name, value = sys.argv[1:]
    sys.stdin.buffer.read()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                process.kill()


if __name__ == "__main__":
    main()
