"""Held-out sequences stay held out: in runs of other sizes, orders and seeds, with the text or from the cache alone."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TrainingArguments

from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.heldout import FILE, add_heldout, read_heldout
from logitstream.cache.manifest import render
from logitstream.cache.tools.rewrite import merge, prune
from logitstream.data.corpus import CacheDataset
from logitstream.errors import CacheError
from logitstream.training.split import documents_of, split_cache, split_text
from logitstream.types import Fingerprint, TargetSpec, TokenSequence, request_key
from student_worker.run import load_data
from tests.flat_settings import student_config

FINGERPRINT = Fingerprint(
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=200,
    dtype="float32",
    id_model_digest="",
    spec=TargetSpec().canonical(),
)
WORDS = {"<end>": 0} | {f"w{index}": index for index in range(1, 200)}


def make_rows(count: int, *, seed: int = 0, first: int = 1) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"input_ids": rng.integers(first, 200, (count, 8)).tolist()})


def contents(rows: Dataset | CacheDataset) -> set[tuple[int, ...]]:
    return {tuple(np.asarray(rows[i]["input_ids"]).tolist()) for i in range(len(rows))}


def keep(folder: Path, rows: Dataset, draw_sets: tuple[int, ...] = (0,)) -> str:
    """A cache of what a run trains on, as its stream writes it."""
    with CacheWriter(folder, FINGERPRINT, provenance={}) as writer:
        for sequence in documents_of(rows, range(len(rows))):
            for draw_set in draw_sets:
                key = request_key(FINGERPRINT.digest, sequence, draw_set)
                writer.put(key, sequence.token_ids, sequence.loss_mask, b"payload", draw_set)
    return str(folder)


def test_the_split_depends_on_the_content_alone() -> None:
    rows = make_rows(60)
    train, heldout = split_text(rows, heldout_sequences=7)
    assert contents(train) | contents(heldout) == contents(rows)
    assert len(train) == 53
    assert len(heldout) == 7
    shuffled = rows.shuffle(seed=5)
    for again in (shuffled, shuffled.select(range(60))):
        few, same = split_text(again, heldout_sequences=7, max_sequences=20)
        assert contents(same) == contents(heldout)
        assert len(few) == 20
        assert contents(few) <= contents(train)
    more, _ = split_text(rows, heldout_sequences=3, max_sequences=20)
    assert len(contents(more) & contents(few)) >= 16, "the first by content, whatever is held out before them"
    assert few["input_ids"] == [ids for ids in shuffled["input_ids"] if tuple(ids) in contents(few)], (
        "in the text's order"
    )


def test_what_is_held_out_is_in_no_other_row() -> None:
    """Sequences that occur again, and ones that are documents of packed rows too, with other masks."""
    rows = make_rows(30)["input_ids"]
    packed = [*rows, *rows[:15], *([*rows[i], 9 + i, 9] for i in range(30))]
    positions = [list(range(8))] * 45 + [[*range(8), 0, 1]] * 30
    mask = [[1] * 8] * 45 + [[0] * 7 + [1] * 3] * 30
    train, heldout = split_text(
        Dataset.from_dict({"input_ids": packed, "position_ids": positions, "completion_mask": mask}),
        heldout_sequences=6,
    )
    found, apart = ({tuple(ids[:8]) for ids in part["input_ids"]} for part in (train, heldout))
    assert not found & apart
    assert found | apart == {tuple(ids) for ids in rows}
    assert len({tuple(ids) for ids in heldout["input_ids"]}) == len(heldout) == 6
    assert len(train) < 75 - 6


def test_too_few_sequences_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match="heldout_sequences = 5 leaves nothing of 5 to train on"):
        split_text(make_rows(5), heldout_sequences=5)


@pytest.mark.parametrize("changes", [{}, {"max_sequences": 10}, {"heldout_sequences": 2}, {"heldout_sequences": 9}])
def test_later_runs_on_a_cache_follow_its_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, int]
) -> None:
    """An online run on a part of the text; then runs with the text and without it, of other sizes."""
    cache, rows = str(tmp_path / "cache"), make_rows(40)
    train, heldout = split_text(rows, heldout_sequences=4, max_sequences=20, cache=cache)
    keep(tmp_path / "cache", train)
    sizes: dict[str, Any] = {"heldout_sequences": 4, "cache": cache} | changes
    for text in (rows, rows.shuffle(seed=1)):
        online = split_text(text, **sizes)
        assert not contents(online[0]) & contents(heldout)
        assert contents(online[1]) <= contents(heldout)
        offline = split_text(text, cached_only=True, **sizes)
        assert contents(offline[0]) <= contents(train)
        assert contents(offline[1]) == contents(online[1])
    alone = split_cache(CacheDataset(CacheReader(cache)), **sizes)
    assert len(alone[0]) == changes.get("max_sequences", 20)
    assert contents(alone[0]) <= contents(train)
    assert contents(alone[1]) <= contents(heldout)
    assert {len(online[1]), len(alone[1])} == {min(4, sizes["heldout_sequences"])}
    assert ("4 sequences are held out, not 9: those that the cache notes" in caplog.text) == (
        sizes["heldout_sequences"] == 9
    )


def test_the_command_follows_the_caches_split_whatever_its_seed(tmp_path: Path) -> None:
    words = " ".join(f"w{index}" for index in np.random.default_rng(3).integers(1, 200, 8 * 44))
    (tmp_path / "text.txt").write_text(words)
    made = Tokenizer(WordLevel(WORDS, unk_token="<end>"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")

    def load(seed: int, **changes: Any) -> tuple[Dataset | CacheDataset, Dataset]:
        settings: dict[str, Any] = {"model": "m", "cache": str(tmp_path / "cache"), "sequence_tokens": 8}
        config = student_config(**settings | {"heldout_sequences": 6} | changes)
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", seed=seed)
        return load_data(config, arguments, tokenizer)

    text = {"text": [str(tmp_path / "text.txt")]}
    train, heldout = load(1, max_sequences=25, **text)
    assert isinstance(train, Dataset)
    keep(tmp_path / "cache", train)
    for changes in (text, {}):
        again, same = load(2, targets="cache", **changes)
        assert contents(again) == contents(train)
        assert contents(same) == contents(heldout)


def test_a_warning_says_that_what_is_held_out_was_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache of a run that held nothing out."""
    rows = make_rows(20)
    _, heldout = split_text(rows, heldout_sequences=4)
    cache = keep(tmp_path / "cache", rows.filter(lambda row: tuple(row["input_ids"]) not in contents(heldout)))
    split_text(rows, heldout_sequences=4, cache=cache)
    assert "has seen them" not in caplog.text
    (tmp_path / "cache" / FILE).unlink()
    train, heldout = split_text(rows, heldout_sequences=7, cache=cache)
    assert "holds targets of sequences that are held out from now on" in caplog.text
    assert not contents(train) & contents(heldout)


def test_a_text_that_the_cache_holds_nothing_of_is_refused_and_not_noted(tmp_path: Path) -> None:
    cache = keep(tmp_path / "cache", make_rows(5))
    with pytest.raises(ValueError, match="holds targets of none of the text's 8 sequences: expected the text"):
        split_text(make_rows(10, seed=1), heldout_sequences=2, cache=cache, cached_only=True)
    assert read_heldout(cache) == []


def test_a_cache_that_notes_nothing_gets_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = keep(tmp_path / "cache", make_rows(20), draw_sets=(2, 5))
    corpus = CacheDataset(CacheReader(cache))
    train, heldout = split_cache(corpus, heldout_sequences=3, cache=cache)
    assert "holds targets of sequences that are held out from now on" in caplog.text
    prune(tmp_path / "cache", before_draw_set=5)
    later = CacheDataset(CacheReader(cache))
    assert (later.draw_set, len(later)) == (5, 20)
    again, same = split_cache(later, heldout_sequences=5, cache=cache)
    assert contents(same) == contents(heldout)
    assert contents(again) == contents(train)


def test_a_text_that_has_none_of_the_notes_adds_its_own(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    _, first = split_text(make_rows(20), heldout_sequences=3, cache=cache)
    _, second = split_text(make_rows(20, seed=1), heldout_sequences=3, cache=cache)
    noted = {tuple(sequence.token_ids.tolist()) for sequence in read_heldout(cache)}
    assert noted == contents(first) | contents(second)
    assert len(noted) == 6


def test_notes_keep_masks_and_go_with_a_merged_cache(tmp_path: Path) -> None:
    mask = np.array([True, False, True])
    sequences = [
        TokenSequence(token_ids=np.array([n, 2, 3], np.int32), loss_mask=mask if n else None) for n in range(4)
    ]
    for name, some in (("a", sequences[:3]), ("b", sequences[1:])):
        keep(tmp_path / name, make_rows(2))
        add_heldout(tmp_path / name, some)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    found = read_heldout(tmp_path / "c")
    assert {one.digest() for one in found} == {one.digest() for one in sequences}
    assert read_heldout(tmp_path / "nowhere") == []
    url = f"memory://{tmp_path.name}"
    add_heldout(url, sequences)
    assert len(read_heldout(url)) == 4


def test_no_note_is_lost_where_many_runs_begin_at_once(tmp_path: Path) -> None:
    sequences = [TokenSequence(token_ids=np.array([n, 2, 3], np.int32)) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: add_heldout(tmp_path, [one]), sequences))
    assert {one.digest() for one in read_heldout(tmp_path)} == {one.digest() for one in sequences}


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"sequences": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_note_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CacheError, match=f"{FILE} is damaged"):
        read_heldout(tmp_path)


def test_a_note_that_holds_no_sequences_is_refused(tmp_path: Path) -> None:
    for entry in (
        {"token_ids": ["x"]},
        {"token_ids": []},
        {"token_ids": [-1]},
        {"token_ids": [1], "loss_mask": [1, 1]},
        7,
    ):
        (tmp_path / FILE).write_bytes(render({"sequences": [entry]}))
        with pytest.raises(CacheError, match=f"{FILE} is damaged"):
            read_heldout(tmp_path)


def test_a_cache_that_cannot_note_anything_holds_up_no_online_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        train, heldout = split_text(make_rows(10), heldout_sequences=2, cache=str(tmp_path / "cache"))
    assert (len(train), len(heldout)) == (8, 2)
    assert "later runs may train on what this one holds out" in caplog.text


@pytest.mark.parametrize(
    ("settings", "targets"),
    [({}, "online"), ({"cache": "c"}, "cache_then_online"), ({"cache": "c", "targets": "online"}, "online")],
)
def test_a_cache_is_read_before_the_teacher_is_asked_unless_told_otherwise(
    settings: dict[str, Any], targets: str
) -> None:
    config = student_config(model="m", text=["a.txt"], **settings)
    assert config.source == targets
