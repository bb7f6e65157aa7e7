"""A budget becomes the sampler's one number: asked of a teacher, or taken from a cache that holds targets already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from logitstream.cache import CacheWriter
from logitstream.client.local_client import LocalTeacherClient
from logitstream.errors import InvalidSequence
from logitstream.sampling import sample
from logitstream.types import Fingerprint, SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from student_worker.run_plan import CALIBRATION_SEQUENCES, calibration_sequences, choose_spec, held_fingerprint

VOCAB_SIZE = 200
INFO = TeacherInfo(
    model="random",
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=VOCAB_SIZE,
    dtype="float32",
    max_sequence_tokens=64,
)
SPEC = TargetSpec(num_samples=50, codec_version=1)
LOGITS = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def connect(spec: TargetSpec) -> LocalTeacherClient:
    """A teacher whose distribution depends on the last token alone; ids outside its vocabulary are refused."""

    def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
        return sample(LOGITS[torch.from_numpy(sequence.token_ids).long()], spec, sequence, draw_set=draw_set)

    return LocalTeacherClient(score, info=INFO, spec=spec)


def sequences(*first_ids: int) -> list[TokenSequence]:
    return [TokenSequence(token_ids=np.array([first, *range(31)], np.int32)) for first in first_ids]


def cache_of(folder: Path, spec: TargetSpec) -> Fingerprint | None:
    CacheWriter(folder, Fingerprint.of(INFO, spec), provenance={}).close()
    return held_fingerprint(str(folder), alone=True)


@pytest.mark.parametrize("budget", [{"bytes_per_token": 20.0, "noise": 0.0}, {"bytes_per_token": 0.0, "noise": 0.01}])
def test_a_budget_changes_the_samplers_size(budget: dict[str, Any]) -> None:
    chosen = choose_spec(connect, sequences(3, 4), SPEC, **budget)
    assert chosen.num_samples != SPEC.num_samples
    assert replace(chosen, num_samples=SPEC.num_samples) == SPEC


def test_what_is_measured_comes_from_all_over_the_training_set_with_its_masks() -> None:
    rows = [{"input_ids": [i % VOCAB_SIZE] * 8, "labels": [-100] * 6 + [1, 2]} for i in range(1000)]
    chosen = calibration_sequences(Dataset.from_list(rows))
    assert len(chosen) == CALIBRATION_SEQUENCES
    assert [int(one.token_ids[0]) for one in chosen[:3]] == [0, 66, 133]
    assert chosen[0].loss_mask is not None
    assert chosen[0].loss_mask.tolist() == [False] * 5 + [True] * 2 + [False]
    nothing_wanted = [{"input_ids": [1, 2], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="no supervised token"):
        choose_spec(
            connect, calibration_sequences(Dataset.from_list(nothing_wanted)), SPEC, bytes_per_token=20.0, noise=0.0
        )


def test_a_sequence_that_the_teacher_refuses_ends_the_run() -> None:
    with pytest.raises(InvalidSequence, match="outside the teacher's vocabulary"):
        choose_spec(connect, sequences(3, VOCAB_SIZE), SPEC, bytes_per_token=20.0, noise=0.0)


@pytest.mark.parametrize(
    "drawn",
    [
        replace(SPEC, num_samples=17),
        replace(SPEC, sampler="threshold", threshold=0.125),
        replace(SPEC, sampler="top_k"),
    ],
)
def test_a_cache_of_the_sampler_has_had_its_budget_and_no_teacher_is_asked(tmp_path: Path, drawn: TargetSpec) -> None:
    def refuse(spec: TargetSpec) -> LocalTeacherClient:
        raise AssertionError("no teacher is to be asked")

    asked = replace(drawn, num_samples=50, threshold=0.02, top_k=3)
    chosen = choose_spec(refuse, sequences(3), asked, bytes_per_token=9.0, noise=0.0, held=cache_of(tmp_path, drawn))
    assert chosen.canonical() == drawn.canonical()


def test_a_cache_of_another_sampler_leaves_the_budget_to_the_teacher_if_there_is_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bytes_per_token": 20.0, "noise": 0.0}
    held = cache_of(tmp_path, replace(SPEC, sampler="top_k"))
    assert choose_spec(None, sequences(3), SPEC, **options, held=held) == SPEC
    assert choose_spec(connect, sequences(3), SPEC, **options, held=held) == choose_spec(
        connect, sequences(3), SPEC, **options
    )
