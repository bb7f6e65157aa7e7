"""Everything that `teacher-server` can be told, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logitstream.rpc.addresses import MAX_PORT, is_loopback, is_unix, split_address
from logitstream.settings import setting
from logitstream.types import MAX_MESSAGE_BYTES

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("transformers", "vllm")
LEAST_MESSAGE_BYTES = 64 << 10


@dataclass(kw_only=True)
class TeacherConfig:
    """Settings of one teacher server; ValueError where they cannot work together."""

    model: str = setting("Folder or hub name of a causal language model with safetensors weights.", "")
    revision: str = setting("Revision of the model on the hub; ignored for a folder.", "main")
    tokenizer: str = setting("Folder or hub name of the tokenizer; empty: the model's own.", "")
    vocab_size: int = setting("Serve only the first so many ids, as the student has; 0: all rows of the head.", 0)
    backend: str = setting("What runs the model.", "transformers", choices=BACKENDS)
    backend_options: dict[str, Any] = setting(
        "vLLM engine options by their own names, as JSON; for the vllm backend.", factory=dict
    )
    engine_restarts: int = setting(
        "How often a vLLM engine that died is started again before the server exits with status 70.", 3
    )
    dtype: str = setting("Of the forward; auto: as the weights are stored.", "auto", choices=DTYPES)
    device: str = setting("cpu, cuda, cuda:N; auto: a GPU where there is one.", "auto")
    num_threads: int = setting("CPU threads of the forward; 0: torch's own choice.", 0)
    address: str = setting("HOST:PORT to serve on; port 0 takes a free one.", "127.0.0.1:50051")
    address_file: str = setting("File that receives the bound HOST:PORT once the server is healthy.", "")
    health_address: str = setting(
        "HOST:PORT that answers health checks alone, in plaintext, for probes that cannot do TLS; empty: none.", ""
    )
    metrics_port: int = setting("Port of the Prometheus metrics; 0 takes a free one, -1 serves none.", -1)
    metrics_address: str = setting("Interface of the Prometheus metrics; 0.0.0.0: all of them.", "127.0.0.1")
    max_batch_tokens: int = setting(
        "Tokens of one forward batch, across all clients: more is faster on a GPU, fewer answers sooner.", 4096
    )
    max_sequence_tokens: int = setting("Longest sequence taken; 0: what the model allows, at most 8192.", 0)
    max_in_flight_tokens: int = setting("Tokens one stream may have in flight, its credit.", 65_536)
    max_queue_tokens: int = setting("Tokens that may wait in the whole server.", 1 << 20)
    max_message_bytes: int = setting(
        "Largest message of requests, and largest targets of one sequence: 64 KiB to 64 MiB.", 4 << 20
    )
    max_connections: int = setting(
        "Connections that may be open at a time, silent ones included; 0: half of the files that the process may open.",
        0,
    )
    max_streams: int = setting("Streams that may be open at a time.", 256)
    max_client_streams: int = setting("Streams that one client may have open; 0: half of max_streams.", 0)
    logits_chunk_bytes: int = setting("Logits are made in chunks of this size, never all at once.", 24 << 20)
    drain_seconds: float = setting("After SIGTERM, how long what is in flight may take.", 30.0)
    client_weights: dict[str, str] = setting(
        "Share of the teacher by client_id, as JSON; 1 where not named.", factory=dict
    )
    tls_cert: str = setting("PEM file of the server's certificate chain; empty: plaintext.", "")
    tls_key: str = setting("PEM file of the server's private key.", "")
    tls_client_ca: str = setting("PEM file of the authority that must have signed clients' certificates (mTLS).", "")
    token_file: str = setting(
        "File of bearer tokens, one a line; read again when it changes. A word after a token names its client.", ""
    )
    token_env: str = setting("Name of an environment variable that holds a bearer token.", "")
    insecure: bool = setting("Allow plaintext on an address that other machines reach.", False)
    watch_checkpoints: str = setting("Folder whose newest complete checkpoint is served as soon as it appears.", "")
    watch_seconds: float = setting("How often that folder is looked at.", 2.0)
    id_model: str = setting("File of codec 2's static id model, the same for all replicas.", "")
    calibration_text: str = setting("Text that the id model is made from where `id_model` does not exist yet.", "")
    cache: str = setting("Folder that keeps what was scored, a cache for each teacher and spec; empty: none.", "")
    cache_max_bytes: int = setting("Stop writing to the caches beyond this many bytes in all; 0: no bound.", 0)
    log_json: bool = setting("One JSON object a log line instead of text.", False)
    log_level: str = setting("DEBUG, INFO, WARNING or ERROR.", "INFO")
    check: bool = setting("Validate these settings and load the model, then exit without serving.", False)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is needed: a folder or a hub name of a causal language model")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ValueError("TLS needs tls_cert and tls_key; tls_client_ca needs both")
        if self.backend == "vllm" and self.watch_checkpoints:
            raise ValueError("watch_checkpoints is set, but the vllm backend cannot replace its weights")
        self._check_bounds()
        self._check_addresses()

    def _check_bounds(self) -> None:
        for name in (
            "max_batch_tokens",
            "max_in_flight_tokens",
            "max_queue_tokens",
            "max_streams",
            "logits_chunk_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not LEAST_MESSAGE_BYTES <= self.max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(
                f"max_message_bytes must lie in [{LEAST_MESSAGE_BYTES}, {MAX_MESSAGE_BYTES}], "
                f"got {self.max_message_bytes}"
            )
        for name in ("max_sequence_tokens", "vocab_size", "max_connections", "max_client_streams", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.watch_seconds <= 0:
            raise ValueError(f"watch_seconds must be positive, got {self.watch_seconds}")
        if any(weight <= 0 for weight in self.weights_by_client().values()):
            raise ValueError(f"client_weights must be positive, got {self.client_weights}")

    def _check_addresses(self) -> None:
        for name in ("address", "health_address"):
            address = getattr(self, name)
            try:
                if address and not is_unix(address):
                    split_address(address)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if not self.address or not -1 <= self.metrics_port <= MAX_PORT:
            raise ValueError(f"address is needed, and a metrics_port from -1 to {MAX_PORT}, got {self.metrics_port}")
        if not self.tls_cert and not self.insecure and not is_loopback(self.address):
            raise ValueError(
                f"plaintext on {self.address} would show tokens and texts to the network: give tls_cert and tls_key, "
                "or --insecure where a proxy or a private network protects it"
            )

    def weights_by_client(self) -> dict[str, float]:
        return {str(name): float(weight) for name, weight in self.client_weights.items()}
