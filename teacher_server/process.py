"""A process that listens and ends well: open files, addresses that nobody else serves, signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from logitstream.rpc.addresses import is_unix, split_address

if TYPE_CHECKING:
    import grpc
    from grpc import aio

T = TypeVar("T")


async def in_own_thread(function: Callable[[], T]) -> T:
    """Return what a function returns that computes with torch, in a thread that ends with it.

    OpenMP keeps threads for each thread that has computed, and waits less busily once there are more than cores: those
    of a loader that stays would slow down the thread that scores, by 7 to 12 % on two cores.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, function)
    finally:
        thread.shutdown(wait=False)


def raise_file_limit() -> int:
    """Let this process open as many files as it may, a connection being one; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20  # Linux's default bound if no limit is set


def bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Have the server listen at HOST:PORT or unix:PATH; return the address with the port that port 0 became.

    Raises OSError if it cannot, or if anybody listens there: gRPC alone would be content with a host's other addresses,
    and would take a socket's path away from the server that owns it.
    """
    try:
        if _is_served(address):
            raise OSError("another server listens there")
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot serve on {address}: {error}") from error
    return address if is_unix(address) else f"{address.rpartition(':')[0]}:{port}"


def _is_served(address: str) -> bool:
    try:
        if is_unix(address):
            scheme, _, path = address.partition(":")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(f"\0{path}" if scheme == "unix-abstract" else path.removeprefix("//"))
        else:
            host, port = split_address(address)
            socket.create_connection((host or "localhost", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def stopping_signals() -> list[signal.Signals]:
    """Return the signals to stop at: all, except a SIGHUP that the process was started to ignore, as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * (not ignored)]


def stop_while_starting() -> None:
    """End this process at each signal until a server takes them over: a container's first process would ignore them."""
    for number in stopping_signals():
        signal.signal(number, lambda number, _frame: os._exit(128 + number))
