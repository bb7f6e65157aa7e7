"""Training from the cache: the same bytes, the same losses and the same order as online, and no teacher."""

from __future__ import annotations

import contextlib
import hashlib
import resource
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.tools.rewrite import prune
from logitstream.client.local_client import LocalTeacherClient
from logitstream.data.corpus import CacheDataset, collate
from logitstream.errors import FingerprintMismatch
from logitstream.sampling import sample
from logitstream.tokenizer import Vocabulary
from logitstream.training.split import split_cache
from logitstream.training.target_cache import TargetCache, open_target_cache
from logitstream.training.target_stream import Mode, TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import Fingerprint, SparseTargets, TargetSpec, TeacherInfo, TokenSequence

VOCAB_SIZE = 64
TOKENS = 8
SPEC = TargetSpec(num_samples=8, codec_version=1)
INFO = TeacherInfo(
    model="table",
    weights_digest=hashlib.sha256(b"table").hexdigest(),
    tokenizer_digest=hashlib.sha256(b"tokenizer").hexdigest(),
    vocab_size=VOCAB_SIZE,
    dtype="float32",
    max_sequence_tokens=512,
)
TABLE = 3 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
    """A teacher whose next-token distribution depends on the last token alone."""
    return sample(TABLE[torch.from_numpy(sequence.token_ids).long()], SPEC, sequence, draw_set=draw_set)


def make_sequences(count: int) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": rng.integers(0, VOCAB_SIZE, (count, TOKENS)).tolist()})


def open_cache(directory: Path, client: LocalTeacherClient | None, **options: Any) -> TargetCache:
    return open_target_cache(directory, client, SPEC, **options)


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def train(
    folder: Path,
    sequences: Dataset | CacheDataset,
    cache: TargetCache,
    client: LocalTeacherClient | None,
    *,
    mode: Mode,
    draw_set: int | None = None,
    resume: bool = False,
    steps: int = -1,
) -> list[float]:
    """Two epochs of four sequences a step; the loss of each step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    seen = _Losses()
    trainer = DistillationTrainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            max_steps=steps,
            logging_steps=1,
            save_strategy="steps",
            save_steps=5,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=sequences,
        data_collator=collate,
        wrap_dataloader=lambda loader: TargetStream(loader, client, cache=cache, mode=mode, draw_set=draw_set),
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return seen.losses


@pytest.fixture
def client() -> Iterable[LocalTeacherClient]:
    made = LocalTeacherClient(score, info=INFO, spec=SPEC)
    yield made
    made.close()


def test_losses_from_the_cache_are_exactly_the_online_runs(tmp_path: Path, client: LocalTeacherClient) -> None:
    sequences = make_sequences(24)
    cache = open_cache(tmp_path / "cache", client, online=True)
    online = train(tmp_path / "online", sequences, cache, client, mode="online")
    cache.close()
    assert len(set(online)) == len(online) == 12
    cache = open_cache(tmp_path / "cache", None)
    replayed = train(tmp_path / "replay", sequences, cache, None, mode="cache")
    cache.close()
    assert replayed == online


def test_a_key_is_written_once_however_often_it_is_asked_for(tmp_path: Path, client: LocalTeacherClient) -> None:
    """Three epochs online on the same draws, then another run."""
    batches = [collate([{"input_ids": ids}]) for ids in make_sequences(5)["input_ids"]]
    for epochs in (3, 1):
        cache = open_cache(tmp_path / "cache", client, online=True)
        stream = TargetStream(batches, client, cache=cache, draw_set=0)
        for _ in range(epochs):
            assert len(list(stream)) == 5
        cache.close()
    assert CacheReader(tmp_path / "cache").num_records == len(CacheReader(tmp_path / "cache")) == 5


def test_online_and_replay_give_the_same_bytes(tmp_path: Path, client: LocalTeacherClient) -> None:
    sequences = [TokenSequence(token_ids=np.array(ids, np.int32)) for ids in make_sequences(10)["input_ids"]]
    cache = open_cache(tmp_path, client)
    online = [client.submit([sequence], draw_set=1)[0].result() for sequence in sequences]
    for sequence, received in zip(sequences, online, strict=True):
        assert cache.put(cache.key(sequence, 1), sequence, 1, received)
    cache.close()
    cache = open_cache(tmp_path, None)
    for sequence, received in zip(sequences, online, strict=True):
        (stored,) = cache.get([cache.key(sequence, 1)])
        assert stored is not None
        assert (stored.payload, stored.fingerprint) == (received.payload, received.fingerprint)
    cache.close()


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 1), (8, 1), (3, 2), (2, 4)])
def test_other_batch_sizes_and_worker_counts_hit_the_cache_for_every_sequence(
    tmp_path: Path, client: LocalTeacherClient, batch_size: int, num_workers: int
) -> None:
    sequences = make_sequences(24)
    lengths = np.random.default_rng(1).integers(2, TOKENS + 1, len(sequences))
    ragged = [{"input_ids": ids[:length]} for ids, length in zip(sequences["input_ids"], lengths, strict=True)]
    cache = open_cache(tmp_path, client)
    rows: Any = ragged
    list(TargetStream(DataLoader(rows, batch_size=4, collate_fn=collate), client, cache=cache, draw_set=0))
    cache.close()
    for worker in range(num_workers):
        cache = open_cache(tmp_path, None)
        mine: Any = ragged[worker::num_workers][::-1]
        stream = TargetStream(
            DataLoader(mine, batch_size=batch_size, collate_fn=collate), None, cache=cache, mode="cache", draw_set=0
        )
        for batch in stream:
            assert batch["targets"].num_rows == batch["input_ids"].numel()
        assert stream.stats.cached_sequences == len(mine)
        cache.close()


def fill(
    directory: Path, client: LocalTeacherClient, count: int, *, num_writers: int = 1, online: bool = False
) -> None:
    """Sequences with and without a mask in a cache, written in turn by several writers."""
    rng = np.random.default_rng(2)
    caches = [open_cache(directory, client, writer_id=str(n), online=online) for n in range(num_writers)]
    for number in range(count):
        ids = rng.integers(0, VOCAB_SIZE, TOKENS, dtype=np.int32)
        mask = np.arange(TOKENS) > 1 if number % 2 else None
        sequence = TokenSequence(token_ids=ids, loss_mask=mask)
        cache = caches[number % num_writers]
        assert cache.put(cache.key(sequence, 0), sequence, 0, client.submit([sequence])[0].result())
    for cache in caches:
        cache.close()


def shuffled(dataset: CacheDataset, num_workers: int, seed: int) -> list[tuple[int, ...]]:
    """The sequences in the order in which so many workers train on them, worker by worker within a step."""
    orders = []
    for rank in range(num_workers):
        loader = DataLoader(
            dataset,
            batch_size=8 // num_workers,
            shuffle=True,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )
        prepared = prepare_data_loader(
            loader,
            num_processes=num_workers,
            process_index=rank,
            put_on_device=False,
            rng_types=[],
            use_seedable_sampler=True,
            data_seed=seed,
        )
        orders.append([[tuple(ids.tolist()) for ids in batch["input_ids"]] for batch in prepared])
    return [ids for step in zip(*orders, strict=True) for batch in step for ids in batch]


def test_the_order_is_the_same_for_any_number_of_workers_and_writers(
    tmp_path: Path, client: LocalTeacherClient
) -> None:
    fill(tmp_path / "one", client, 32)
    fill(tmp_path / "three", client, 32, num_writers=3)
    one, three = (CacheDataset(CacheReader(tmp_path / name)) for name in ("one", "three"))
    orders = [shuffled(one, 1, 0), shuffled(one, 2, 0), shuffled(one, 4, 0), shuffled(three, 2, 0)]
    assert len(set(orders[0])) == 32
    assert orders[1:] == orders[:1] * 3
    assert shuffled(one, 1, 1) != orders[0]


def test_a_run_from_the_cache_alone_resumes_at_the_exact_sequence(tmp_path: Path, client: LocalTeacherClient) -> None:
    fill(tmp_path / "cache", client, 28)
    train_set, heldout = split_cache(CacheDataset(CacheReader(tmp_path / "cache")), heldout_sequences=4)
    assert (len(train_set), len(heldout)) == (24, 4)
    runs = {}
    for name, options in (("whole", {}), ("cut", {"steps": 8}), ("cut", {"resume": True})):
        cache = open_cache(tmp_path / "cache", None)
        runs[name, bool(options)] = train(
            tmp_path / name, train_set, cache, None, mode="cache", draw_set=train_set.draw_set, **options
        )
        cache.close()
    whole, resumed = runs["whole", False], runs["cut", True]
    assert len(whole) == 12
    start = len(whole) - len(resumed)
    assert start in (5, 8)  # within an epoch of six steps
    assert resumed == whole[start:]


def test_a_run_from_the_cache_alone_goes_on_while_its_shards_are_sealed(
    tmp_path: Path, client: LocalTeacherClient
) -> None:
    """It begins while another run writes what it reads."""
    rng = np.random.default_rng(2)
    writing = open_cache(tmp_path / "cache", client)
    for _ in range(12):
        sequence = TokenSequence(token_ids=rng.integers(0, VOCAB_SIZE, TOKENS, dtype=np.int32))
        assert writing.put(writing.key(sequence, 0), sequence, 0, client.submit([sequence])[0].result())
    writing.refresh()
    dataset, cache = CacheDataset(CacheReader(tmp_path / "cache")), open_cache(tmp_path / "cache", None)
    cache.refresh()
    writing.close()
    prune(tmp_path / "cache", before_draw_set=0)
    assert [len(dataset[i]["input_ids"]) for i in range(12)] == [TOKENS] * 12
    sequences = [TokenSequence(token_ids=dataset[i]["input_ids"].astype(np.int32)) for i in range(12)]
    assert None not in cache.get([cache.key(sequence, 0) for sequence in sequences])
    losses = train(tmp_path / "run", dataset, cache, None, mode="cache", draw_set=0)
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    cache.close()


def test_damaged_records_are_left_out_of_a_run_from_the_cache_alone(tmp_path: Path, client: LocalTeacherClient) -> None:
    fill(tmp_path / "cache", client, 24)
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    reader = CacheReader(tmp_path / "cache")
    content = bytearray(shard.read_bytes())
    for i in (3, 11):
        content[content.find(reader.record(i).payload)] ^= 1
    shard.write_bytes(content)
    dataset = CacheDataset(CacheReader(tmp_path / "cache"))
    assert len(dataset) == 24
    assert [int(dataset[i]["loss_mask"].sum()) for i in (3, 11)] == [0, 0]
    cache = open_cache(tmp_path / "cache", None)
    stream = TargetStream(
        DataLoader(dataset, batch_size=4, collate_fn=collate), None, cache=cache, mode="cache", draw_set=0
    )
    rows = sum(int((np.diff(batch["targets"].row_offsets) > 0).sum()) for batch in stream)
    assert stream.stats.sequences == 22
    expected = [TOKENS if r.loss_mask is None else int(r.loss_mask.sum()) for r in reader.records()]
    assert rows == sum(expected)
    losses = train(tmp_path / "run", dataset, cache, None, mode="cache", draw_set=0)
    assert np.isfinite(losses).all()
    cache.close()


def test_a_cache_of_another_tokenizer_is_refused_even_without_a_teacher(
    tmp_path: Path, client: LocalTeacherClient
) -> None:
    fill(tmp_path, client, 2)
    other = Vocabulary([(0, "another")])
    wrong = f"tokenizer_digest: '{INFO.tokenizer_digest}' against '{other.digest}'; tokenize with the cache's tokenizer"
    with pytest.raises(FingerprintMismatch, match=wrong):
        open_cache(tmp_path, None, tokenizer=other)


def test_a_cache_takes_a_tokenizer_that_only_adds_tokens(tmp_path: Path) -> None:
    ours = Vocabulary([(0, "a"), (1, "b")])
    info = replace(INFO, tokenizer_digest=ours.digest)
    client = LocalTeacherClient(score, info=info, spec=SPEC)
    fill(tmp_path, client, 2)
    open_cache(tmp_path, None, tokenizer=Vocabulary([*ours.pairs, (7, "<tool>")])).close()
    with pytest.raises(FingerprintMismatch, match="tokenize with the cache's tokenizer"):
        open_cache(tmp_path, None, tokenizer=Vocabulary([(0, "a"), (1, "<tool>"), (2, "b")]))
    client.close()


def test_a_cache_of_older_weights_is_refused_by_name(tmp_path: Path, client: LocalTeacherClient) -> None:
    fill(tmp_path, client, 2)
    newer = LocalTeacherClient(score, info=replace(INFO, weights_digest="cd" * 32, teacher_version=1), spec=SPEC)
    with pytest.raises(FingerprintMismatch, match=f"weights_digest: 'cdcd.*' against '{INFO.weights_digest}'"):
        open_cache(tmp_path, newer, online=True)
    newer.close()


def test_a_full_disk_at_the_start_leaves_an_online_run_alone(tmp_path: Path, client: LocalTeacherClient) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    cache = open_cache(tmp_path / "cache", client, online=True)
    batches = [collate([{"input_ids": ids}]) for ids in make_sequences(3)["input_ids"]]
    assert len(list(TargetStream(batches, client, cache=cache))) == 3
    assert not cache.writable
    cache.close()


@contextlib.contextmanager
def no_room_on_disk() -> Iterator[None]:
    """Every write to a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_cache_that_cannot_be_written_from_the_start_is_read_all_the_same(
    tmp_path: Path, client: LocalTeacherClient
) -> None:
    """A full disk has no room for what sealing a dead writer's shard takes."""
    batches = [collate([{"input_ids": ids}]) for ids in make_sequences(3)["input_ids"]]
    cache = open_cache(tmp_path, client, online=True)
    list(TargetStream(batches[:2], client, cache=cache, draw_set=0))
    cache.close()
    reader = CacheReader(tmp_path)
    dead = CacheWriter(tmp_path, reader.fingerprint)
    dead.put(*reader.record(0)[:5])
    dead.flush()
    dead.abandon()
    with no_room_on_disk():
        cache = open_cache(tmp_path, client)
    assert not cache.writable
    stream = TargetStream(batches, client, cache=cache, mode="cache_then_online", draw_set=0)
    assert len(list(stream)) == 3
    assert stream.stats.cached_sequences == 2
    cache.close()


def test_a_writer_with_the_same_fingerprint_continues_the_cache(tmp_path: Path, client: LocalTeacherClient) -> None:
    fill(tmp_path, client, 3)
    CacheWriter(tmp_path, Fingerprint.of(INFO, SPEC)).close()
    assert len(CacheReader(tmp_path)) == 3
