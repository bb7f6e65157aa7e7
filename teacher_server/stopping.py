"""What tells a server to stop, from its first import on."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stopping_signals() -> list[signal.Signals]:
    """The signals to stop at: all, but for a SIGHUP that the process was started to ignore, as by nohup."""
    return [one for one in STOPPING_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]


def stop_while_starting() -> None:
    """Until a server takes the signals over, have each end this process without a traceback.

    By default the first process of a container would ignore SIGTERM.
    """
    for number in stopping_signals():
        signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # the first process of a container is still there
