"""Sparse, unbiased distillation targets: draw them, encode them, train on them.

Names are imported on first use: `import logitstream` takes no time and needs neither torch nor gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitstream.client.local_client import LocalTeacherClient
    from logitstream.client.teacher_client import GrpcTeacherClient, TeacherClient
    from logitstream.fused_loss import fused_linear_sparse_kl
    from logitstream.loss import sparse_kl
    from logitstream.sampling import sample
    from logitstream.training.target_stream import TargetStream
    from logitstream.training.trainer import DistillationTrainer
    from logitstream.types import SparseTargets, TargetSpec, TokenSequence

    __version__: str

__all__ = [
    "DistillationTrainer",
    "GrpcTeacherClient",
    "LocalTeacherClient",
    "SparseTargets",
    "TargetSpec",
    "TargetStream",
    "TeacherClient",
    "TokenSequence",
    "__version__",
    "fused_linear_sparse_kl",
    "sample",
    "sparse_kl",
]

_HOMES = {
    "logitstream.client.local_client": ("LocalTeacherClient",),
    "logitstream.client.teacher_client": ("GrpcTeacherClient", "TeacherClient"),
    "logitstream.fused_loss": ("fused_linear_sparse_kl",),
    "logitstream.loss": ("sparse_kl",),
    "logitstream.sampling": ("sample",),
    "logitstream.training.target_stream": ("TargetStream",),
    "logitstream.training.trainer": ("DistillationTrainer",),
    "logitstream.types": ("SparseTargets", "TargetSpec", "TokenSequence"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("logitstream")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'logitstream' has no attribute {name!r}")
