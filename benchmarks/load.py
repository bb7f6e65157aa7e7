"""Load on a teacher server: server processes, and clients that keep a window of tokens in flight."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from benchmarks.instant_teacher import MAX_MESSAGE_BYTES, VOCAB_SIZE
from demo.assets import teacher_folder
from logitstream.errors import RequestError
from logitstream.rpc.channel import open_channel
from logitstream.rpc.remote_teacher import Caller, RemoteTeacher
from logitstream.types import TargetSpec, TokenSequence

SPEC = TargetSpec(num_samples=50)


@contextlib.contextmanager
def process(*command: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server and its address, from the file that its command names as ADDRESS_FILE."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "address"
        arguments = [str(path) if word == "ADDRESS_FILE" else word for word in command]
        server = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not path.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"{' '.join(arguments)} ended with {server.returncode}")
                time.sleep(0.05)
            yield path.read_text().strip(), psutil.Process(server.pid)
        finally:
            server.terminate()
            server.wait(timeout=60)


def instant(*options: str) -> contextlib.AbstractContextManager[tuple[str, psutil.Process]]:
    return process("-m", "benchmarks.instant_teacher", "ADDRESS_FILE", *options)


def teacher(max_batch_tokens: int) -> contextlib.AbstractContextManager[tuple[str, psutil.Process]]:
    """Start a server of the demo's teacher on the CPU, as `process` does."""
    settings = {
        "model.path": str(teacher_folder()),
        "model.dtype": "float32",
        "model.device": "cpu",
        "server.address": "127.0.0.1:0",
        "server.address_file": "ADDRESS_FILE",
        "limits.max_batch_tokens": str(max_batch_tokens),
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return process("-m", "teacher_server", *words)


def random_sequences(lengths: Sequence[int], *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [TokenSequence(token_ids=rng.integers(0, vocab_size, length).astype(np.int32)) for length in lengths]


class Client:
    """Calls that keep up to `window_tokens` in flight; counts what comes back."""

    def __init__(self, address: str, name: str, *, window_tokens: int) -> None:
        channel = open_channel(address, max_message_bytes=MAX_MESSAGE_BYTES)
        self._teacher = RemoteTeacher(channel, address=address, timeout_seconds=10)
        self._caller = Caller(client_id=name, vocab_size=1 << 24)
        self._window = window_tokens
        self._held = 0
        self._room = asyncio.Condition()
        self.tokens = self.payload_bytes = 0
        self.latencies: list[float] = []
        self.times: list[tuple[float, int]] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._teacher.close()

    async def run(self, sequences: Sequence[TokenSequence], *, group: int = 8) -> None:
        """Send all, `group` a call, and wait for all answers."""
        async with asyncio.TaskGroup() as calls:
            for start in range(0, len(sequences), group):
                asked = sequences[start : start + group]
                num_tokens = sum(map(len, asked))
                async with self._room:
                    await self._room.wait_for(lambda n=num_tokens: not self._held or self._held + n <= self._window)  # type: ignore[misc]
                    self._held += num_tokens
                calls.create_task(self._call(asked))

    async def _call(self, sequences: Sequence[TokenSequence]) -> None:
        sent = time.perf_counter()
        async for index, answer in self._teacher.score(sequences, SPEC, self._caller):
            if isinstance(answer, RequestError):
                raise answer
            now, num_tokens = time.perf_counter(), len(sequences[index])
            self.latencies.append(now - sent)
            self.times.append((now, num_tokens))
            self.payload_bytes += len(answer.payload)
            self.tokens += num_tokens
            async with self._room:
                self._held -= num_tokens
                self._room.notify_all()


async def tokens_per_second(
    address: str, sequences: Sequence[TokenSequence], *, num_clients: int, window: int
) -> float:
    """Clients that share the sequences between them, all at once."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(address, f"client {i}", window_tokens=window))
            for i in range(num_clients)
        ]
        start = time.perf_counter()
        await asyncio.gather(*(client.run(sequences[i::num_clients]) for i, client in enumerate(clients)))
        return sum(map(len, sequences)) / (time.perf_counter() - start)
