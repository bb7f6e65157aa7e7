"""A running server: gRPC with health around one scheduler, from loading to the end of draining."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypedDict, Unpack

from grpc import aio

from logitstream import codec, metrics
from logitstream.errors import LogitstreamError, one_line
from logitstream.files import write_whole
from logitstream.rpc.addresses import is_loopback
from logitstream.rpc.certificates import certificate_expiry, server_credentials
from logitstream.rpc.tokens import LastGood
from logitstream.tokenizer import Vocabulary
from logitstream.types import TeacherInfo
from teacher_server import listening
from teacher_server.access import TokenInterceptor, bearer_tokens
from teacher_server.admission import Admission
from teacher_server.backend import TeacherBackend
from teacher_server.calls import SERVICE, WhenLoaded
from teacher_server.checkpoints import LoadCheckpoint, watch_checkpoints
from teacher_server.config import LimitSettings, TeacherConfig
from teacher_server.encoding import Encode, encoder
from teacher_server.health import Health
from teacher_server.preflight import check_access
from teacher_server.scheduler import CLOSE_SECONDS, Scheduler
from teacher_server.servicer import TeacherServicer
from teacher_server.stopping import WORKERS, in_thread, is_busy, stopping_signals
from teacher_server.stored_targets import CacheFolder, StoredTargets

HOUSEKEEPING_SECONDS = 1.0
DEFAULT_SEQUENCE_TOKENS = 8192
STOP_SECONDS = 1.0
"""How long gRPC itself may take after draining."""
EXIT_STUCK = 75
MAX_CALLS = 1024
"""Calls at a time, each with a request of up to max_message_bytes that is not counted before it is read."""

log = logging.getLogger(__name__)


class Loaders(TypedDict, total=False):
    """How to load what is served beside the backend."""

    load_checkpoint: LoadCheckpoint | None
    make_id_model: Callable[[TeacherBackend], bytes]
    load_vocabulary: Callable[[], Vocabulary | None]
    make_encoder: Callable[[bytes, int], Encode]


class TeacherServer:
    """One process's server: `run` takes it from loading to the end."""

    def __init__(
        self, config: TeacherConfig, make_backend: Callable[[], TeacherBackend], **loaders: Unpack[Loaders]
    ) -> None:
        self._config = config
        self._make_backend = make_backend
        self._loaders = loaders
        self._stopping = asyncio.Event()
        self._health = Health("", SERVICE)
        self._when_loaded = WhenLoaded()
        server, limits = config.server, config.limits
        tokens = bearer_tokens(server.token_file, server.token_env)
        self._server = aio.server(
            maximum_concurrent_rpcs=MAX_CALLS,
            interceptors=[] if tokens is None else [TokenInterceptor(tokens)],
            options=listening.teacher_options(
                server.address, limits.max_message_bytes, max_connections=limits.max_connections
            ),
        )
        options = listening.health_options(server.health_address) if server.health_address else []
        self._health_server = aio.server(options=options) if server.health_address else None
        self.admission = Admission(
            max_in_flight_tokens=limits.max_in_flight_tokens, max_queue_tokens=limits.max_queue_tokens
        )
        self.scheduler: Scheduler | None = None
        self.address = ""

    @property
    def serving(self) -> bool:
        """True while the teacher is loaded and its health says SERVING."""
        return self._health.serving

    def stop(self) -> None:
        """Begin to drain; safe to call as a signal handler on the loop."""
        self._stopping.set()

    async def run(self) -> None:
        """Bind, load, serve until `stop`, drain. Raises what loading the backend raises."""
        try:
            await self._listen()
            stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
            loading = in_thread(self._load)
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await self._serve(*loading.result(), stopping)
        finally:
            await self._server.stop(STOP_SECONDS)
            if self._health_server is not None:
                await self._health_server.stop(0)

    def _load(self) -> tuple[TeacherBackend, bytes, Vocabulary | None]:
        codec.warm_up()
        backend = self._make_backend()
        make_id_model = self._loaders.get("make_id_model")
        id_model = make_id_model(backend) if make_id_model else b""
        configure_encoding = getattr(backend, "configure_encoding", None)
        if configure_encoding is not None:  # the backend encodes its targets itself
            configure_encoding(id_model, self._config.limits.max_message_bytes)
        load_vocabulary = self._loaders.get("load_vocabulary")
        return backend, id_model, load_vocabulary() if load_vocabulary else None

    async def _listen(self) -> None:
        config = self._config
        self._server.add_generic_rpc_handlers((self._health.handler, self._when_loaded))
        credentials = None
        if files := config.tls.files():
            credentials = server_credentials(files)
            metrics.TEACHER_CERTIFICATE_EXPIRY.set_function(
                LastGood(lambda: certificate_expiry(config.tls.cert), "the certificate's expiry", default=math.nan).read
            )
        elif not is_loopback(config.server.address):
            log.warning("plaintext on %s: whoever is on the network can read tokens and texts", config.server.address)
        self.address = listening.bind(self._server, config.server.address, credentials)
        if self._health_server is not None:
            self._health_server.add_generic_rpc_handlers((self._health.handler,))
            listening.bind(self._health_server, config.server.health_address)
            await self._health_server.start()
        await self._server.start()

    async def _serve(
        self, backend: TeacherBackend, id_model: bytes, vocabulary: Vocabulary | None, stopping: asyncio.Future[Any]
    ) -> None:
        scheduler = self.scheduler = self._new_scheduler(backend, id_model)
        limits = limits_for(self._config, backend.describe())
        servicer = TeacherServicer(scheduler, self.admission, limits, id_model=id_model, vocabulary=vocabulary)
        running = asyncio.ensure_future(scheduler.run())
        has_looked = asyncio.Event()
        looking: asyncio.Future[Any] = asyncio.ensure_future(has_looked.wait())
        tasks = [looking, asyncio.ensure_future(self._refresh_stored(scheduler)), *self._watch(scheduler, has_looked)]
        try:
            await asyncio.wait({stopping, running, looking}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                self._when_loaded.handler = servicer.handler
                self._health.set(serving=True)
                self._announce()
                tasks.append(asyncio.ensure_future(self._keep_house(scheduler)))
            await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await self._drain(scheduler)
        finally:
            for task in (running, *tasks):
                task.cancel()
            await scheduler.close()
        if running.done() and not running.cancelled():
            running.result()

    def _new_scheduler(self, backend: TeacherBackend, id_model: bytes) -> Scheduler:
        cache, limits = self._config.cache, self._config.limits
        folder = CacheFolder(cache.path, id_model=id_model, max_bytes=cache.max_bytes) if cache.path else None
        return Scheduler(
            backend,
            self._loaders.get("make_encoder", encoder)(id_model, limits.max_message_bytes),
            max_batch_tokens=limits.max_batch_tokens,
            stored=StoredTargets(folder) if folder is not None else None,
        )

    async def _drain(self, scheduler: Scheduler) -> None:
        """Answer the calls that run, within drain_seconds; new ones are refused."""
        log.info("draining: %d sequences in flight", scheduler.num_unfinished)
        scheduler.is_draining = True
        self._health.set(serving=False)
        deadline = time.monotonic() + self._config.server.drain_seconds
        while self.admission.num_calls and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        log.info("drained: %d calls left unanswered", self.admission.num_calls)
        await self._server.stop(STOP_SECONDS)

    async def _keep_house(self, scheduler: Scheduler) -> None:
        """Follow the backend's health, and set the gauges that only time moves."""
        healthy = True
        while True:
            scheduler.measure_age()
            if scheduler.is_healthy != healthy and not scheduler.is_draining:
                healthy = not healthy
                log.warning("the backend is %s", "healthy again" if healthy else "not healthy")
                self._health.set(serving=healthy)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    async def _refresh_stored(self, scheduler: Scheduler) -> None:
        """Refresh the cache now and then; not in `_keep_house`, as a slow disk must not hold up health."""
        while True:
            if scheduler.stored is not None:
                await scheduler.stored.refresh()
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    def _watch(self, scheduler: Scheduler, has_looked: asyncio.Event) -> list[asyncio.Future[Any]]:
        """Start to follow new checkpoints, if that is wanted."""
        watch, load = self._config.watch, self._loaders.get("load_checkpoint")
        if not watch.folder:
            has_looked.set()
            return []
        if load is None:
            raise ValueError(f"watch.folder is set, but the {self._config.backend} backend cannot replace its weights")
        watching = watch_checkpoints(
            Path(watch.folder),
            every_seconds=watch.seconds,
            load=load,
            replace=scheduler.replace_backend,
            has_looked=has_looked,
        )
        return [asyncio.ensure_future(watching)]

    def _announce(self) -> None:
        if self._config.server.address_file:
            write_whole(Path(self._config.server.address_file), self.address + "\n")
        print(f"serving on {self.address}", flush=True)


def serve(config: TeacherConfig, make_backend: Callable[[], TeacherBackend], **loaders: Unpack[Loaders]) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns when everything is drained.

    drain_seconds is a bound: a batch or a disk that cannot be stopped ends the process with EXIT_STUCK, the loading of
    weights that nobody needs any more ends it with 0. SystemExit says in a line why the server cannot start.
    """
    server: TeacherServer | None = None

    async def main() -> None:
        nonlocal server
        workers = ThreadPoolExecutor(thread_name_prefix=WORKERS)
        asyncio.get_running_loop().set_default_executor(workers)
        file_limit = listening.raise_file_limit()
        if config.metrics.port >= 0:
            port = metrics.serve(config.metrics.port, side="teacher", address=config.metrics.address)
            log.info("metrics on %s:%d", config.metrics.address, port)
        log.info("up to %d files and connections may be open", file_limit)
        server = TeacherServer(config, make_backend, **loaders)
        for number in stopping_signals():
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        try:
            await server.run()
        finally:
            if server.scheduler is not None and server.scheduler.is_stuck:
                log.error("a batch or the disk was still busy %g s after draining", CLOSE_SECONDS, exc_info=True)
                _exit(EXIT_STUCK)
        workers.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + STOP_SECONDS
        while is_busy() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if is_busy():
            log.warning("weights are still being loaded, which is not waited for")
            _exit(0)

    try:
        check_access(config)
        asyncio.run(main())
    except (OSError, ValueError, LogitstreamError) as error:
        if server is not None and server.scheduler is not None:
            raise
        log.debug("cannot start", exc_info=error)
        raise SystemExit(f"teacher-server: {one_line(error)}") from error


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


def limits_for(config: TeacherConfig, info: TeacherInfo) -> LimitSettings:
    """Return the settings' limits, within what the backend can do."""
    longest = min(config.limits.max_sequence_tokens or DEFAULT_SEQUENCE_TOKENS, info.max_sequence_tokens)
    return replace(config.limits, max_sequence_tokens=longest)
