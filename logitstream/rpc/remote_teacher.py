"""The calls of one teacher server, as its clients make them: typed values in and out, this package's errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from grpc import aio

from logitstream.errors import AccessDenied, ProtocolViolation, RequestError
from logitstream.rpc.channel import bearer_metadata
from logitstream.rpc.convert import error_from_message, info_from_message, sequence_to_message, spec_to_message
from logitstream.rpc.status import error_of
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
from logitstream.tokenizer import Vocabulary
from logitstream.types import ReceivedTargets, TargetSpec, TeacherInfo, TokenSequence

FRAMING_BYTES = 5
"""A result's tag and length in its message, and its share of gRPC's own five bytes."""
MAX_TOKENIZER_BYTES = 32 << 20
"""Largest vocabulary taken from a teacher, deflated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The client's part of every `Score`: its name, and what it expects of the teacher; empty digests: anything."""

    client_id: str
    vocab_size: int
    tokenizer_digest: str = ""
    weights_digest: str = ""


class RemoteTeacher:
    """One server behind one channel; used from one event loop. Any number of calls may run side by side.

    Methods raise TeacherUnavailable, or TooManyInFlight with `retry_after_seconds`, if another try may succeed, and
    another LogitstreamError if none will. Cancelling a call, or closing its iterator, cancels it on the server.
    """

    def __init__(self, channel: aio.Channel, *, address: str, timeout_seconds: float, token: str | None = None) -> None:
        self._channel = channel
        self._stub = TeacherServiceStub(channel)
        self._address = address
        self._timeout = timeout_seconds
        self._metadata = bearer_metadata(token)

    async def describe(self) -> TeacherInfo:
        """Ask what is served now."""
        call = self._stub.Describe(pb.DescribeRequest(), timeout=self._timeout, metadata=self._metadata)
        with self._naming_errors():
            return info_from_message(await call)

    async def describe_tokenizer(self) -> Vocabulary:
        """Fetch the teacher's whole vocabulary: megabytes for a large one."""
        data, request = bytearray(), pb.DescribeTokenizerRequest()
        with self._naming_errors():
            async for part in self._stub.DescribeTokenizer(request, timeout=self._timeout, metadata=self._metadata):
                data += part.data
                if len(data) > MAX_TOKENIZER_BYTES:
                    raise ProtocolViolation(f"a vocabulary of more than {MAX_TOKENIZER_BYTES} bytes")
            try:
                return await asyncio.to_thread(Vocabulary.from_bytes, bytes(data))
            except ValueError as error:
                raise ProtocolViolation(str(error)) from None

    async def score(
        self,
        sequences: Sequence[TokenSequence],
        spec: TargetSpec,
        caller: Caller,
        *,
        draw_set: int = 0,
        priority: int = 0,
        deadline_seconds: float | None = None,
    ) -> AsyncGenerator[tuple[int, ReceivedTargets | RequestError]]:
        """Yield the place of each sequence and what became of it, as each is ready; raise if the call fails on the way.

        A call may have TeacherInfo.max_in_flight_tokens (`types.call_tokens`), or a single sequence. Read promptly:
        what is not read counts against this client. The targets name no fingerprint yet.
        """
        request = pb.ScoreRequest(
            **asdict(caller),
            spec=spec_to_message(spec),
            draw_set=draw_set,
            priority=max(priority, 0),
            sequences=map(sequence_to_message, sequences),
        )
        missing = set(range(len(sequences)))
        call = self._stub.Score(request, timeout=deadline_seconds, metadata=self._metadata)
        try:
            with self._naming_errors():
                async for message in call:
                    for result in message.results:
                        if result.index not in missing:
                            raise ProtocolViolation(f"an answer to sequence {result.index}, which none awaits")
                        missing.remove(result.index)
                        yield result.index, _outcome(result)
                if missing:
                    raise ProtocolViolation(f"the call ended well with {len(missing)} sequences unanswered")
        finally:
            call.cancel()

    async def close(self) -> None:
        """End all calls and the channel."""
        await self._channel.close(None)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Raise a call's errors as this package's, with the server's address before their words."""
        try:
            yield
        except ProtocolViolation as violation:
            raise ProtocolViolation(f"{self._address}: {violation}") from None
        except aio.AioRpcError as failed:
            error = error_of(failed.code(), failed.details() or "", failed.trailing_metadata())
            hint = ""
            if isinstance(error, AccessDenied):
                sent = "the token that was sent is none of the server's" if self._metadata else "no token was sent"
                hint = f" ({sent}: see teacher.token_file and $LOGITSTREAM_TOKEN)"
            error.args = (f"{self._address}: {error}{hint}",)
            raise error from None


def _outcome(result: pb.ScoreResult) -> ReceivedTargets | RequestError:
    if result.WhichOneof("outcome") != "targets":
        return error_from_message(result.error)
    return ReceivedTargets(
        payload=result.targets,
        teacher_version=result.teacher_version,
        weights_digest=result.weights_digest,
        wire_bytes=result.ByteSize() + FRAMING_BYTES,
    )
