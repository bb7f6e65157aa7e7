"""Every Prometheus metric: name, type, unit, labels and meaning. The only module that imports prometheus_client."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from socketserver import ThreadingTCPServer
from typing import Any

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Metric, MetricsHandler
from prometheus_client.registry import Collector

from logitstream.errors import REQUEST_ERRORS
from logitstream.settings import setting

MAX_SCRAPES = 16
SCRAPE_SECONDS = 10.0
"""Longest silence of a scraper."""

log = logging.getLogger(__name__)

Counter = partial(prometheus_client.Counter, namespace="logitstream")
Gauge = partial(prometheus_client.Gauge, namespace="logitstream")
Histogram = partial(prometheus_client.Histogram, namespace="logitstream")

STAGES = ("forward", "draw", "encode", "send")
OVERHEAD_PARTS = ("total", "waiting", "decoding", "computing")

# --- teacher server -------------------------------------------------------------------------------------------------
TEACHER_TOKENS = Counter("teacher_tokens_total", "Tokens scored, padding apart")
TEACHER_PADDING_TOKENS = Counter("teacher_padding_tokens_total", "Padding tokens that the forward pass computed")
TEACHER_SEQUENCES = Counter("teacher_sequences_total", "Sequences answered with targets")
TEACHER_ENTRIES = Counter("teacher_entries_total", "Sparse entries sent")
TEACHER_PAYLOAD_BYTES = Counter("teacher_payload_bytes_total", "Bytes of encoded targets sent")
TEACHER_SHARED = Counter("teacher_shared_sequences_total", "Sequences answered from one scoring for several requests")
TEACHER_CACHE_HITS = Counter("teacher_cache_hits_total", "Sequences answered from the server's own cache")
TEACHER_CACHE_UNKEPT = Counter(
    "teacher_cache_unkept_total", "Sequences scored and not kept, as the cache's disk did not keep up"
)
TEACHER_REJECTS = Counter("teacher_rejects_total", "Requests refused, by error class", ["reason"])
TEACHER_UNAUTHENTICATED = Counter("teacher_unauthenticated_total", "Calls refused for want of a known token")
TEACHER_QUEUE_TOKENS = Gauge("teacher_queue_tokens", "Tokens waiting to be scored")
TEACHER_QUEUE_AGE = Gauge("teacher_queue_age_seconds", "Age of the oldest waiting request")
TEACHER_CLIENTS = Gauge("teacher_clients", "Calls being answered")
TEACHER_VERSION = Gauge("teacher_version", "Version of the weights being served")
TEACHER_CERTIFICATE_EXPIRY = Gauge(
    "teacher_certificate_expiry_timestamp_seconds", "When the served TLS certificate expires, Unix time; 0: no TLS"
)
TEACHER_BATCH_FILL = Histogram(
    "teacher_batch_fill_ratio", "Tokens of a batch over the token budget", buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
)
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
TEACHER_STAGE_SECONDS = Histogram(
    "teacher_stage_seconds", "Seconds of one batch, by stage", ["stage"], buckets=_SECONDS
)

# --- student worker -------------------------------------------------------------------------------------------------
STUDENT_TOKENS = Counter("student_tokens_total", "Tokens trained on")
STUDENT_STEPS = Counter("student_steps_total", "Optimizer steps")
STUDENT_WAITING_SECONDS = Counter("student_waiting_seconds_total", "Seconds a step waited for targets")
STUDENT_DECODING_SECONDS = Counter(
    "student_decoding_seconds_total", "CPU seconds of decoding targets, beside the steps"
)
STUDENT_COMPUTING_SECONDS = Counter("student_computing_seconds_total", "Seconds of training steps, waiting apart")
STUDENT_RECEIVED_BYTES = Counter("student_received_bytes_total", "Bytes of targets received, in whole gRPC messages")
STUDENT_ENTRIES = Counter("student_entries_total", "Sparse entries trained on")
STUDENT_ROWS = Counter("student_target_rows_total", "Target rows received")
STUDENT_QUEUE_BATCHES = Gauge("student_queue_batches", "Batches whose targets are ready and not yet consumed")
STUDENT_IN_FLIGHT_TOKENS = Gauge("student_in_flight_tokens", "Tokens asked for and not yet answered")
STUDENT_CREDIT_TOKENS = Gauge("student_credit_tokens", "Tokens that teachers allow in flight")
STUDENT_RETRIES = Counter("student_retries_total", "Requests sent again, by reason", ["reason"])
STUDENT_TEACHER_LAG = Gauge(
    "student_teacher_lag_versions", "Newest teacher version seen less that of the last targets received"
)
STUDENT_LOSS = Gauge("student_loss_nats", "Training loss per supervised token")
STUDENT_OVERHEAD = Gauge(
    "student_overhead_vs_cross_entropy_ratio",
    "Extra time of a distillation step over a cross-entropy step of the same run, by part",
    ["part"],
)

# --- cache, on either side ------------------------------------------------------------------------------------------
CACHE_BYTES = Gauge("cache_bytes", "Bytes of the cache on disk that this process knows of")
CACHE_DISK_FREE = Gauge("cache_disk_free_ratio", "Free share of the file system that holds the cache", ["cache"])
CACHE_HITS = Counter("cache_hits_total", "Sequences read from the cache")
CACHE_MISSES = Counter("cache_misses_total", "Sequences that the cache did not hold")
CACHE_CORRUPT = Counter("cache_corrupt_total", "Records refused for a bad checksum")
CACHE_WRITE_ERRORS = Counter("cache_write_errors_total", "Writes that failed; the run goes on without the cache")
CACHE_HANGS = Counter("cache_hangs_total", "Times that the cache's disk has not answered for seconds")

for _reason in REQUEST_ERRORS:  # a counter that appears only with its first increment hides that increment from rate()
    TEACHER_REJECTS.labels(_reason)
for _stage in STAGES:
    TEACHER_STAGE_SECONDS.labels(_stage)
STUDENT_RETRIES.labels("lost")


def value(name: str, **labels: str) -> float | None:
    """Return the value of one metric in this process; None if it was never set."""
    return REGISTRY.get_sample_value(name, labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """Prometheus metrics on /metrics."""

    port: int = setting("Port, of a student plus its local rank; 0 takes a free one; -1: none.", -1)
    address: str = setting("Interface to serve on; 0.0.0.0: all of them.", "127.0.0.1")

    def __post_init__(self) -> None:
        if not -1 <= self.port <= 65535:
            raise ValueError(f"port must lie in [-1, 65535], got {self.port}")


class _OneSide(Collector):
    """The metrics that one side exports: its own, the cache's and the process's."""

    def __init__(self, side: str) -> None:
        self._other = "logitstream_student_" if side == "teacher" else "logitstream_teacher_"

    def collect(self) -> Iterable[Metric]:
        return (metric for metric in REGISTRY.collect() if not metric.name.startswith(self._other))


class _Server(ThreadingTCPServer):
    """One thread a scrape, at most MAX_SCRAPES: a further one closes the oldest, so silent ones keep nobody out."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (MetricsHandler,), {"registry": registry, "timeout": SCRAPE_SECONDS})
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            while len(self._open) >= MAX_SCRAPES:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a scrape from %s ended early", client_address, exc_info=True)


def serve(port: int, *, side: str, address: str = "127.0.0.1") -> int:
    """Serve /metrics of a `teacher` or a `student` in a thread; return the port, a free one for port 0.

    address: the interface; whoever reaches it can read the metrics. Raises OSError if it cannot be served.
    """
    registry = CollectorRegistry()
    registry.register(_OneSide(side))
    try:
        server = _Server((address, port), registry)
    except OSError as error:
        raise OSError(f"cannot serve metrics on {address}:{port}: {error}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_address[1])
