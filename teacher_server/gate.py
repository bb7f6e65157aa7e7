"""What stands before the servicer: who is let in, and the answer while the teacher loads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.access import BearerTokens, bearer_tokens, caller
from teacher_server.config import TeacherConfig
from teacher_server.servicer import TeacherServicer

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class TokenGate(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets calls with a known token through, and health checks without one: probes hold no secrets."""

    def __init__(self, tokens: BearerTokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        metadata = dict(details.invocation_metadata or ())
        if details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return await continuation(details)
        name = self._tokens.name_of(metadata.get("authorization"))
        if name is not None:
            caller.set(name)
            return await continuation(details)
        return aborting(grpc.StatusCode.UNAUTHENTICATED, "expected a known bearer token as `authorization` metadata")


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


def aborting(code: grpc.StatusCode, details: str) -> Any:
    """A handler that ends any kind of call before it reads a message."""

    async def abort(_requests: object, context: aio.ServicerContext[Any, Any]) -> None:
        await context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(abort)


def interceptors(config: TeacherConfig) -> list[aio.ServerInterceptor[Any, Any]]:
    tokens = bearer_tokens(config.token_file, config.token_env)
    return [] if tokens is None else [TokenGate(tokens)]
