"""The static id model of codec version 2, from what a teacher draws on a text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from logitstream import codec
from logitstream.files import naming, write_whole
from logitstream.id_model import IdModel
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from teacher_server.backend import EncodedTargets, ScoreRequest, TeacherBackend
from teacher_server.config import IdModelSettings

SEQUENCE_TOKENS = 256
MAX_SEQUENCES = 40
BATCH_SEQUENCES = 8
SPEC = TargetSpec(num_samples=1000)
"""Unbiased and near the distribution itself: its weights add up to the teacher's average."""

log = logging.getLogger(__name__)


def id_model_from(settings: IdModelSettings, tokenizer: Any, backend: TeacherBackend) -> bytes:
    """Return the id model in the settings' file, made from their text if there is none; empty if neither is given.

    Replicas must share the file: models of two calibrations differ in a few levels, which the students would refuse.
    Raises ValueError if a file cannot be read or was made for another vocabulary.
    """
    path = Path(settings.file)
    if settings.file and path.exists():
        with naming(f"id_model.file {path}"):
            found = IdModel.from_bytes(path.read_bytes())
            if found.vocab_size != (expected := backend.describe().vocab_size):
                raise ValueError(f"it is of {found.vocab_size} ids, the teacher has {expected}: make another")
        return found.to_bytes()
    if not settings.text:
        return b""
    with naming(f"id_model.text {settings.text}"):
        text = Path(settings.text).read_text(encoding="utf-8")
        encoded = calibrate(backend, tokenizer.encode(text)).to_bytes()
    if settings.file:
        write_whole(path, encoded)
    return encoded


def calibrate(backend: TeacherBackend, token_ids: list[int]) -> IdModel:
    """Return the id model of the teacher's targets at evenly spaced places of a text; ValueError for an empty one."""
    if not token_ids:
        raise ValueError("the text holds no token")
    info = backend.describe()
    length = min(SEQUENCE_TOKENS, info.max_sequence_tokens)
    num_places = min(MAX_SEQUENCES, -(-len(token_ids) // length))
    starts = np.linspace(0, max(0, len(token_ids) - length), num_places).astype(int)
    sequences = [TokenSequence(token_ids=np.array(token_ids[start : start + length], np.int32)) for start in starts]
    requests = [ScoreRequest(sequence=sequence, spec=SPEC) for sequence in sequences]
    log.info("id model from %d sequences of the calibration text", len(sequences))
    expected_counts = np.zeros(info.vocab_size)
    for start in range(0, len(requests), BATCH_SEQUENCES):
        for targets in backend.score(requests[start : start + BATCH_SEQUENCES]):
            if isinstance(targets, EncodedTargets):
                targets = codec.decode(targets.payload, spec=SPEC)
            if isinstance(targets, SparseTargets):
                np.add.at(expected_counts, targets.token_ids, targets.weights())
    return IdModel.from_expected_counts(expected_counts)
