"""The standard health service; its watchers are strangers, so setting a status never waits for one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

HealthCheckResponse = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """NOT_SERVING for each of `services` until `set` says otherwise.

    grpc_health's own servicer writes to watchers under the lock that setting needs: one that does not read holds it.
    """

    def __init__(self, *services: str) -> None:
        self._status = dict.fromkeys(services, HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()

    def set(self, *, serving: bool) -> None:
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._status = dict.fromkeys(self._status, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802  # gRPC's name
        if request.service not in self._status:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return HealthCheckResponse(status=self._status[request.service])

    async def Watch(self, request: Any, context: aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """Each change as the watcher reads it; what changes meanwhile is told by its end alone."""
        told = None
        while True:
            changed = self._changed
            status = self._status.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await context.write(HealthCheckResponse(status=status))
                told = status
            await changed.wait()
