"""How a server ends: the signals that tell it to, from its first import on, and the threads it may leave behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WORKERS = "worker"
LOADER = "loader"

T = TypeVar("T")


def stopping_signals() -> list[signal.Signals]:
    """Return the signals to stop at: all, except a SIGHUP that the process was started to ignore, as by nohup."""
    return [one for one in STOPPING_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]


def stop_while_starting() -> None:
    """Have each signal end this process without a traceback until a server takes the signals over.

    By default the first process of a container would ignore SIGTERM.
    """
    for number in stopping_signals():
        signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # the first process of a container is still there


def is_busy() -> bool:
    """Return True if a thread still works that the end of this process would wait for, or that would not survive it."""
    return any(thread.name.startswith((WORKERS, LOADER)) for thread in threading.enumerate())


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a daemon thread, for which a process that is told to stop while it loads does not wait."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def work() -> None:
        try:
            result = function()
        except BaseException as error:
            loop.call_soon_threadsafe(deliver, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(deliver, future.set_result, result)

    threading.Thread(target=work, daemon=True, name=LOADER).start()
    return future
