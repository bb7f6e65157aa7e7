"""The seam between training and teachers, `TeacherClient`, and the client of one or many teacher servers."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from logitstream.client.connections import Connecting, Connections, TeacherSettings, check_access
from logitstream.client.delivery import Delivery
from logitstream.client.replica import Request, RequestBatch
from logitstream.client.replicas import ReplicaPool
from logitstream.client.teacher_identity import OwnTokenizer, TeacherIdentity
from logitstream.errors import TeacherUnavailable
from logitstream.rpc.tls import TlsSettings
from logitstream.tokenizer import HasVocabulary, Vocabulary
from logitstream.types import (
    Fingerprint,
    ReceivedTargets,
    TargetSpec,
    TeacherInfo,
    TokenSequence,
    credit_tokens,
)

TICK_SECONDS = 0.5
"""How often stalled replicas are looked for."""


class TeacherClient(Protocol):
    """Sequences in, encoded targets out; safe to call from several threads. The TargetSpec is fixed at construction."""

    @property
    def info(self) -> TeacherInfo:
        """The newest version of the teacher that is served."""
        ...

    @property
    def spec(self) -> TargetSpec: ...

    @property
    def max_teacher_lag(self) -> int:
        """See TeacherIdentity. Other than 0: the teacher may replace its weights while a student trains."""
        ...

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """Ask for the targets of a batch, the smaller the priority the sooner; never blocks on the network.

        Cancelling a future cancels its request. It fails with the RequestError that the teacher answered,
        TeacherUnavailable after the deadline, StaleTeacher or FingerprintMismatch.
        """
        ...

    def close(self) -> None:
        """Cancel what is in flight and close connections; idempotent."""
        ...


class GrpcTeacherClient:
    """One or many teacher replicas behind addresses and DNS names, asked by an event loop in a background thread.

    A sequence is asked for again, elsewhere if possible, when its call breaks, and answered once: by its future.
    """

    def __init__(
        self,
        teacher: TeacherSettings | Sequence[str],
        spec: TargetSpec,
        *,
        vocab_size: int,
        tokenizer: HasVocabulary | Vocabulary | str,
        tls: TlsSettings | None = None,
        token: str = "",
        fingerprint: Fingerprint | None = None,
        connecting: Connecting | None = None,
    ) -> None:
        """Connect in the background. Raises ValueError for a bad address, token or certificate, or for plaintext to
        another machine without `tls.insecure`.

        teacher: settings, or addresses alone. vocab_size: rows of the student's head. tokenizer: the student's; or its
            `tokenizer_digest`, which cannot tell what differs; UNCHECKED_TOKENIZER if the caller vouches that ids mean
            the same to the teacher. token: wins over teacher.token_file, which wins over $LOGITSTREAM_TOKEN.
        fingerprint: of the teacher to accept; None: the first replica's.
        """
        settings = teacher if isinstance(teacher, TeacherSettings) else TeacherSettings(addresses=list(teacher))
        tls = tls or TlsSettings()
        read_token = check_access(tls, settings.token_file, token=token)
        connecting = connecting or Connecting()
        self._connections = Connections(settings.addresses, tls, read_token, connecting)
        self.spec, self._vocab_size = spec, vocab_size
        self._connect_timeout = settings.connect_timeout_seconds
        self._identity = TeacherIdentity(
            spec,
            vocab_size=vocab_size,
            tokenizer=OwnTokenizer(tokenizer),
            client_id=settings.client_id,
            max_teacher_lag=settings.max_teacher_lag,
            fingerprint=fingerprint,
        )
        patience = (connecting.stalled_seconds, settings.deadline_seconds / 2)  # leaves time for another replica
        self._pool = ReplicaPool(self._identity, self._connections.connect, patience_seconds=patience)
        self._delivery = Delivery(self._pool, self._identity, deadline_seconds=settings.deadline_seconds)
        self._closed = threading.Event()
        self._loop = _background_loop(os.getpid())
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    @property
    def info(self) -> TeacherInfo:
        """Wait until a replica is ready and all that are up are known, for connect_timeout_seconds at most.

        Raises TeacherUnavailable, or FingerprintMismatch if none fits or, with no `fingerprint` given, some differ.
        """
        if self._pool.started and (info := self._identity.info) is not None:
            return info
        if self._closed.is_set():
            raise TeacherUnavailable("the client is closed")
        return asyncio.run_coroutine_threadsafe(self._wait_started(), self._loop).result()

    @property
    def max_teacher_lag(self) -> int:
        return self._identity.max_teacher_lag

    @property
    def serving(self) -> dict[str, TeacherInfo]:
        """The description of each replica that can be asked, by address."""
        replicas = list(self._pool.replicas.values())
        return {one.address: one.info for one in replicas if one.connection is not None and one.info is not None}

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        if not 0 <= draw_set < 1 << 64:
            raise ValueError(f"expected a draw set in [0, 2^64), got {draw_set}")
        if self._closed.is_set():
            raise TeacherUnavailable("the client is closed")
        requests = [Request(one, credit_tokens(one, self.spec, self._vocab_size)) for one in sequences]
        self._loop.call_soon_threadsafe(self._delivery.begin, RequestBatch(requests, draw_set, priority))
        return [request.future for request in requests]

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()

    async def _watch(self) -> None:
        """Look names up again and again, so that new replicas are found; give up replicas that are stalled."""
        while True:
            self._pool.set_addresses(await self._connections.look_up(self._pool.unresolved))
            until = self._loop.time() + self._connections.connecting.resolve_seconds
            while (left := until - self._loop.time()) > 0:
                await asyncio.sleep(min(TICK_SECONDS, left))
                self._pool.give_up_stalled()

    async def _wait_started(self) -> TeacherInfo:
        try:
            async with asyncio.timeout(self._connect_timeout):
                return await self._pool.wait_started()
        except TimeoutError:
            raise TeacherUnavailable(
                f"no teacher came up within {self._connect_timeout:g} s {self._pool.condition()}"
            ) from None

    async def _end(self) -> None:
        self._watching.cancel()
        await self._delivery.close()
        await self._pool.close()


@functools.cache
def _background_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """Return the one loop of a process's clients, never closed: grpc.aio hands late events to loops it has seen."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="teacher-client", daemon=True).start()
    return loop
