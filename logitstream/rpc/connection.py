"""The student's end of one connection to one teacher replica: the handshake, then typed messages both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
from grpc import aio

from logitstream.errors import AccessDenied, ProtocolViolation, RequestError, TeacherUnavailable
from logitstream.rpc.channel import bearer_metadata
from logitstream.rpc.convert import (
    error_from_message,
    info_from_message,
    request_to_message,
    requests_to_message,
    spec_to_message,
)
from logitstream.rpc.status import error_of
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
from logitstream.tokenizer import Vocabulary
from logitstream.types import TargetSpec, TeacherInfo, TokenSequence

RESULT_FRAMING_BYTES = 5 + 6
"""At most, around one result: gRPC's prefix of its message, and the tags and lengths of the two fields it lies in."""
MAX_REQUESTS_BYTES = 1 << 20
"""Sequences are sent in messages of about this size, so that one message never delays the stream for long."""

MAX_TOKENIZER_BYTES = 32 << 20
"""Of a teacher's vocabulary, deflated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One sequence on its way to the teacher."""

    request_id: int
    sequence: TokenSequence
    draw_set: int
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Encoded targets of one sequence, or what was wrong with it; wire_bytes: all that it took in gRPC messages."""

    request_id: int
    payload: bytes = b""
    wire_bytes: int = 0
    error: RequestError | None = None
    teacher_version: int = 0
    weights_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Credit:
    """A new bound on the tokens in flight."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The replica goes away; what is in flight is still answered."""

    grace_seconds: float


Event = Answer | Credit | Draining


class TeacherConnection:
    """One channel and at most one stream on it; used from one event loop.

    Its methods raise TeacherUnavailable where another try may succeed, another LogitstreamError where none will.
    """

    def __init__(self, channel: aio.Channel, *, address: str, timeout_seconds: float, token: str | None = None) -> None:
        self._channel = channel
        self._stub = TeacherServiceStub(channel)
        self._address = address
        self._timeout = timeout_seconds
        self._metadata = bearer_metadata(token)
        self._max_message_bytes = MAX_REQUESTS_BYTES
        self._call: aio.StreamStreamCall[pb.StreamTargetsRequest, pb.StreamTargetsResponse] | None = None

    async def describe(self) -> TeacherInfo:
        try:
            message = await self._stub.Describe(pb.DescribeRequest(), timeout=self._timeout, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise self._error(error.code(), error.details()) from None
        try:
            info = info_from_message(message)
        except ProtocolViolation as error:
            raise ProtocolViolation(f"{self._address}: {error}") from None
        self._max_message_bytes = min(MAX_REQUESTS_BYTES, info.max_message_bytes)
        return info

    async def describe_tokenizer(self) -> Vocabulary:
        """The teacher's, in full: megabytes for a large one."""
        data = bytearray()
        try:
            parts = self._stub.DescribeTokenizer(
                pb.DescribeTokenizerRequest(), timeout=self._timeout, metadata=self._metadata
            )
            async for part in parts:
                data += part.data
                if len(data) > MAX_TOKENIZER_BYTES:
                    raise ProtocolViolation(f"{self._address}: a vocabulary of more than {MAX_TOKENIZER_BYTES} bytes")
        except aio.AioRpcError as error:
            raise self._error(error.code(), error.details()) from None
        try:
            return await asyncio.to_thread(Vocabulary.from_bytes, bytes(data))
        except ValueError as error:
            raise ProtocolViolation(f"{self._address}: {error}") from None

    async def open(
        self, spec: TargetSpec, *, client_id: str, vocab_size: int, tokenizer_digest: str, weights_digest: str
    ) -> int:
        """Start the stream; the tokens that may be in flight."""
        self._call = self._stub.StreamTargets(metadata=self._metadata)  # type: ignore[call-arg]  # written to, not iterated
        hello = pb.Open(
            client_id=client_id,
            vocab_size=vocab_size,
            tokenizer_digest=tokenizer_digest,
            weights_digest=weights_digest,
            spec=spec_to_message(spec),
        )
        try:
            async with asyncio.timeout(self._timeout):
                await self._write(pb.StreamTargetsRequest(open=hello))
                response = await self._read()
        except TimeoutError:
            raise TeacherUnavailable(f"{self._address}: no answer to the handshake in {self._timeout:g} s") from None
        if response is None or response.WhichOneof("kind") != "opened":
            raise ProtocolViolation(f"{self._address}: expected `opened` as the first message")
        return int(response.opened.max_in_flight_tokens)

    async def send(self, requests: Sequence[Outgoing]) -> None:
        """Write the requests in as few messages as their size allows."""
        batch: list[pb.TargetRequest] = []
        size = 0
        for request in requests:
            message = request_to_message(
                request.request_id, request.sequence, draw_set=request.draw_set, priority=max(request.priority, 0)
            )
            num_bytes = request_bytes(request.sequence)
            if batch and size + num_bytes > self._max_message_bytes:
                await self._write(requests_to_message(batch))
                batch, size = [], 0
            batch.append(message)
            size += num_bytes
        if batch:
            await self._write(requests_to_message(batch))

    async def cancel(self, request_ids: Sequence[int]) -> None:
        await self._write(pb.StreamTargetsRequest(cancel=pb.Cancel(request_ids=request_ids)))

    async def events(self) -> AsyncIterator[Event]:
        """What the teacher sends, until it ends the stream."""
        while (response := await self._read()) is not None:
            match response.WhichOneof("kind"):
                case "results":
                    for result in response.results.results:
                        yield answer_from_message(result)
                case "credit":
                    yield Credit(response.credit.max_in_flight_tokens)
                case "draining":
                    yield Draining(response.draining.grace_seconds)
                case _:
                    raise ProtocolViolation(f"{self._address}: expected results, credit or draining")

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    async def _read(self) -> pb.StreamTargetsResponse | None:
        """The next message; None where the server has ended the stream well."""
        assert self._call is not None
        try:
            response = await self._call.read()
            if isinstance(response, pb.StreamTargetsResponse):  # not aio.EOF
                return response
            code = await self._call.code()
        except aio.AioRpcError as error:
            raise self._error(error.code(), error.details()) from None
        if code is grpc.StatusCode.OK:
            return None
        raise self._error(code, await self._call.details())

    async def _write(self, message: pb.StreamTargetsRequest) -> None:
        assert self._call is not None
        try:
            await self._call.write(message)
        except aio.AioRpcError as error:
            raise self._error(error.code(), error.details()) from None
        except (aio.InternalError, asyncio.InvalidStateError) as error:  # the stream has just ended; reading says why
            raise TeacherUnavailable(f"{self._address}: {error}") from None

    def _error(self, code: grpc.StatusCode, details: str | None) -> Exception:
        error = error_of(code, details or "")
        hint = ""
        if isinstance(error, AccessDenied):
            sent = "the token that was sent is none of the server's" if self._metadata else "no token was sent"
            hint = f" ({sent}: see token_file and $LOGITSTREAM_TOKEN)"
        return type(error)(f"{self._address}: {error}{hint}")


def request_bytes(sequence: TokenSequence) -> int:
    """An upper bound on one request's size in a message."""
    return 64 + 4 * len(sequence) + len(sequence) // 8


def answer_from_message(result: pb.Result) -> Answer:
    error: RequestError | None = None
    if result.WhichOneof("outcome") != "targets":
        error = error_from_message(result.error)
    return Answer(
        wire_bytes=result.ByteSize() + RESULT_FRAMING_BYTES,
        request_id=result.request_id,
        payload=result.targets,
        error=error,
        teacher_version=result.teacher_version,
        weights_digest=result.weights_digest,
    )
