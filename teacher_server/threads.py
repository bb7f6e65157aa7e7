"""Threads that the end of a server may have to leave behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

WORKERS = "worker"
LOADER = "loader"

T = TypeVar("T")


def is_busy() -> bool:
    """Whether a thread still works that the end of this process would wait for, or that would not survive it."""
    return any(thread.name.startswith((WORKERS, LOADER)) for thread in threading.enumerate())


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a daemon thread, which a process that is told to stop while it loads does not wait for."""
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
