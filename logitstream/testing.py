"""A teacher without a model, for tests of code that trains from one: `FakeTeacher` in place of GrpcTeacherClient."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from logitstream.client.local_client import LocalTeacherClient
from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence


def made_up_logits(sequence: TokenSequence, vocab_size: int) -> torch.Tensor:
    """Return logits [T, V] that follow from each token alone, so that a student can learn them."""
    ids = torch.arange(vocab_size, dtype=torch.float32)
    tokens = torch.from_numpy(np.asarray(sequence.token_ids, np.float32))[:, None]
    return 4.0 * torch.sin((tokens + 1.0) * (ids + 1.0) * 0.7548776662)


class FakeTeacher(LocalTeacherClient):
    """A TeacherClient with a made-up distribution; the same sequence and draw set always get the same targets.

    fail: called with each sequence before it is scored; what it raises is its future's error, for example
        `logitstream.errors.InvalidSequence` for one that a teacher refuses.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        spec: TargetSpec | None = None,
        *,
        fail: Callable[[TokenSequence], None] = lambda sequence: None,
        max_sequence_tokens: int = 4096,
    ) -> None:
        spec = spec or TargetSpec(codec_version=1)  # the second needs a model's statistics to be small
        info = TeacherInfo(
            model="fake",
            weights_digest=hashlib.sha256(b"fake weights").hexdigest(),
            tokenizer_digest=hashlib.sha256(b"fake tokenizer").hexdigest(),
            vocab_size=vocab_size,
            dtype="float32",
            max_sequence_tokens=max_sequence_tokens,
        )
        self.asked: list[TokenSequence] = []

        def made_up(sequence: TokenSequence, draw_set: int) -> SparseTargets:
            self.asked.append(sequence)
            fail(sequence)
            return sample(made_up_logits(sequence, vocab_size), spec, sequence, draw_set=draw_set)

        super().__init__(made_up, info=info, spec=spec)
