"""The seam between the target stream and teachers: the gRPC client of one or many replicas, and a local one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from logitstream import codec
from logitstream.client.access import check_access
from logitstream.client.dispatcher import DeliverySettings, Dispatcher
from logitstream.client.own_tokenizer import OwnTokenizer
from logitstream.client.replica import Request
from logitstream.client.resolver import resolve, teacher_host
from logitstream.client.teacher_identity import Identity, KnownTeacher
from logitstream.errors import TeacherUnavailable
from logitstream.id_model import IdModel
from logitstream.rpc.addresses import check_exposure
from logitstream.rpc.channel import (
    KEEPALIVE_SECONDS,
    KEEPALIVE_TIMEOUT_SECONDS,
    TlsFiles,
    open_channel,
    proxy_of,
)
from logitstream.rpc.connection import TeacherConnection
from logitstream.tokenizer import HasVocabulary, Vocabulary
from logitstream.types import (
    MAX_MESSAGE_BYTES,
    Fingerprint,
    ReceivedTargets,
    SparseTargets,
    TargetSpec,
    TeacherInfo,
    TokenSequence,
)

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5


class TeacherClient(Protocol):
    """Sequences in, encoded targets out; safe to call from several threads. The TargetSpec is fixed at construction."""

    @property
    def info(self) -> TeacherInfo:
        """What the teacher serves, as of the handshake or the newest version seen."""
        ...

    @property
    def spec(self) -> TargetSpec:
        """How every sequence's targets are drawn."""
        ...

    @property
    def max_teacher_lag(self) -> int:
        """As in KnownTeacher; other than 0: the teacher may replace its weights while a student trains."""
        ...

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """Ask for the targets of a batch of sequences; never blocks on the network. Returns one future a sequence.

        Cancelling a future cancels its request. It fails with the RequestError that the teacher answered,
        TeacherUnavailable after the deadline, StaleTeacher or FingerprintMismatch.
        """
        ...

    def is_stale(self, received: ReceivedTargets) -> bool:
        """Whether these targets come from weights older than the client's `max_teacher_lag` allows by now."""
        ...

    def close(self) -> None:
        """Cancel what is in flight and close connections; idempotent."""
        ...


class LocalTeacherClient:
    """A teacher in this process: `score(sequence, draw_set)` runs in one thread of the client's own."""

    max_teacher_lag = 0

    def __init__(
        self, score: Callable[[TokenSequence, int], SparseTargets], *, info: TeacherInfo, spec: TargetSpec
    ) -> None:
        self._score = score
        self._info = info
        self.spec = spec
        self._id_model = IdModel.from_bytes(info.id_model) if info.id_model else None
        self._digest = Fingerprint.of(info, spec).digest
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="local-teacher")

    @property
    def info(self) -> TeacherInfo:
        return self._info

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """Answer in the order of the calls, whatever their priority."""
        return [self._submit(sequence, draw_set) for sequence in sequences]

    def _submit(self, sequence: TokenSequence, draw_set: int) -> Future[ReceivedTargets]:
        """Return a future of our own: unlike the executor's it can be cancelled while `score` runs."""
        future: Future[ReceivedTargets] = Future()
        scored = self._executor.submit(self._answer, sequence, draw_set)

        def hand_on(done: Future[ReceivedTargets]) -> None:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                if done.cancelled():
                    future.cancel()
                elif (error := done.exception()) is not None:
                    future.set_exception(error)
                else:
                    future.set_result(done.result())

        future.add_done_callback(lambda _: scored.cancel())
        scored.add_done_callback(hand_on)
        return future

    def is_stale(self, received: ReceivedTargets) -> bool:
        return False

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _answer(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets:
        sequence.validate(vocab_size=self._info.vocab_size, max_sequence_tokens=self._info.max_sequence_tokens)
        targets = self._score(sequence, draw_set)
        if targets.spec is not None:
            drawn = replace(targets.spec, codec_version=self.spec.codec_version).canonical()
            if drawn != self.spec.canonical():
                raise ValueError(f"expected targets drawn by {self.spec.canonical()}, got {drawn}")
        return ReceivedTargets(
            payload=codec.encode(targets, version=self.spec.codec_version, id_model=self._id_model),
            fingerprint=self._digest,
            teacher_version=self._info.teacher_version,
            weights_digest=bytes.fromhex(self._info.weights_digest)[:8],
        )


class GrpcTeacherClient:
    """One or many teacher replicas behind addresses and DNS names, driven by an event loop in a background thread.

    Delivery is at least once on the wire and exactly once to the caller: a request is sent again when its connection
    breaks, and the first answer counts. `max_teacher_lag`: see KnownTeacher, the times: DeliverySettings. `token` wins
    over `token_file`, which wins over $LOGITSTREAM_TOKEN; files are read anew for every connection, so that tokens and
    certificates can be rotated.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        spec: TargetSpec,
        *,
        vocab_size: int,
        tokenizer: HasVocabulary | Vocabulary | str,
        client_id: str = "student",
        tls: TlsFiles | None = None,
        token: str = "",
        token_file: str = "",
        insecure: bool = False,
        deadline_seconds: float = 300.0,
        connect_timeout_seconds: float = 300.0,
        max_teacher_lag: int = 0,
        fingerprint: Fingerprint | None = None,
        stalled_seconds: float = 60.0,
        handshake_seconds: float = 10.0,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
        keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS,
        resolve_seconds: float = 15.0,
        resolve: Callable[[str], Awaitable[list[str]]] = resolve,
    ) -> None:
        """vocab_size: rows of the student's head. tokenizer: the student's; or its `tokenizer_digest`, which cannot
        tell what differs; UNCHECKED_TOKENIZER where the caller vouches that ids mean the same to the teacher.
        fingerprint: of the teacher to accept; None: the first replica's. resolve: a name to its addresses.

        Raises ValueError for an address that is none, plaintext to another machine without `insecure`, or a token or
        certificate that is none or cannot be read.
        """
        if not addresses:
            raise ValueError("expected at least one teacher address, host:port")
        self._names = {address: teacher_host(address) for address in addresses}
        check_exposure(addresses, encrypted=tls is not None, insecure=insecure)
        self._resolved: dict[str, list[str]] = {}
        self._tls, self._read_token = tls, check_access(tls, token=token, token_file=token_file)
        self._keepalive = {
            "keepalive_seconds": keepalive_seconds,
            "keepalive_timeout_seconds": keepalive_timeout_seconds,
        }
        self._handshake_seconds = handshake_seconds
        self._deadline_seconds = deadline_seconds
        self._connect_timeout = connect_timeout_seconds
        self._resolve, self._resolve_seconds = resolve, resolve_seconds
        self.spec = spec
        self._request_ids = itertools.count(1)
        self._stopping = asyncio.Event()
        self._closed = threading.Event()
        identity = Identity(client_id=client_id, vocab_size=vocab_size, tokenizer=OwnTokenizer(tokenizer), spec=spec)
        self._teacher = KnownTeacher(identity, max_teacher_lag=max_teacher_lag, fingerprint=fingerprint)
        self._dispatcher = Dispatcher(
            identity=identity,
            teacher=self._teacher,
            settings=DeliverySettings(deadline_seconds=deadline_seconds, stalled_seconds=stalled_seconds),
            connect=self._connect,
        )
        self._loop = _background_loop(os.getpid())
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(), self._loop)

    @property
    def info(self) -> TeacherInfo:
        """Waits until a replica is ready and all that are up are known, for connect_timeout_seconds at most.

        Raises TeacherUnavailable, or FingerprintMismatch where none fits or, with no `fingerprint` given, some differ.
        """
        if self._dispatcher.fleet.started and (info := self._teacher.info) is not None:
            return info
        if self._closed.is_set():
            raise TeacherUnavailable("the client is closed")
        waiting = self._dispatcher.wait_ready(self._connect_timeout)
        return asyncio.run_coroutine_threadsafe(waiting, self._loop).result()

    @property
    def known_info(self) -> TeacherInfo | None:
        """As `info` where a replica has described itself by now; never waits."""
        return self._teacher.info

    @property
    def max_teacher_lag(self) -> int:
        return self._teacher.max_teacher_lag

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """As TeacherClient.submit; the smaller the priority, the sooner."""
        return [self._submit(sequence, draw_set, priority) for sequence in sequences]

    def _submit(self, sequence: TokenSequence, draw_set: int, priority: int) -> Future[ReceivedTargets]:
        if not 0 <= draw_set < 1 << 64:
            raise ValueError(f"expected a draw set in [0, 2^64), got {draw_set}")
        request = Request(
            request_id=next(self._request_ids),
            sequence=sequence,
            draw_set=draw_set,
            priority=priority,
            deadline=time.monotonic() + self._deadline_seconds,
        )
        if self._closed.is_set():
            raise TeacherUnavailable("the client is closed")
        request.future.add_done_callback(functools.partial(self._done, request.request_id))
        self._loop.call_soon_threadsafe(self._dispatcher.submit, request)
        return request.future

    def is_stale(self, received: ReceivedTargets) -> bool:
        return self._teacher.is_stale(received.weights_digest)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._serving.result()

    def _done(self, request_id: int, future: Future[ReceivedTargets]) -> None:
        if future.cancelled() and not self._closed.is_set():
            self._loop.call_soon_threadsafe(self._dispatcher.cancel, request_id)

    async def _serve(self) -> None:
        resolving = asyncio.ensure_future(self._keep_resolving())
        try:
            while not self._stopping.is_set():
                self._dispatcher.tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), TICK_SECONDS)
        finally:
            resolving.cancel()
            await asyncio.gather(resolving, return_exceptions=True)
            await self._dispatcher.close()

    async def _keep_resolving(self) -> None:
        """Names are looked up again and again, so that new replicas are found; a failed look-up changes nothing."""
        while True:
            await asyncio.gather(*(self._look_up(address) for address in self._names))
            self._dispatcher.fleet.set_addresses([ip for ips in self._resolved.values() for ip in ips])
            await asyncio.sleep(self._resolve_seconds)

    async def _look_up(self, address: str) -> None:
        try:
            self._resolved[address] = await self._resolve(address)
        except (OSError, ValueError) as error:  # ValueError: what can be no name, for an empty label
            self._dispatcher.fleet.unresolved(address, error)

    def _server_name(self, address: str) -> str:
        """The name that stands for this address, which is what a certificate holds; empty: the address itself."""
        names = (self._names[name] for name, ips in self._resolved.items() if address in ips and address != name)
        return next(names, "")

    def _connect(self, address: str) -> TeacherConnection:
        name, token = self._server_name(address), self._read_token()
        channel = open_channel(
            address, max_message_bytes=MAX_MESSAGE_BYTES, tls=self._tls, server_name=name, **self._keepalive
        )
        proxy = proxy_of(address, name)
        return TeacherConnection(
            channel,
            address=f"{address} through the proxy {proxy}" if proxy else address,
            timeout_seconds=self._handshake_seconds,
            token=token,
        )


@functools.cache
def _background_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """One loop for all clients of a process, never closed: grpc.aio hands late events to the loops that it has seen."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="teacher-client", daemon=True).start()
    return loop
