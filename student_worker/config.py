"""The student worker's settings; the training loop's own are transformers.TrainingArguments, in the same YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from logitstream.client.resolver import teacher_host
from logitstream.rpc.addresses import check_exposure
from logitstream.rpc.channel import TlsFiles
from logitstream.settings import setting
from logitstream.types import TargetSpec


@dataclass(kw_only=True)
class StudentConfig:
    """Where the student, its text and its targets come from."""

    model: str = setting("Checkpoint to start from: a folder or a hub name.", "")
    model_config: str = setting("config.json of a student that starts untrained, instead of `model`.", "")
    tokenizer: str = setting("Tokenizer shared with the teacher: a folder or a hub name (default: the model's).", "")
    text: list[str] = setting(
        "Training text: .txt, .md, .rst (one document each), .jsonl, .parquet files or datasets folders; rows with "
        "input_ids are used as they are, with their labels, masks and position_ids, without padding.",
        factory=list,
    )
    text_column: str = setting("Column that holds the text of .jsonl, .parquet and datasets input.", "text")
    sequence_tokens: int = setting("Tokens of one packed training sequence; longer rows of input_ids are cut.", 512)
    document_start: str = setting(
        "Before each document of text: `auto` (what the tokenizer puts there, often a BOS), `none`, or a token.", "auto"
    )
    document_end: str = setting(
        "After each document of text: `auto` (what the tokenizer puts there, and the end of text of pretraining), "
        "`none`, or a token.",
        "auto",
    )
    max_sequences: int = setting("Use at most this many sequences of the text; 0: all.", 0)
    heldout_sequences: int = setting(
        "Sequences set apart by their content for evaluation, never trained on; `cache` notes and keeps them.", 32
    )

    teacher: list[str] = setting(
        "Addresses of teacher replicas, host:port; a DNS name may stand for many.", factory=lambda: ["127.0.0.1:50051"]
    )
    targets: Literal["auto", "online", "cache", "cache_then_online"] = setting(
        "Where targets come from; `auto`: with a `cache` from there first, then from the teacher.", "auto"
    )
    draws: Literal["fresh", "reuse"] = setting(
        "Fresh draws each epoch, or the first epoch's again (also where the cache alone lacks an epoch's draws).",
        "fresh",
    )
    prefetch_batches: int = setting("Batches asked for ahead of the one being trained on.", 8)
    cache: str = setting("Folder (or fsspec URL) that keeps every target received; empty: none.", "")
    cache_max_bytes: int = setting("Stop writing to the cache beyond this many bytes; 0: no bound.", 0)
    cache_provenance: dict[str, str] = setting(
        "More facts to keep with a new cache, as JSON: licence, corpus, …", factory=dict
    )
    deadline_seconds: float = setting("One sequence's targets must arrive within this time, retries included.", 300.0)
    stalled_seconds: float = setting(
        "A replica that answers nothing for so long while others are up is given up; one that was slow before gets "
        "longer, up to half of deadline_seconds.",
        60.0,
    )
    connect_timeout_seconds: float = setting("Wait this long for a teacher to come up.", 300.0)
    max_teacher_lag: int = setting(
        "0: all targets come from the same weights; n: the teacher may learn meanwhile, and targets from weights more "
        "than n versions older than the newest seen are asked for again; -1: any version.",
        0,
    )

    sampler: str = setting("systematic, multinomial, threshold, top_k, top_k_ghost or full.", "systematic")
    num_samples: int = setting("N of systematic and multinomial.", 50)
    threshold: float = setting("θ of threshold: entries of at least this probability are kept as they are.", 0.02)
    top_k: int = setting("k of top_k and top_k_ghost.", 12)
    proposal_temperature: float = setting("τ of multinomial's proposal q ∝ t^τ.", 1.0)
    temperature: float = setting("Softmax temperature of teacher and student in the distillation loss.", 1.0)
    target_seed: int = setting("Seed of the draws; with the same one every student gets the same draws.", 0)
    codec_version: int = setting("Version of the encoded targets.", 2)
    bytes_per_token: float = setting(
        "Choose N, θ or k so that targets take about this many bytes a supervised token; 0: no. A cache that exists "
        "keeps its own.",
        0.0,
    )
    noise: float = setting(
        "Choose N or θ so that the targets' MSE per position is about this; 0: no. A cache that exists keeps its own.",
        0.0,
    )

    ce_weight: float = setting("Share of the loss that is cross-entropy against the text, 0 to 1.", 0.0)
    overhead_every: int = setting("Time a cross-entropy step beside every n-th step; 0: never.", 10)

    client_id: str = setting("Name of this run in the teacher's logs and for its fairness between clients.", "student")
    tls_ca: str = setting(
        "PEM file of the authority that signed the teacher's certificate; `system`: this machine's authorities; empty: "
        "plaintext, which only a teacher on this machine gets.",
        "",
    )
    tls_cert: str = setting("This client's certificate (PEM), where the teacher asks for one.", "")
    tls_key: str = setting("Key (PEM) of `tls_cert`.", "")
    insecure: bool = setting("Allow plaintext to a teacher on another machine.", False)
    token_file: str = setting("File that holds the bearer token; LOGITSTREAM_TOKEN is used where it is empty.", "")
    metrics_port: int = setting("Serve Prometheus metrics on this port plus the local rank; 0: do not.", 0)
    metrics_address: str = setting("Interface of the Prometheus metrics; 0.0.0.0: all of them.", "127.0.0.1")

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.model_config):
            raise ValueError("expected one of `model` (a checkpoint) and `model_config` (an untrained student)")
        if self.targets == "auto":
            self.targets = "cache_then_online" if self.cache else "online"
        if not self.text and not (self.targets == "cache" and self.cache):
            raise ValueError("expected `text`, or `targets: cache` with a `cache` to train from alone")
        if self.targets != "online" and not self.cache:
            raise ValueError(f"`targets: {self.targets}` needs `cache`")
        if not 0.0 <= self.ce_weight <= 1.0:
            raise ValueError(f"ce_weight must lie in [0, 1], got {self.ce_weight}")
        for name in ("sequence_tokens", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_sequences", "heldout_sequences", "cache_max_bytes", "overhead_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("deadline_seconds", "stalled_seconds", "connect_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("bytes_per_token", "noise"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.bytes_per_token and self.noise:
            raise ValueError("expected one budget, bytes_per_token or noise, got both")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_cert and not self.tls_ca):
            raise ValueError(
                "TLS needs tls_cert and tls_key or neither, and tls_ca (a PEM file, or `system`) with them"
            )
        if self.targets != "cache":
            for address in self.teacher:
                teacher_host(address)
            check_exposure(self.teacher, encrypted=bool(self.tls_ca), insecure=self.insecure)
        self.target_spec()

    def target_mode(self) -> Literal["online", "cache", "cache_then_online"]:
        """Where targets come from."""
        assert self.targets != "auto"
        return self.targets

    def target_spec(self) -> TargetSpec:
        """How the targets are drawn, before a budget changes N or θ."""
        return TargetSpec(
            sampler=self.sampler,
            num_samples=self.num_samples,
            threshold=self.threshold,
            top_k=self.top_k,
            proposal_temperature=self.proposal_temperature,
            temperature=self.temperature,
            seed=self.target_seed,
            codec_version=self.codec_version,
        )

    def tls_files(self) -> TlsFiles | None:
        """For the channel to the teacher; None: plaintext."""
        if not self.tls_ca:
            return None
        authority = None if self.tls_ca == "system" else self.tls_ca
        return TlsFiles(certificate=self.tls_cert or None, key=self.tls_key or None, authority=authority)

    def draw_by(self, spec: TargetSpec) -> None:
        """Take the sampler's settings from a spec."""
        self.sampler = spec.sampler
        self.num_samples = spec.num_samples
        self.threshold = spec.threshold
        self.top_k = spec.top_k
        self.proposal_temperature = spec.proposal_temperature
        self.temperature = spec.temperature
        self.target_seed = spec.seed
        self.codec_version = spec.codec_version
