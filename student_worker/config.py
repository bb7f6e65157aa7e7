"""The settings of `student-worker`: one section each for the model, the text, the teacher, its targets, the cache, …"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from logitstream.client.connections import TeacherSettings, teacher_host
from logitstream.metrics import MetricsSettings
from logitstream.rpc.addresses import check_exposure
from logitstream.rpc.tls import TlsSettings
from logitstream.settings import build, parse, require_at_least, setting
from logitstream.types import TargetSpec

if TYPE_CHECKING:
    from transformers import TrainingArguments

DESCRIPTION = (
    "Train a student on sparse targets from teacher servers. The section `training` is transformers.TrainingArguments, "
    "listed by --help-all. Several processes: torchrun --nproc_per_node=N -m student_worker ..."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The student: trained further from a checkpoint, or from scratch by its config."""

    path: str = setting("Checkpoint to start from: a folder or a hub name.", "")
    config: str = setting("config.json of a student that starts untrained, instead of `path`.", "")
    tokenizer: str = setting("Tokenizer shared with the teacher: a folder or a hub name; empty: the model's.", "")

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.config):
            raise ValueError("expected one of model.path (a checkpoint) and model.config (an untrained student)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The text to train on, as packed sequences."""

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
    document_end: str = setting("After each document: `auto` (an end of text), `none`, or a token.", "auto")
    max_sequences: int = setting("Use at most this many sequences of the text; 0: all.", 0)
    heldout_sequences: int = setting(
        "Sequences set apart by their content for evaluation, never trained on; the cache records and keeps them.", 32
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "sequence_tokens")
        require_at_least(self, 0, "max_sequences", "heldout_sequences")


Source = Literal["online", "cache", "cache_then_online"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings(TargetSpec):
    """How the targets are drawn (docs/targets-format.md) and where they come from."""

    source: Literal["auto", "online", "cache", "cache_then_online"] = setting(
        "Where targets come from; `auto`: the cache first if there is one, then the teacher.", "auto"
    )
    draws: Literal["fresh", "reuse"] = setting(
        "Fresh draws each epoch (from the cache alone: its draws in turn), or the first epoch's again.", "fresh"
    )
    bytes_per_token: float = setting(
        "Choose N, θ or k for about this many bytes a supervised token; 0: no. A cache that exists keeps its own.", 0.0
    )
    noise: float = setting("Choose N or θ for about this MSE of the targets at a position; 0: no.", 0.0)
    prefetch_batches: int = setting("Batches asked for ahead of the one being trained on.", 8)

    def __post_init__(self) -> None:
        TargetSpec.__post_init__(self)
        require_at_least(self, 1, "prefetch_batches")
        require_at_least(self, 0, "bytes_per_token", "noise")
        if self.bytes_per_token and self.noise:
            raise ValueError("expected one budget, bytes_per_token or noise, got both")

    def spec(self) -> TargetSpec:
        """Return the sampler's part, before a budget changes N, θ or k."""
        return TargetSpec(**{one.name: getattr(self, one.name) for one in fields(TargetSpec)})


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Targets kept on disk (docs/cache.md)."""

    path: str = setting("Folder (or fsspec URL) that keeps every target received; empty: none.", "")
    max_bytes: int = setting("Stop writing to the cache beyond this many bytes; 0: no bound.", 0)
    provenance: dict[str, str] = setting("More facts to keep with a new cache: licence, corpus, ...", factory=dict)

    def __post_init__(self) -> None:
        require_at_least(self, 0, "max_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """The loss, and the measurement of what distillation costs."""

    ce_weight: float = setting("Share of the loss that is cross-entropy against the text, 0 to 1.", 0.0)
    overhead_every: int = setting("Time a cross-entropy step beside every n-th step; 0: never.", 10)

    def __post_init__(self) -> None:
        if not 0.0 <= self.ce_weight <= 1.0:
            raise ValueError(f"ce_weight must lie in [0, 1], got {self.ce_weight}")
        require_at_least(self, 0, "overhead_every")


def training_arguments() -> type[TrainingArguments]:
    """Return transformers' class, which takes seconds to import."""
    from transformers import TrainingArguments

    return TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """The settings of a run, by section."""

    model: ModelSettings = setting("The student.", factory=ModelSettings)
    data: DataSettings = setting("The text.", factory=DataSettings)
    teacher: TeacherSettings = setting("The teacher's replicas.", factory=TeacherSettings)
    tls: TlsSettings = setting("Encryption of the connections to the teacher.", factory=TlsSettings)
    targets: TargetSettings = setting("How targets are drawn and where they come from.", factory=TargetSettings)
    cache: CacheSettings = setting("Targets kept on disk.", factory=CacheSettings)
    loss: LossSettings = setting("The loss.", factory=LossSettings)
    metrics: MetricsSettings = setting("Prometheus metrics.", factory=MetricsSettings)
    training: dict[str, Any] = setting(
        "The training loop: transformers.TrainingArguments, listed by --help-all.",
        factory=dict,
        later=training_arguments,
    )

    def __post_init__(self) -> None:
        if not self.data.text and not (self.source == "cache" and self.cache.path):
            raise ValueError("expected data.text, or targets.source `cache` with cache.path to train from alone")
        if self.source != "online" and not self.cache.path:
            raise ValueError(f"targets.source `{self.source}` needs cache.path")
        if self.tls.cert and not self.tls.ca:
            raise ValueError("TLS needs tls.ca (a PEM file, or `system`) with tls.cert and tls.key")
        if self.source != "cache":
            for address in self.teacher.addresses:
                teacher_host(address)
            check_exposure(self.teacher.addresses, encrypted=bool(self.tls.ca), insecure=self.tls.insecure)

    @property
    def source(self) -> Source:
        """The source of the targets, `auto` resolved."""
        if self.targets.source == "auto":
            return "cache_then_online" if self.cache.path else "online"
        return self.targets.source


def parse_student(words: Sequence[str]) -> tuple[StudentConfig, TrainingArguments]:
    """Return the settings and the Trainer's. Raises SettingsError."""
    config = parse(StudentConfig, words, command="student-worker", description=DESCRIPTION)
    import torch

    if not torch.accelerator.is_available():  # else accelerate takes each of torchrun's processes for the only one
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return config, build(training_arguments(), config.training, "training.")
