"""The standard health service.

grpc_health's own writes to watchers under the lock that setting a status needs, so a watcher that does not read, who
may be a stranger, would hold it up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from teacher_server.calls import HEALTH_SERVICE, Context, one_request

MAX_WATCHERS = 64
"""Watchers need no token and stay as long as they like, so they are few; `Check` is answered beside any number."""

Response = health_pb2.HealthCheckResponse


class Health:
    """The status of each of `services`: NOT_SERVING until `set` says otherwise."""

    def __init__(self, *services: str) -> None:
        self._services = services
        self._changed = asyncio.Event()
        self._num_watchers = 0
        self.serving = False
        self.handler = grpc.method_handlers_generic_handler(
            HEALTH_SERVICE,
            {
                "Check": one_request(health_pb2.HealthCheckRequest, self._check),
                "Watch": one_request(health_pb2.HealthCheckRequest, self._watch),
            },
        )

    def set(self, *, serving: bool) -> None:
        self.serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return Response(status=Response.SERVICE_UNKNOWN)
        return Response(status=Response.SERVING if self.serving else Response.NOT_SERVING)

    async def _check(self, request: Any, context: Context) -> None:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        await context.write(self._status(request.service))

    async def _watch(self, request: Any, context: Context) -> None:
        """Write each change; a slow watcher sees only the latest status."""
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already: call Check instead")
        self._num_watchers += 1
        try:
            told = None
            while True:
                changed = self._changed
                if (status := self._status(request.service)) != told:
                    await context.write(status)
                    told = status
                await changed.wait()
        finally:
            self._num_watchers -= 1
