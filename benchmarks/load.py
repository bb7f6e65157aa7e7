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
from grpc import aio

from benchmarks.instant_teacher import MAX_MESSAGE_BYTES, VOCAB_SIZE
from logitstream.rpc import convert
from logitstream.rpc.channel import open_channel
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
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


def random_sequences(lengths: Sequence[int], *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [TokenSequence(token_ids=rng.integers(0, vocab_size, length).astype(np.int32)) for length in lengths]


class Client:
    """One stream that keeps up to `window_tokens` in flight and counts what comes back."""

    def __init__(self, address: str, name: str, *, window_tokens: int) -> None:
        self._channel = open_channel(address, max_message_bytes=MAX_MESSAGE_BYTES)
        self._name = name
        self._window = window_tokens
        self._in_flight: dict[int, tuple[int, float]] = {}
        self._held = 0
        self._room = asyncio.Condition()
        self.tokens = self.payload_bytes = self.num_messages = 0
        self.latencies: list[float] = []
        self.times: list[tuple[float, int]] = []

    async def __aenter__(self) -> Client:
        self._call = TeacherServiceStub(self._channel).StreamTargets()
        hello = pb.Open(client_id=self._name, vocab_size=1 << 24, spec=convert.spec_to_message(SPEC))
        await self._call.write(pb.StreamTargetsRequest(open=hello))
        await self._call.read()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def run(self, sequences: Sequence[TokenSequence], *, group: int = 8) -> None:
        """Send all, `group` a message, and wait for all answers."""
        messages = [convert.request_to_message(number, one) for number, one in enumerate(sequences)]
        await self.run_messages([messages[i : i + group] for i in range(0, len(messages), group)])

    async def run_messages(self, groups: list[list[pb.TargetRequest]]) -> None:
        reading = asyncio.ensure_future(self._read(sum(map(len, groups))))
        for group in groups:
            lengths = {request.request_id: len(request.token_bytes) // convert.ID_BYTES for request in group}
            num_tokens = sum(lengths.values())
            async with self._room:
                await self._room.wait_for(lambda n=num_tokens: not self._held or self._held + n <= self._window)
                self._held += num_tokens
            now = time.perf_counter()
            self._in_flight |= {request_id: (length, now) for request_id, length in lengths.items()}
            await self._call.write(convert.requests_to_message(group))
        await reading

    async def _read(self, count: int) -> None:
        while count:
            message = await self._call.read()
            if message is aio.EOF:
                raise RuntimeError(f"the server ended the stream: {await self._call.details()}")
            now = time.perf_counter()
            freed = 0
            for result in message.results.results:
                if result.WhichOneof("outcome") == "error":
                    raise RuntimeError(result.error.message)
                num_tokens, sent = self._in_flight.pop(result.request_id)
                self.latencies.append(now - sent)
                self.payload_bytes += len(result.targets)
                freed += num_tokens
                count -= 1
            self.num_messages += bool(message.results.results)
            self.tokens += freed
            self.times.append((now, freed))
            async with self._room:
                self._held -= freed
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
