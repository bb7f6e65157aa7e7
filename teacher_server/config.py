"""The settings of `teacher-server`: one section each for the model, the address, the limits, the cache, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from logitstream.metrics import MetricsSettings
from logitstream.rpc.addresses import is_loopback
from logitstream.rpc.tls import TlsSettings
from logitstream.settings import require_at_least, setting
from logitstream.types import MAX_MESSAGE_BYTES

LEAST_MESSAGE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The teacher and how it runs."""

    path: str = setting("Folder or hub name of a causal language model with safetensors weights.", "")
    revision: str = setting("Revision of the model on the hub; ignored for a folder.", "main")
    tokenizer: str = setting("Folder or hub name of the tokenizer; empty: the model's own.", "")
    vocab_size: int = setting("Serve only this many ids, as the student has; 0: all rows of the head.", 0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "Number format of the forward pass; auto: as the weights are stored.", "auto"
    )
    device: str = setting("cpu, cuda, cuda:N; auto: a GPU if there is one.", "auto")
    num_threads: int = setting("CPU threads of the forward pass; 0: torch's own choice.", 0)
    logits_chunk_bytes: int = setting(
        "Logits are made in chunks of this size, never all at once; 0: 24 MiB on a CPU, up to 1 GiB on a GPU.", 0
    )
    compile: bool = setting("Compile the model's body (transformers): a slower start, faster passes on a GPU.", False)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("model.path is needed: a folder or a hub name of a causal language model")
        require_at_least(self, 0, "logits_chunk_bytes", "vocab_size", "num_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """The vLLM engine, for the backend `vllm` (docs/vllm.md)."""

    options: dict[str, Any] = setting("Engine options by vLLM's own names.", factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Addresses, and who may call."""

    address: str = setting("HOST:PORT to serve on; port 0 takes a free one.", "127.0.0.1:50051")
    address_file: str = setting("File that receives the bound HOST:PORT once the server is healthy.", "")
    health_address: str = setting(
        "HOST:PORT that answers health checks alone, in plaintext, for probes that cannot do TLS; empty: none.", ""
    )
    token_file: str = setting(
        "File of bearer tokens, one a line; read again when it changes. A word after a token names its client.", ""
    )
    drain_seconds: float = setting("After SIGTERM, how long what is in flight may take.", 30.0)

    def __post_init__(self) -> None:
        for address in (self.address, *filter(None, [self.health_address])):
            is_loopback(address)  # raises ValueError for what is no address
        require_at_least(self, 0, "drain_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Limits on what the server takes on at a time."""

    max_batch_tokens: int = setting(
        "Tokens of one forward batch, across all clients: more is faster on a GPU, fewer answers sooner; 0: 4096 on a "
        "CPU, 16384 on a GPU.",
        0,
    )
    max_sequence_tokens: int = setting("Longest sequence taken; 0: what the model allows, at most 8192.", 0)
    max_in_flight_tokens: int = setting("Tokens that one client may have in flight, in one call or several.", 65_536)
    max_queue_tokens: int = setting(
        "Tokens that all clients may have in flight; each active one has an equal share.", 1 << 20
    )
    max_message_bytes: int = setting("Largest request, and largest targets of one sequence: 64 KiB to 64 MiB.", 4 << 20)
    max_connections: int = setting(
        "Connections that may be open at a time, silent ones included; 0: a quarter of the files that may be open.",
        0,
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_in_flight_tokens", "max_queue_tokens")
        require_at_least(self, 0, "max_batch_tokens", "max_sequence_tokens", "max_connections")
        if not LEAST_MESSAGE_BYTES <= self.max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(
                f"max_message_bytes must lie in [{LEAST_MESSAGE_BYTES}, {MAX_MESSAGE_BYTES}], "
                f"got {self.max_message_bytes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """A folder of checkpoints of a teacher that learns meanwhile."""

    folder: str = setting("Folder whose newest checkpoint is served as soon as it appears; empty: none.", "")
    seconds: float = setting("How often to look at the folder.", 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdModelSettings:
    """Codec 2's static model of token ids, which makes targets smaller (docs/targets-format.md)."""

    file: str = setting("File of the id model, the same for all replicas; empty: none.", "")
    text: str = setting("Text that the id model is made from if `file` does not exist yet.", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The server's own cache of what was scored."""

    path: str = setting("Folder that keeps what was scored, a cache for each teacher and spec; empty: none.", "")
    max_bytes: int = setting("Stop writing to a cache beyond this many bytes; 0: no bound.", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Settings of one teacher server; ValueError if they cannot work together."""

    model: ModelSettings = setting("The teacher and how it runs.", factory=ModelSettings)
    backend: Literal["transformers", "vllm"] = setting("What runs the model.", "transformers")
    vllm: VllmSettings = setting("The engine of the backend `vllm`.", factory=VllmSettings)
    server: ServerSettings = setting("Where the server answers, and whom.", factory=ServerSettings)
    tls: TlsSettings = setting("Encryption of the connections.", factory=TlsSettings)
    limits: LimitSettings = setting("What the server takes on at a time.", factory=LimitSettings)
    watch: WatchSettings = setting("Checkpoints of a teacher that learns meanwhile.", factory=WatchSettings)
    id_model: IdModelSettings = setting("Codec 2's model of token ids.", factory=IdModelSettings)
    cache: CacheSettings = setting("What was scored, kept on disk.", factory=CacheSettings)
    metrics: MetricsSettings = setting("Prometheus metrics.", factory=MetricsSettings)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("Least level of the log on stderr.", "INFO")
    check: bool = setting("Validate these settings and load the model, then exit without serving.", False)

    def __post_init__(self) -> None:
        if self.tls.ca and not self.tls.cert:
            raise ValueError("TLS needs tls.cert and tls.key; tls.ca needs both")
        if self.backend == "vllm" and self.watch.folder:
            raise ValueError("watch.folder is set, but the vllm backend cannot replace its weights")
        if not self.tls.cert and not self.tls.insecure and not is_loopback(self.server.address):
            raise ValueError(
                f"plaintext on {self.server.address} would show tokens and texts to the network: give tls.cert and "
                "tls.key, or --tls.insecure if a proxy or a private network protects it"
            )
