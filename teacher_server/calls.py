"""Calls of one request, from its bytes to the status that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from logitstream.errors import LogitstreamError, ProtocolViolation, TeacherUnavailable
from logitstream.rpc.status import status_of, trailing_metadata

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
        handle, response_serializer=lambda message: message.SerializeToString()
    )


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
