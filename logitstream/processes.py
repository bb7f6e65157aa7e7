"""Processes that end with the one that started them, however it ends; on Linux, elsewhere they do not."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it ended before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def tied(arguments: Sequence[str]) -> list[str]:
    """Return the command `python ARGUMENTS` for a process that ends with the one that starts it.

    A small Python asks the kernel for that and becomes the command, because code between fork and exec (preexec_fn)
    may hang if the parent has threads.
    """
    become = (
        "import ctypes, os, sys\n"
        f"sys.platform == 'linux' and ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
        "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    return [sys.executable, "-I", "-S", "-c", become, str(os.getpid()), sys.executable, *arguments]
