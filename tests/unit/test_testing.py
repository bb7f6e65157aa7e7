"""The fake teacher that the library ships for its users' tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstream import codec, sparse_kl
from logitstream.errors import InvalidSequence
from logitstream.testing import FakeTeacher, made_up_logits
from logitstream.training.target_stream import TargetStream
from logitstream.types import TargetSpec, TokenSequence


def sequence(*token_ids: int) -> TokenSequence:
    return TokenSequence(token_ids=np.array(token_ids, np.int32))


def test_a_student_learns_from_the_fake_teacher() -> None:
    teacher = FakeTeacher(vocab_size=32, spec=TargetSpec(sampler="full", codec_version=1))
    rng = np.random.default_rng(0)
    batches = [{"input_ids": torch.from_numpy(rng.integers(0, 32, (2, 8)))} for _ in range(60)]
    student = torch.nn.Embedding(32, 32)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.3)
    losses = []
    for batch in TargetStream(batches, teacher):
        loss = sparse_kl(student(batch["input_ids"]), batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(teacher.asked) == 120
    assert losses[-1] < 0.2 * losses[0]
    teacher.close()


def test_the_same_sequence_and_draw_set_get_the_same_targets() -> None:
    teacher = FakeTeacher()
    futures = teacher.submit([sequence(1, 2, 3), sequence(1, 2, 3)]) + teacher.submit([sequence(1, 2, 3)], draw_set=1)
    first, again, other = (future.result().payload for future in futures)
    assert first == again != other
    likely = made_up_logits(sequence(1, 2, 3), 256)[0].topk(64).indices.tolist()
    drawn = codec.decode(first).slice_rows(0, 1).token_ids.tolist()
    assert len(set(drawn) & set(likely)) > 0.7 * len(drawn)  # a quarter by chance
    teacher.close()


def test_a_sequence_can_be_made_to_fail() -> None:
    def fail(one: TokenSequence) -> None:
        if 7 in one.token_ids:
            raise InvalidSequence("told to refuse")

    teacher = FakeTeacher(fail=fail)
    good, bad = teacher.submit([sequence(1, 2), sequence(1, 7)])
    assert good.result().payload
    with pytest.raises(InvalidSequence, match="told to refuse"):
        bad.result()
    teacher.close()
