"""From the cache alone every epoch trains on draws that are there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments

from logitstream.cache import CacheWriter
from logitstream.cache.manifest import MANIFEST, parse, render
from logitstream.data.corpus import CacheDataset
from logitstream.errors import CacheError
from logitstream.types import Fingerprint, TargetSpec, TokenSequence, request_key
from student_worker.config import StudentConfig
from student_worker.run import load_data
from student_worker.run_plan import choose_draw_sets, held_fingerprint, make_plan
from tests.flat_settings import student_config

NO_TOKENIZER: Any = None  # nothing is tokenized
ASKS_NOBODY: Any = None
SPEC = TargetSpec(sampler="threshold", threshold=0.125, seed=7)
FINGERPRINT = Fingerprint(
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=100,
    dtype="float32",
    id_model_digest="",
    spec=SPEC.canonical(),
)


def cache_with(folder: Path, records: dict[int, int]) -> str:
    """So many records of each draw set."""
    writer = CacheWriter(folder, FINGERPRINT, provenance={})
    for draw_set, num_records in records.items():
        for index in range(num_records):
            sequence = TokenSequence(token_ids=np.array([index], np.int32))
            key = request_key(FINGERPRINT.digest, sequence, draw_set)
            writer.put(key, sequence.token_ids, None, b"payload", draw_set)
    writer.close()
    return str(folder)


def student(cache: str, **changes: Any) -> StudentConfig:
    return student_config(**{"model": "m", "targets": "cache", "cache": cache} | changes)


def arguments(**changes: Any) -> TrainingArguments:
    return TrainingArguments(use_cpu=True, report_to="none", per_device_train_batch_size=2, **changes)


@pytest.mark.parametrize("text", [[], ["a.txt"]])
@pytest.mark.parametrize(
    ("records", "draw_sets"),
    [({0: 3, 1: 3}, (0, 1)), ({0: 3, 1: 2, 2: 3}, (0, 2)), ({0: 3}, (0,)), ({4: 3, 5: 3}, (4, 5)), ({}, (0,))],
)
def test_epochs_from_the_cache_alone_train_on_its_whole_draw_sets_in_turn(
    tmp_path: Path, text: list[str], records: dict[int, int], draw_sets: tuple[int, ...]
) -> None:
    cache = cache_with(tmp_path, records)
    assert choose_draw_sets(student(cache, text=text)) == draw_sets
    assert choose_draw_sets(student(cache, text=text, draws="reuse")) == draw_sets[:1]


def test_draws_of_the_teacher_are_the_epochs_or_draw_set_0(tmp_path: Path) -> None:
    cache = cache_with(tmp_path, {4: 3})
    online = {"targets": "online", "text": ["a.txt"]}
    assert choose_draw_sets(student(cache, draws="reuse", **online)) == (0,)
    assert choose_draw_sets(student(cache, draws="fresh", **online)) == ()


def test_a_run_from_the_cache_alone_takes_its_spec_in_place_of_a_budget(tmp_path: Path) -> None:
    config = student(cache_with(tmp_path, {0: 1}), noise=0.01, draws="reuse", heldout_sequences=0)
    train, _ = load_data(config, arguments(output_dir=str(tmp_path / "run")), NO_TOKENIZER)
    plan = make_plan(config, train, checkpoint=None, connect=ASKS_NOBODY)
    assert plan.spec.canonical() == SPEC.canonical()
    targets = plan.config.targets
    assert (targets.spec(), targets.bytes_per_token, targets.noise) == (plan.spec, 0.0, 0.0)
    assert plan.draw_sets == (0,)


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({"teacher": ["evil.example:1"], "token_file": "/etc/passwd"}, "has no teacher, token_file"),
        ({"output_dir": "/somewhere"}, "has no output_dir"),
        ({"target_seed": 1}, "has no target_seed"),
        ({"__class__": "x"}, "has no __class__"),
        ({"num_samples": 9}, r"expected the parameters of threshold, {.*}, got .*num_samples"),
        ({"threshold": "0.125"}, "threshold must lie in"),
        ({"temperature": 1}, "expected the parameters of threshold"),
        ({"seed": True}, "expected the parameters of threshold"),
        ({"threshold": 7.0}, "threshold must lie in"),
        ({"sampler": ["threshold"]}, "unknown sampler"),
    ],
)
def test_a_foreign_caches_manifest_sets_nothing_but_the_sampler(
    tmp_path: Path, added: dict[str, Any], named: str
) -> None:
    cache = cache_with(tmp_path, {0: 1})
    forged = replace(FINGERPRINT, spec=FINGERPRINT.spec | added)
    manifest = parse((tmp_path / MANIFEST).read_bytes(), tmp_path)
    manifest |= {"fingerprint": asdict(forged), "fingerprint_digest": forged.digest}
    (tmp_path / MANIFEST).write_bytes(render(manifest))
    with pytest.raises(CacheError, match=named):
        held_fingerprint(cache, alone=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights_digest": "../../x"}, "weights_digest must match"),
        ({"dtype": 32}, "dtype must match"),
        ({"vocab_size": "100"}, "vocab_size must be a whole number"),
        ({"vocab_size": 1 << 40}, "vocab_size must be a whole number"),
        ({"teacher": "evil.example:1"}, "missing or unknown: teacher"),
        ({"spec": "systematic"}, "expected a target specification, got a str"),
    ],
)
def test_a_fingerprint_from_a_file_is_checked_part_by_part(changes: dict[str, Any], named: str) -> None:
    written = json.loads(json.dumps(asdict(FINGERPRINT)))
    assert Fingerprint.from_json(written) == FINGERPRINT
    with pytest.raises(ValueError, match=named):
        Fingerprint.from_json(written | changes)
    with pytest.raises(ValueError, match="missing or unknown: dtype"):
        Fingerprint.from_json({name: value for name, value in written.items() if name != "dtype"})


def test_a_resumed_run_keeps_its_sequences_and_draws_after_the_cache_grew(tmp_path: Path) -> None:
    """A new run takes what has come since: other sequences, and a second draw set for its second epoch."""

    def sequences_and_draws(*, resumes: bool) -> tuple[list[int], list[int], tuple[int, ...]]:
        config = student(cache, heldout_sequences=2)
        settings = arguments(num_train_epochs=2, output_dir=str(tmp_path / "run"))
        train, heldout = load_data(
            config, settings, NO_TOKENIZER, checkpoint=tmp_path / "run" / "checkpoint-1" if resumes else None
        )
        assert isinstance(train, CacheDataset)
        first, second = ([int(part[i]["input_ids"][0]) for i in range(len(part))] for part in (train, heldout))
        return first, second, choose_draw_sets(config, train.cache)

    cache = cache_with(tmp_path / "cache", {0: 8})
    first = sequences_and_draws(resumes=False)
    assert (sorted(first[0] + first[1]), first[2]) == (list(range(8)), (0,))
    cache_with(tmp_path / "cache", {0: 20, 1: 20})
    assert sequences_and_draws(resumes=True) == first
    train, heldout, draw_sets = sequences_and_draws(resumes=False)
    assert (sorted(train + heldout), draw_sets) == (list(range(20)), (0, 1))
