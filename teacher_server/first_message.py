"""The first message of a call: waited for only so long, and refused where it is none."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.message import DecodeError
from grpc import aio

from logitstream.errors import ProtocolViolation, TeacherUnavailable

FIRST_MESSAGE_SECONDS = 10.0
"""A call that says nothing holds its connection for no longer."""

Context = aio.ServicerContext[Any, Any]
EOF = aio.EOF  # type: ignore[attr-defined]  # the stubs lack it


async def first_message(context: Context, kind: Any, *, name: str = "request") -> Any:
    """Read and parse the first message of a call.

    ProtocolViolation where there is none or it is no `kind`; TeacherUnavailable, after which clients try again, where
    none comes in time.
    """
    try:
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
            data = await context.read()
    except TimeoutError:
        raise TeacherUnavailable(f"no {name} within {FIRST_MESSAGE_SECONDS:g} seconds") from None
    if data is EOF:
        raise ProtocolViolation(f"the call ended before its {name}")
    return parse(kind, data)


def parse(kind: Any, data: bytes) -> Any:
    """The message that the bytes are; ProtocolViolation where they are none of `kind`."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ProtocolViolation(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}") from None
