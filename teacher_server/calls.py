"""Calls that strangers may make: each sends one request in time, and ends with a status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health_pb2

from logitstream.errors import LogitstreamError, ProtocolViolation, TeacherUnavailable
from logitstream.rpc.status import status_of, trailing_metadata
from logitstream.rpc.v1 import teacher_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REQUEST_SECONDS = 10.0
"""A call that does not send its request holds its connection no longer than this."""
GONE_SECONDS = 10.0
"""gRPC cancels the call of a client that has gone; this is how long it may take to notice."""

Context = aio.ServicerContext[Any, Any]


def one_request(kind: Any, answer: Callable[[Any, Context], Awaitable[None]]) -> Any:
    """Return a handler that reads one message of `kind` and has `answer(message, context)` write the responses.

    The request is read and parsed here, which gRPC would do by itself: so a silent caller is cut off, and bytes that
    are no message get INVALID_ARGUMENT. Any LogitstreamError ends the call with its status.
    """

    async def handle(_requests: object, context: Context) -> None:
        try:
            try:
                await answer(await _read(kind, context), context)
            except LogitstreamError as error:
                await context.abort(status_of(error), str(error), trailing_metadata(error))
        except aio.InternalError:  # written to a client that has gone
            await asyncio.sleep(GONE_SECONDS)

    return grpc.stream_stream_rpc_method_handler(
        handle,
        response_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
    )


def aborting(code: grpc.StatusCode, details: str, *, notice: Callable[[str], None] = lambda _peer: None) -> Any:
    """Return a handler that ends a call of any kind before it reads a message; `notice` is told who called."""

    async def abort(_requests: object, context: Context) -> None:
        notice(context.peer())
        await context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(abort)


class WhenLoaded(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
    """The teacher's calls once `handler` is set, UNAVAILABLE before."""

    handler: grpc.GenericRpcHandler[Any, Any] | None = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if self.handler is not None:
            return self.handler.service(details)
        if details.method.startswith(f"/{SERVICE}/"):
            return aborting(grpc.StatusCode.UNAVAILABLE, "the teacher is loading")
        return None


async def _read(kind: Any, context: Context) -> Any:
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            data = await context.read()
    except TimeoutError:
        raise TeacherUnavailable(f"no request within {REQUEST_SECONDS:g} seconds") from None
    if data is aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
        raise ProtocolViolation("the call ended before its request")
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ProtocolViolation(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}") from None
