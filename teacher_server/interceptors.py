"""What stands before the servicer: who is let in, and the answer while the teacher loads."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from logitstream import metrics
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.access import BearerTokens, bearer_tokens, caller
from teacher_server.config import TeacherConfig
from teacher_server.servicer import TeacherServicer

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = "/grpc.reflection."
REFLECTION_SECONDS = 10.0
REFUSALS_LOG_SECONDS = 10.0
"""Callers without a known token are logged in one line this often, whatever they send."""

log = logging.getLogger(__name__)


class TokenGate(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets calls with a known token through, and health checks without one: probes hold no secrets."""

    def __init__(self, tokens: BearerTokens, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = tokens
        self._refusals = Refusals(clock=clock)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        metadata = dict(details.invocation_metadata or ())
        if details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return await continuation(details)
        authorization = metadata.get("authorization")
        name = self._tokens.name_of(authorization)
        if name is not None:
            caller.set(name)
            return await continuation(details)
        reason = "no token" if authorization is None else "an unknown token"
        return aborting(
            grpc.StatusCode.UNAUTHENTICATED,
            "expected a known bearer token as `authorization` metadata",
            notice=lambda peer: self._refusals.note(peer, reason),
        )


class BriefReflection(aio.ServerInterceptor):  # type: ignore[type-arg]
    """Ends calls of server reflection after a while: where no token is asked for, idle ones would hold connections."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(REFLECTION):
            return handler

        async def reflect(requests: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async with asyncio.timeout(REFLECTION_SECONDS):
                    async for response in handler.stream_stream(requests, context):
                        yield response
            except TimeoutError:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"reflection ends after {REFLECTION_SECONDS:g} s")

        return grpc.stream_stream_rpc_method_handler(
            reflect, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


class Refusals:
    """Counts the calls that are not let in, and logs where they come from, a line for all of some seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged = -math.inf
        self._unlogged = 0

    def note(self, peer: str, reason: str) -> None:
        """One more; `peer` as gRPC names it: ipv4:ADDRESS:PORT."""
        metrics.TEACHER_UNAUTHENTICATED.inc()
        self._unlogged += 1
        now = self._clock()
        if now - self._logged >= REFUSALS_LOG_SECONDS:
            log.warning("refused %d calls without a known token, the last from %s: %s", self._unlogged, peer, reason)
            self._logged, self._unlogged = now, 0


class WhenLoaded(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The teacher's calls once there is a teacher, UNAVAILABLE before."""

    def __init__(self) -> None:
        self.servicer: TeacherServicer | None = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if self.servicer is not None:
            return self.servicer.handler().service(details)
        if details.method.startswith(f"/{SERVICE}/"):
            return aborting(grpc.StatusCode.UNAVAILABLE, "the teacher is loading")
        return None


def aborting(code: grpc.StatusCode, details: str, *, notice: Callable[[str], None] = lambda _peer: None) -> Any:
    """A handler that ends any kind of call before it reads a message; `notice` is told who called."""

    async def abort(_requests: object, context: aio.ServicerContext[Any, Any]) -> None:
        notice(context.peer())
        await context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(abort)


def interceptors(config: TeacherConfig) -> list[aio.ServerInterceptor[Any, Any]]:
    tokens = bearer_tokens(config.server.token_file, config.server.token_env)
    return [BriefReflection()] if tokens is None else [TokenGate(tokens), BriefReflection()]
