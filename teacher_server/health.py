"""The standard health service; its watchers are strangers, so setting a status never waits for one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from logitstream.errors import LogitstreamError
from logitstream.rpc.status import status_of
from teacher_server.first_message import Context, first_message

MAX_WATCHERS = 64
"""Watchers need no token and stay as long as they like, so they are few; `Check` is answered beside any number."""

HealthCheckResponse = health_pb2.HealthCheckResponse


class Health:
    """NOT_SERVING for each of `services` until `set` says otherwise.

    grpc_health's own servicer writes to watchers under the lock that setting needs: one that does not read holds it.
    """

    def __init__(self, *services: str) -> None:
        self._status = dict.fromkeys(services, HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()
        self._num_watchers = 0

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a gRPC server serves; both calls read their one request here, so that a silent caller is cut off."""
        return grpc.method_handlers_generic_handler(
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            {
                "Check": grpc.stream_stream_rpc_method_handler(self._check),
                "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
            },
        )

    @property
    def serving(self) -> bool:
        """Whether the services were last set to SERVING."""
        return all(status == HealthCheckResponse.SERVING for status in self._status.values())

    def set(self, *, serving: bool) -> None:
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._status = dict.fromkeys(self._status, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _check(self, _requests: object, context: Context) -> None:
        service = await _asked_for(context)
        if service not in self._status:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        await context.write(HealthCheckResponse(status=self._status[service]).SerializeToString())

    async def _watch(self, _requests: object, context: Context) -> None:
        """Each change as the watcher reads it; what changes meanwhile is told by its end alone."""
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already: call Check instead")
        self._num_watchers += 1
        try:
            service = await _asked_for(context)
            told = None
            while True:
                changed = self._changed
                status = self._status.get(service, HealthCheckResponse.SERVICE_UNKNOWN)
                if status != told:
                    await context.write(HealthCheckResponse(status=status).SerializeToString())
                    told = status
                await changed.wait()
        finally:
            self._num_watchers -= 1


async def _asked_for(context: Context) -> str:
    """The service that a call names; ends the call where it names none in time."""
    try:
        request = await first_message(context, health_pb2.HealthCheckRequest)
    except LogitstreamError as error:
        await context.abort(status_of(error), str(error))
    service: str = request.service
    return service
