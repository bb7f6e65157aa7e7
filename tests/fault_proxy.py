"""A TCP proxy that a test makes slow, narrow, silent or broken while connections run through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

CHUNK_BYTES = 16 << 10
QUEUE_CHUNKS = 64


class FaultProxy:
    """Runs in a thread of its own; its attributes may be set from any thread and hold from the next chunk on.

    silent: what comes in is swallowed while both sockets stay open, as behind a cable that was pulled.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.delay_seconds = 0.0
        self.bytes_per_second = 0.0
        self.silent = False
        self.num_connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, args=(listener,), name="fault-proxy", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection; new ones are let through."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accepted, sock=listener))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._abort_all()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    def _abort_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.rsplit(":", 1)
        self._open.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self.num_connections += 1
        self._open.add(up_writer)
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.ensure_future(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """One direction: reading does not wait for the delay, so it adds latency and takes no bandwidth."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE_CHUNKS)
        delivering = asyncio.ensure_future(self._deliver(chunks, sink))
        try:
            while data := await source.read(CHUNK_BYTES):
                if not self.silent:
                    await chunks.put((self._loop.time() + self.delay_seconds, data))
            await chunks.put((0.0, b""))
            await delivering
        except OSError:
            pass
        finally:
            delivering.cancel()
            if not self.silent:
                sink.transport.abort()
                self._open.discard(sink)

    async def _deliver(self, chunks: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, data = await chunks.get()
                if not data:
                    return
                await asyncio.sleep(max(0.0, at - self._loop.time()))
                sink.write(data)
                await sink.drain()
                if self.bytes_per_second:
                    await asyncio.sleep(len(data) / self.bytes_per_second)


@contextlib.contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
