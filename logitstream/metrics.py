"""Every Prometheus metric: name, type, unit, labels and meaning. The only module that imports prometheus_client."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

__all__ = ["start_http_server"]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)

# --- teacher server -------------------------------------------------------------------------------------------------
TEACHER_TOKENS = Counter("teacher_tokens_total", "Tokens scored, padding apart")
TEACHER_PADDING_TOKENS = Counter("teacher_padding_tokens_total", "Padding tokens that the forward pass computed")
TEACHER_SEQUENCES = Counter("teacher_sequences_total", "Sequences answered with targets")
TEACHER_ENTRIES = Counter("teacher_entries_total", "Sparse entries sent")
TEACHER_PAYLOAD_BYTES = Counter("teacher_payload_bytes_total", "Bytes of encoded targets sent")
TEACHER_SHARED = Counter("teacher_shared_sequences_total", "Sequences answered from one scoring for several requests")
TEACHER_CACHE_HITS = Counter("teacher_cache_hits_total", "Sequences answered from the server's own cache")
TEACHER_REJECTS = Counter("teacher_rejects_total", "Requests refused, by error class", ["reason"])
TEACHER_QUEUE_TOKENS = Gauge("teacher_queue_tokens", "Tokens waiting to be scored")
TEACHER_QUEUE_AGE = Gauge("teacher_queue_age_seconds", "Age of the oldest waiting request")
TEACHER_CLIENTS = Gauge("teacher_clients", "Open target streams")
TEACHER_VERSION = Gauge("teacher_version", "Version of the weights being served")
TEACHER_BATCH_FILL = Histogram(
    "teacher_batch_fill_ratio", "Tokens of a batch over the token budget", buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
)
TEACHER_STAGE_SECONDS = Histogram(
    "teacher_stage_seconds", "Seconds of one batch by stage: forward, draw, encode, send", ["stage"], buckets=_SECONDS
)

# --- student worker -------------------------------------------------------------------------------------------------
STUDENT_TOKENS = Counter("student_tokens_total", "Tokens trained on")
STUDENT_STEPS = Counter("student_steps_total", "Optimizer steps")
STUDENT_WAITING_SECONDS = Counter("student_waiting_seconds_total", "Seconds a step waited for targets")
STUDENT_DECODING_SECONDS = Counter("student_decoding_seconds_total", "Seconds spent decoding targets")
STUDENT_COMPUTING_SECONDS = Counter("student_computing_seconds_total", "Seconds of training steps, waiting apart")
STUDENT_RECEIVED_BYTES = Counter("student_received_bytes_total", "Bytes of encoded targets received")
STUDENT_ENTRIES = Counter("student_entries_total", "Sparse entries trained on")
STUDENT_ROWS = Counter("student_target_rows_total", "Target rows received")
STUDENT_QUEUE_BATCHES = Gauge("student_queue_batches", "Batches whose targets are ready and not yet consumed")
STUDENT_IN_FLIGHT_TOKENS = Gauge("student_in_flight_tokens", "Tokens asked for and not yet answered")
STUDENT_CREDIT_TOKENS = Gauge("student_credit_tokens", "Tokens that teachers allow in flight")
STUDENT_RETRIES = Counter("student_retries_total", "Requests sent again, by reason", ["reason"])
STUDENT_TEACHER_LAG = Gauge("student_teacher_lag_versions", "Newest teacher version seen less the last one trained on")
STUDENT_LOSS = Gauge("student_loss_nats", "Training loss per supervised token")
STUDENT_OVERHEAD = Gauge(
    "student_overhead_vs_cross_entropy_ratio",
    "Extra time of a distillation step over a cross-entropy step of the same run, by part: total, waiting, decoding, computing",
    ["part"],
)
STUDENT_OVERHEAD_COST = Gauge(
    "student_overhead_measurement_ratio", "Share of the run's time that measuring the overhead took"
)

# --- cache, on either side ------------------------------------------------------------------------------------------
CACHE_BYTES = Gauge("cache_bytes", "Bytes of the cache on disk that this process knows of")
CACHE_HITS = Counter("cache_hits_total", "Sequences read from the cache")
CACHE_MISSES = Counter("cache_misses_total", "Sequences that the cache did not hold")
CACHE_CORRUPT = Counter("cache_corrupt_total", "Records refused for a bad checksum")
CACHE_WRITE_ERRORS = Counter("cache_write_errors_total", "Writes that failed; the run goes on without the cache")
