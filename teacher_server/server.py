"""A running server: gRPC with health around one scheduler, from loading to the end of draining."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from logitstream import codec, metrics
from logitstream.errors import LogitstreamError, one_line
from logitstream.files import write_whole
from logitstream.rpc.addresses import is_loopback
from logitstream.rpc.channel import server_options
from logitstream.rpc.tls import certificate_expiry, server_credentials
from logitstream.rpc.tokens import LastGood
from logitstream.tokenizer import Vocabulary
from logitstream.types import TeacherInfo
from teacher_server.access import BearerTokens, TokenInterceptor, check_tls
from teacher_server.admission import Admission
from teacher_server.backend import BATCH_TOKENS, TeacherBackend
from teacher_server.calls import HEALTH_SERVICE, SERVICE, Context, WhenLoaded, one_request
from teacher_server.checkpoints import LoadCheckpoint, watch_checkpoints
from teacher_server.config import LimitSettings, TeacherConfig
from teacher_server.encoding import encoder
from teacher_server.process import bind, in_own_thread, raise_file_limit, stopping_signals
from teacher_server.scheduler import CLOSE_SECONDS, Scheduler
from teacher_server.servicer import TeacherServicer
from teacher_server.stored_targets import CacheFolder, StoredTargets

DEFAULT_SEQUENCE_TOKENS = 8192
STOP_SECONDS = 1.0
"""How long gRPC itself may take after draining."""
EXIT_STUCK = 75
MAX_CALLS = 1024
"""Calls at a time, each with a request of up to max_message_bytes that is not counted before it is read."""
HEALTH_MESSAGE_BYTES = 64 << 10

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """A loaded teacher; vocabulary: for students whose tokenizer differs, None: they are told the digests alone."""

    backend: TeacherBackend
    id_model: bytes = b""
    vocabulary: Vocabulary | None = None


class TeacherServer:
    """One process's server: `run` takes it from loading to the end. load is called in a thread."""

    def __init__(
        self, config: TeacherConfig, load: Callable[[], Served], *, load_checkpoint: LoadCheckpoint | None = None
    ) -> None:
        self._config, self._load, self._load_checkpoint = config, load, load_checkpoint
        self._stopping = asyncio.Event()
        self._when_loaded = WhenLoaded()
        self._servers: list[aio.Server] = []
        self.admission = Admission(
            max_in_flight_tokens=config.limits.max_in_flight_tokens, max_queue_tokens=config.limits.max_queue_tokens
        )
        self.scheduler: Scheduler | None = None
        self.address = ""

    @property
    def serving(self) -> bool:
        """True while health says SERVING: the teacher is loaded, healthy and not draining."""
        scheduler = self.scheduler if self._when_loaded.handler is not None else None
        return scheduler is not None and scheduler.backend.healthy() and not scheduler.is_draining

    def stop(self) -> None:
        """Begin to drain; safe to call as a signal handler on the loop."""
        self._stopping.set()

    async def run(self) -> None:
        """Bind, load, serve until `stop`, drain. Raises what loading the backend raises."""
        try:
            await self._listen()
            stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
            loading = asyncio.ensure_future(in_own_thread(self._load_all))
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await self._serve(loading.result(), stopping)
        finally:
            await self._stop_listening()

    def _load_all(self) -> Served:
        codec.warm_up()
        served = self._load()
        configure_encoding = getattr(served.backend, "configure_encoding", None)
        if configure_encoding is not None:  # the backend encodes its targets itself
            configure_encoding(served.id_model, self._config.limits.max_message_bytes)
        return served

    async def _listen(self) -> None:
        config, limits, num_files, credentials = self._config.server, self._config.limits, raise_file_limit(), None
        log.info("up to %d files and connections may be open", num_files)
        if (certificate := self._config.tls).cert:
            check_tls(certificate)
            credentials = server_credentials(certificate)
            metrics.TEACHER_CERTIFICATE_EXPIRY.set_function(
                LastGood(
                    lambda: certificate_expiry(certificate.cert), "the certificate's expiry", default=math.nan
                ).read
            )
        elif not is_loopback(config.address):
            log.warning("plaintext on %s: whoever is on the network can read tokens and texts", config.address)
        server = aio.server(
            maximum_concurrent_rpcs=MAX_CALLS,
            interceptors=[TokenInterceptor(BearerTokens(Path(config.token_file)))] if config.token_file else [],
            options=server_options(limits.max_message_bytes, max_connections=limits.max_connections or num_files // 4),
        )
        health = grpc.method_handlers_generic_handler(
            HEALTH_SERVICE, {"Check": one_request(health_pb2.HealthCheckRequest, self._check_health)}
        )
        server.add_generic_rpc_handlers((health, self._when_loaded))
        self._servers.append(server)
        self.address = bind(server, config.address, credentials)
        if config.health_address:  # whatever fills the teacher's port leaves it its files
            server = aio.server(options=server_options(HEALTH_MESSAGE_BYTES, max_connections=num_files // 8))
            server.add_generic_rpc_handlers((health,))
            self._servers.append(server)
            bind(server, config.health_address)
        for server in self._servers:
            await server.start()

    async def _stop_listening(self) -> None:
        for server in self._servers:
            await server.stop(STOP_SECONDS)

    async def _check_health(self, request: Any, context: Context) -> None:
        """Answer the standard health service's Check, which probes call; there is no Watch."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        response = health_pb2.HealthCheckResponse
        await context.write(response(status=response.SERVING if self.serving else response.NOT_SERVING))

    async def _serve(self, served: Served, stopping: asyncio.Future[Any]) -> None:
        config, (backend, id_model, vocabulary) = self._config, served
        cache, limits, watch = config.cache, limits_for(config, backend.describe()), config.watch
        stored = None
        if cache.path:
            stored = StoredTargets(CacheFolder(cache.path, id_model=id_model, max_bytes=cache.max_bytes))
        encode = encoder(id_model, limits.max_message_bytes)
        batch_tokens = limits.max_batch_tokens or getattr(backend, "batch_tokens", BATCH_TOKENS)
        scheduler = Scheduler(backend, encode, max_batch_tokens=batch_tokens, stored=stored)
        self.scheduler = scheduler
        running = asyncio.ensure_future(scheduler.run())
        tasks: list[asyncio.Future[Any]] = [running]
        try:
            if stored is not None:
                tasks.append(asyncio.ensure_future(stored.refresh()))
            if watch.folder and self._load_checkpoint is not None:
                watching = watch_checkpoints(
                    Path(watch.folder),
                    every_seconds=watch.seconds,
                    load=self._load_checkpoint,
                    replace=scheduler.replace_backend,
                    has_looked=(has_looked := asyncio.Event()),
                )
                tasks += [asyncio.ensure_future(watching), looking := asyncio.ensure_future(has_looked.wait())]
                await asyncio.wait({stopping, running, looking}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                servicer = TeacherServicer(scheduler, self.admission, limits, id_model=id_model, vocabulary=vocabulary)
                self._when_loaded.handler = servicer.handler
                if config.server.address_file:
                    write_whole(Path(config.server.address_file), self.address + "\n")
                print(f"serving on {self.address}", flush=True)
            await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            await self._drain(scheduler)
        finally:
            for task in tasks:
                task.cancel()
            await scheduler.close()

    async def _drain(self, scheduler: Scheduler) -> None:
        """Answer the calls that run, within drain_seconds; new ones are refused."""
        log.info("draining: %d sequences in flight", scheduler.num_unfinished)
        scheduler.is_draining = True
        deadline = time.monotonic() + self._config.server.drain_seconds
        while self.admission.num_calls and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        log.info("drained: %d calls left unanswered", self.admission.num_calls)
        await self._stop_listening()


def serve(config: TeacherConfig, load: Callable[[], Served], *, load_checkpoint: LoadCheckpoint | None = None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, drain, and end this process.

    Nothing is waited for after drain_seconds: the status is EXIT_STUCK if a batch or a disk is still busy, 1 if the
    backend broke, else 0, also while weights are loaded. SystemExit says in a line why the server cannot start.
    """

    async def main() -> None:
        if config.metrics.port >= 0:
            port = metrics.serve(config.metrics.port, side="teacher", address=config.metrics.address)
            log.info("metrics on %s:%d", config.metrics.address, port)
        server, status = TeacherServer(config, load, load_checkpoint=load_checkpoint), 0
        for number in stopping_signals():
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        try:
            await server.run()
        except Exception:
            if server.scheduler is None:
                raise
            log.exception("the server ends")
            status = 1
        if server.scheduler is not None and server.scheduler.is_stuck:
            log.error("a batch or the disk was still busy %g s after draining", CLOSE_SECONDS)
            status = EXIT_STUCK
        logging.shutdown()
        os._exit(status)  # the interpreter would wait for threads that load weights, or not survive them

    try:
        asyncio.run(main())
    except (OSError, ValueError, LogitstreamError) as error:
        log.debug("cannot start", exc_info=error)
        raise SystemExit(f"teacher-server: {one_line(error)}") from error


def limits_for(config: TeacherConfig, info: TeacherInfo) -> LimitSettings:
    """Return the settings' limits, within what the backend can do."""
    longest = min(config.limits.max_sequence_tokens or DEFAULT_SEQUENCE_TOKENS, info.max_sequence_tokens)
    return replace(config.limits, max_sequence_tokens=longest)
