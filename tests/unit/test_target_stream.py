from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from torch.utils.data import DataLoader

from logitstream import codec
from logitstream.client.local_client import LocalTeacherClient
from logitstream.data.documents import Batch
from logitstream.errors import (
    CacheMiss,
    CodecError,
    FingerprintMismatch,
    InvalidSequence,
    LogitstreamError,
    TeacherUnavailable,
)
from logitstream.training.target_cache import TargetCache, open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.types import Fingerprint, ReceivedTargets, SparseTargets, TokenSequence
from tests.fake_teacher import SPEC, expected_targets, fake_info

INFO = fake_info()


class HandTeacher:
    """A TeacherClient whose requests are answered by the test, or at once where `automatic`."""

    def __init__(self, *, automatic: bool = True, refuse: Callable[[TokenSequence], bool] = lambda sequence: False):
        self.automatic = automatic
        self.refuse = refuse
        self.asked: list[tuple[TokenSequence, int, int]] = []
        self.open: list[tuple[TokenSequence, int, Future[ReceivedTargets]]] = []
        self.damage = 0
        self.max_teacher_lag = 0
        self.info = INFO
        self.spec = SPEC

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        return [self._submit(sequence, draw_set, priority) for sequence in sequences]

    def _submit(self, sequence: TokenSequence, draw_set: int, priority: int) -> Future[ReceivedTargets]:
        future: Future[ReceivedTargets] = Future()
        self.asked.append((sequence, draw_set, priority))
        self.open.append((sequence, draw_set, future))
        if self.automatic:
            self.answer(len(self.open) - 1)
        return future

    def answer(self, index: int) -> None:
        sequence, draw_set, future = self.open.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        if self.refuse(sequence):
            future.set_exception(InvalidSequence("told to refuse"))
            return
        payload = codec.encode(expected_targets(sequence, draw_set), version=1)
        if self.damage > 0:
            self.damage -= 1
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        fingerprint = Fingerprint.of(self.info, SPEC).digest
        weights_digest = bytes.fromhex(self.info.weights_digest)[:8]
        future.set_result(ReceivedTargets(payload=payload, fingerprint=fingerprint, weights_digest=weights_digest))

    def close(self) -> None: ...


def make_batches(count: int, *, num_sequences: int = 2, num_tokens: int = 6, seed: int = 0) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": torch.from_numpy(rng.integers(0, 900, (num_sequences, num_tokens)))} for _ in range(count)]


def sequences_of(batch: Batch) -> list[TokenSequence]:
    return [TokenSequence(token_ids=row.numpy().astype(np.int32)) for row in batch["input_ids"]]


def expected(batch: Batch, draw_set: int = 0) -> SparseTargets:
    return SparseTargets.concatenate([expected_targets(sequence, draw_set) for sequence in sequences_of(batch)])


def assert_same(got: SparseTargets, want: SparseTargets) -> None:
    for name in ("row_offsets", "token_ids", "counts"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def take_until(error: type[Exception], stream: TargetStream, *, match: str = ".") -> int:
    """How many batches come before that error."""
    taken: list[Batch] = []
    with pytest.raises(error, match=match):
        taken.extend(stream)
    return len(taken)


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("target-stream")]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    event = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("waited too long")


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 9), prefetch=st.integers(1, 5), seed=st.integers(0, 1000))
def test_batches_come_in_order_with_their_own_targets_whatever_order_the_answers_have(
    count: int, prefetch: int, seed: int
) -> None:
    batches = make_batches(count, seed=seed)
    teacher = HandTeacher(automatic=False)
    shuffle, done = random.Random(seed), threading.Event()

    def answer_in_any_order() -> None:
        while not done.is_set():
            if teacher.open:
                teacher.answer(shuffle.randrange(len(teacher.open)))

    answering = threading.Thread(target=answer_in_any_order)
    answering.start()
    try:
        got = list(TargetStream(batches, teacher, prefetch_batches=prefetch))
    finally:
        done.set()
        answering.join()
    assert len(got) == count
    for batch, source in zip(got, batches, strict=True):
        assert batch["input_ids"] is source["input_ids"]
        assert_same(batch["targets"], expected(source))
    assert [priority for _, _, priority in teacher.asked] == [step for step in range(count) for _ in range(2)]
    assert stream_threads() == []


def test_no_more_than_prefetch_batches_are_asked_for_ahead() -> None:
    teacher = HandTeacher()
    stream = TargetStream(make_batches(20), teacher, prefetch_batches=3)
    iterator = iter(stream)
    for taken in range(1, 10):
        next(iterator)
        wait_until(lambda taken=taken: len(teacher.asked) == 2 * (taken + 3))  # type: ignore[misc]
        wait_until(lambda: stream.queue_depth == 3)
    threading.Event().wait(0.05)
    assert len(teacher.asked) == 2 * 12
    stream.close()


def test_closing_mid_epoch_cancels_what_is_in_flight_and_leaves_no_thread() -> None:
    teacher = HandTeacher(automatic=False)
    stream = TargetStream(make_batches(20), teacher, prefetch_batches=4)
    iterator = iter(stream)
    taking = threading.Thread(target=lambda: next(iterator, None))
    taking.start()
    wait_until(lambda: len(teacher.open) == 2 * (1 + 4))
    stream.close()
    taking.join(20)
    assert not taking.is_alive()
    assert all(future.cancelled() for _, _, future in teacher.open)
    assert stream_threads() == []


def test_leaving_the_loop_ends_the_threads() -> None:
    for _ in TargetStream(make_batches(20), HandTeacher()):
        break
    assert stream_threads() == []


def test_fresh_draws_count_the_epochs_and_reused_ones_do_not() -> None:
    batches = make_batches(2)
    fresh, reused = HandTeacher(), HandTeacher()
    stream = TargetStream(batches, fresh)
    for epoch in range(3):
        for got, source in zip(stream, batches, strict=True):
            assert_same(got["targets"], expected(source, epoch))
    stream.set_epoch(7)
    list(stream)
    assert [draw_set for _, draw_set, _ in fresh.asked] == [0] * 4 + [1] * 4 + [2] * 4 + [7] * 4
    stream = TargetStream(batches, reused, draw_set=5)
    list(stream)
    list(stream)
    assert {draw_set for _, draw_set, _ in reused.asked} == {5}
    in_turn = HandTeacher()
    stream = TargetStream(batches[:1], in_turn, draw_set=[4, 7])
    for _ in range(3):
        list(stream)
    assert [draw_set for _, draw_set, _ in in_turn.asked] == [4, 4, 7, 7, 4, 4]


def test_a_resumed_epoch_asks_for_what_is_left_of_it() -> None:
    batches = make_batches(5)
    teacher = HandTeacher()
    stream = TargetStream(batches, teacher)
    got = list(stream.over(iter(batches[3:]), first_step=3))
    assert [batch["input_ids"] is source["input_ids"] for batch, source in zip(got, batches[3:], strict=True)] == [
        True
    ] * 2
    assert [priority for _, _, priority in teacher.asked] == [3, 3, 4, 4]
    assert len(list(stream)) == 5


def test_a_refused_sequence_is_left_out_of_the_loss_and_the_rest_goes_on() -> None:
    batches = [batch | {"labels": batch["input_ids"].clone()} for batch in make_batches(12)]
    bad = batches[5]["input_ids"][1].tolist()
    teacher = HandTeacher(refuse=lambda sequence: sequence.token_ids.tolist() == bad)
    stream = TargetStream(batches, teacher)
    got = list(stream)
    assert stream.stats.refused_sequences == 1
    assert got[5]["labels"][0].tolist() == batches[5]["input_ids"][0].tolist()
    assert got[5]["labels"][1].tolist() == [-100] * 6
    assert np.diff(got[5]["targets"].row_offsets).tolist() == [1] * 5 + [0] * 7
    assert batches[5]["labels"][1].tolist() == bad
    assert sum(batch["targets"].num_entries for batch in got) == 12 * 2 * 5 - 5


def test_a_run_whose_sequences_are_mostly_refused_ends() -> None:
    with pytest.raises(LogitstreamError, match="9 of 9 sequences are refused or damaged; the last: told to refuse"):
        list(TargetStream(make_batches(10), HandTeacher(refuse=lambda sequence: True)))


def test_a_failing_dataloader_raises_its_error_after_the_batches_before_it() -> None:
    def failing() -> Iterator[Batch]:
        yield from make_batches(3)
        raise OSError("the disk is gone")

    assert take_until(OSError, TargetStream(failing(), HandTeacher()), match="the disk is gone") == 3


def test_a_closed_client_ends_the_stream_with_a_clear_error() -> None:
    teacher = HandTeacher(automatic=False)
    iterator = iter(TargetStream(make_batches(3), teacher))

    def cancel_all() -> None:
        wait_until(lambda: len(teacher.open) == 6)
        for _, _, future in teacher.open:
            future.cancel()

    cancelling = threading.Thread(target=cancel_all)
    cancelling.start()
    with pytest.raises(TeacherUnavailable, match="closed"):
        next(iterator)
    cancelling.join()


def test_damaged_targets_are_asked_for_again_once() -> None:
    batches, teacher = make_batches(4), HandTeacher()
    teacher.damage = 1
    for got, source in zip(TargetStream(batches, teacher, prefetch_batches=1), batches, strict=True):
        assert_same(got["targets"], expected(source))
    assert len(teacher.asked) == 8 + 1
    teacher.damage = 100
    assert take_until(CodecError, TargetStream(batches, teacher, prefetch_batches=1)) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_with_worker_processes_gives_the_same_batches(workers: int) -> None:
    rows = [{"input_ids": row} for batch in make_batches(6) for row in batch["input_ids"]]
    plain = [batch["input_ids"].tolist() for batch in DataLoader(rows, batch_size=3)]  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(rows, batch_size=3, num_workers=workers)  # type: ignore[arg-type]
    stream = TargetStream(loader, HandTeacher(), prefetch_batches=2)
    assert len(stream) == 4
    assert [batch["input_ids"].tolist() for batch in stream] == plain


def test_an_accelerate_dataloader_gives_the_order_it_would_give_alone() -> None:
    rows = [{"input_ids": row} for batch in make_batches(10) for row in batch["input_ids"]]

    def prepared() -> Any:
        torch.manual_seed(3)
        loader: DataLoader[Any] = DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        return Accelerator(cpu=True).prepare(loader)

    alone = prepared()
    orders = []
    for epoch in range(2):
        alone.set_epoch(epoch)
        orders.append([batch["input_ids"].tolist() for batch in alone])
    stream = TargetStream(prepared(), HandTeacher())
    for epoch in range(2):
        stream.set_epoch(epoch)
        assert [batch["input_ids"].tolist() for batch in stream] == orders[epoch]
    assert stream.batch_sampler is stream.dataloader.batch_sampler  # type: ignore[attr-defined]


def open_cache(directory: Path, teacher: HandTeacher | None) -> TargetCache:
    return open_target_cache(directory, teacher, SPEC)


def test_an_epoch_from_the_cache_alone_repeats_the_online_one(tmp_path: Path) -> None:
    batches, teacher = make_batches(12), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    online = list(TargetStream(batches, teacher, cache=cache, draw_set=0))
    cache.close()
    cache = open_cache(tmp_path, None)
    stream = TargetStream(batches, None, cache=cache, mode="cache", draw_set=0, prefetch_batches=3)
    for _ in range(2):
        for got, before in zip(stream, online, strict=True):
            assert_same(got["targets"], before["targets"])
    assert stream.stats.cached_sequences == 48
    cache.close()


def test_the_second_epoch_of_a_run_reads_what_the_first_wrote(tmp_path: Path) -> None:
    batches, teacher = make_batches(8), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    stream = TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0)
    list(stream)
    for got, source in zip(stream, batches, strict=True):
        assert_same(got["targets"], expected(source))
    assert len(teacher.asked) == 16
    assert stream.stats.cached_sequences == 16
    cache.close()


def test_only_what_the_cache_lacks_is_asked_for(tmp_path: Path) -> None:
    batches, teacher = make_batches(6), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[::2], teacher, cache=cache, draw_set=0))
    teacher.asked.clear()
    stream = TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0)
    for got, source in zip(stream, batches, strict=True):
        assert_same(got["targets"], expected(source))
    asked = [sequence.token_ids.tolist() for sequence, _, _ in teacher.asked]
    assert asked == [row.tolist() for batch in batches[1::2] for row in batch["input_ids"]]
    cache.close()


def test_what_the_cache_alone_does_not_hold_is_an_error_that_says_so(tmp_path: Path) -> None:
    batches, teacher = make_batches(4), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[:3], teacher, cache=cache, draw_set=0))
    stream = TargetStream(batches, None, cache=cache, mode="cache", draw_set=0, prefetch_batches=1)
    assert take_until(CacheMiss, stream, match="a sequence of 6 tokens for draw set 0") == 3
    with pytest.raises(CacheMiss, match="draw set 1"):
        list(TargetStream(batches[:3], None, cache=cache, mode="cache", draw_set=1))
    cache.close()


def flip_payload_bytes(directory: Path, batch: Batch, draw_set: int = 0) -> None:
    """Damage the records of one batch's sequences in the sealed shards."""
    for shard in directory.glob("*.arrow"):
        content = bytearray(shard.read_bytes())
        for sequence in sequences_of(batch):
            payload = codec.encode(expected_targets(sequence, draw_set), version=1)
            position = content.find(payload)
            assert position >= 0
            content[position + len(payload) // 2] ^= 0x40
        shard.write_bytes(content)


def test_damaged_records_are_asked_for_again_and_never_trained_on(tmp_path: Path) -> None:
    batches, teacher = make_batches(5), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches, teacher, cache=cache, draw_set=0))
    cache.close()
    flip_payload_bytes(tmp_path, batches[2])
    teacher.asked.clear()
    cache = open_cache(tmp_path, teacher)
    stream = TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0)
    for got, source in zip(stream, batches, strict=True):
        assert_same(got["targets"], expected(source))
    assert len(teacher.asked) == 2
    list(stream)
    assert len(teacher.asked) == 2  # what was fetched again is in the cache again
    cache.close()


def test_damaged_records_are_left_out_of_the_loss_without_a_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In every draw set; a record that is not there at all still ends the run."""
    batches, teacher = make_batches(5), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[:4], teacher, cache=cache, draw_set=1))
    cache.close()
    flip_payload_bytes(tmp_path, batches[2], draw_set=1)
    cache = open_cache(tmp_path, None)
    corrupt = REGISTRY.get_sample_value("logitstream_cache_corrupt_total")
    stream = TargetStream(batches, None, cache=cache, mode="cache", draw_set=1)
    got: list[Batch] = []
    with pytest.raises(CacheMiss, match="draw set 1"):
        got.extend(stream)
    assert [int(batch["targets"].num_entries) for batch in got] == [12, 12, 0, 12]
    assert not got[2]["loss_mask"].any()
    assert REGISTRY.get_sample_value("logitstream_cache_corrupt_total") == corrupt + 2
    assert (
        sum("is damaged or gone" in record.message and "left out" in record.message for record in caplog.records) == 2
    )
    cache.close()


def test_a_whole_record_that_does_not_decode_is_left_out_without_a_teacher_and_asked_for_again_with_one(
    tmp_path: Path,
) -> None:
    batches, teacher = make_batches(5), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    for sequence in sequences_of(batches[2]):
        key = cache.key(sequence, 0)
        received = ReceivedTargets(payload=b"no targets", fingerprint=cache.fingerprint.digest)
        assert cache.put(key, sequence, 0, received)
    rest = [batch for number, batch in enumerate(batches) if number != 2]
    list(TargetStream(rest, teacher, cache=cache, draw_set=0))
    got = list(TargetStream(batches, None, cache=cache, mode="cache", draw_set=0))
    assert [int(batch["targets"].num_entries) for batch in got] == [12, 12, 0, 12, 12]
    assert not got[2]["loss_mask"].any()
    for batch, source in zip(
        TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0), batches, strict=True
    ):
        assert_same(batch["targets"], expected(source))
    cache.close()


def test_a_cache_of_another_teacher_or_sampler_is_refused(tmp_path: Path) -> None:
    batches, teacher = make_batches(4), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[:2], teacher, cache=cache, draw_set=0))
    teacher.info = replace(INFO, weights_digest="cd" * 32)
    with pytest.raises(FingerprintMismatch, match=f"weights_digest: '{INFO.weights_digest}' against 'cdcdcdcd"):
        list(TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0))
    cache.close()
    with pytest.raises(FingerprintMismatch, match=r"'num_samples': 8.*'num_samples': 9"):
        open_target_cache(tmp_path, None, replace(SPEC, num_samples=9))


def test_targets_of_replaced_weights_are_trained_on_and_not_kept_where_the_client_allows_for_them(
    tmp_path: Path,
) -> None:
    batches, teacher = make_batches(4), HandTeacher()
    teacher.max_teacher_lag = 1
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[:2], teacher, cache=cache, draw_set=0))
    teacher.info = replace(INFO, weights_digest="cd" * 32)
    for _ in range(2):
        stream = TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0)
        for got, source in zip(stream, batches, strict=True):
            assert_same(got["targets"], expected(source))
        assert stream.stats.cached_sequences == 4
    held = [cache.key(sequence, 0) in cache for batch in batches for sequence in sequences_of(batch)]
    assert held == [True] * 4 + [False] * 4
    teacher.info = replace(INFO, weights_digest="ef" * 32, dtype="bfloat16")
    with pytest.raises(FingerprintMismatch, match="dtype"):
        list(TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0))
    cache.close()


def test_targets_of_replaced_weights_are_not_written_to_the_cache_of_the_first(tmp_path: Path) -> None:
    batches, teacher = make_batches(4), HandTeacher()
    cache = open_cache(tmp_path, teacher)
    list(TargetStream(batches[:2], teacher, cache=cache, draw_set=0))
    teacher.info = replace(INFO, weights_digest="cd" * 32)
    list(TargetStream(batches[2:], teacher, cache=cache, draw_set=0))
    held = [cache.key(sequence, 0) in cache for batch in batches for sequence in sequences_of(batch)]
    assert held == [True] * 4 + [False] * 4
    cache.close()


def held_in_memory() -> int:
    """Received targets that anything still refers to."""
    return sum(type(one) is ReceivedTargets for one in gc.get_objects())


def test_targets_are_held_no_longer_than_needed_without_the_garbage_collector(tmp_path: Path) -> None:
    teacher = HandTeacher()
    cache = open_cache(tmp_path, teacher)
    gc.collect()
    before = held_in_memory()
    gc.disable()
    try:
        for cached in (None, cache):
            stream = TargetStream(make_batches(60), teacher, cache=cached, prefetch_batches=3)
            iterator = iter(stream)
            for _ in range(30):
                next(iterator)
            wait_until(lambda: held_in_memory() - before <= 2 * 4)
            stream.close()
    finally:
        gc.enable()
    cache.close()


def test_what_the_stream_does_is_counted() -> None:
    def value(metric: str) -> float:
        return REGISTRY.get_sample_value(f"logitstream_student_{metric}") or 0.0

    names = ("entries_total", "waiting_seconds_total", "decoding_seconds_total")
    before = {name: value(name) for name in names}
    stream = TargetStream(make_batches(10), HandTeacher(), prefetch_batches=4)
    iterator = iter(stream)
    next(iterator)
    wait_until(lambda: value("queue_batches") == 4 == stream.queue_depth)
    list(iterator)
    grown = {name: value(name) - before[name] for name in names}
    stats = stream.stats
    assert (stats.batches, stats.sequences, stats.rows, stats.entries) == (10, 20, 120, 120)
    assert grown["entries_total"] == 120
    assert grown["waiting_seconds_total"] == pytest.approx(stats.waiting_seconds)
    assert grown["decoding_seconds_total"] == pytest.approx(stats.decoding_seconds)
    assert min(grown.values()) > 0
    assert value("queue_batches") == 0


def test_without_room_on_disk_training_goes_on(tmp_path: Path) -> None:
    batches, teacher = make_batches(30), HandTeacher()
    cache = TargetCache(tmp_path, Fingerprint.of(INFO, SPEC), max_bytes=1)
    iterator = iter(TargetStream(batches, teacher, cache=cache, draw_set=0, prefetch_batches=2))
    got = [next(iterator)]
    cache.refresh()  # the first write finds no room
    assert not cache.writable
    got.extend(iterator)
    for batch, source in zip(got, batches, strict=True):
        assert_same(batch["targets"], expected(source))
    cache.close()


def test_a_local_teacher_streams_without_a_network() -> None:
    batches = make_batches(5)
    client = LocalTeacherClient(expected_targets, info=INFO, spec=SPEC)
    for got, source in zip(TargetStream(batches, client), batches, strict=True):
        assert_same(got["targets"], expected(source))
        assert got["targets"].spec == SPEC
    client.close()


def test_a_local_request_is_cancelled_while_it_is_scored() -> None:
    """A run that is told to end does not wait for a teacher in its own process that does not answer."""
    begun, let, answers = threading.Event(), threading.Event(), threading.Event()

    def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
        begun.set()
        let.wait(30)
        answers.set()
        return expected_targets(sequence, draw_set)

    client = LocalTeacherClient(score, info=INFO, spec=SPEC)
    stream = TargetStream(make_batches(4), client, prefetch_batches=1)

    def close() -> None:
        begun.wait(60)
        wait_until(lambda: any("decode" in name for name in stream_threads()))
        stream.close()

    threading.Timer(0.0, close).start()
    with pytest.raises(StopIteration):  # ended by the close, the teacher still silent
        next(iter(stream))
    assert not answers.is_set()
    let.set()
    client.close()


def test_a_stream_whose_client_and_cache_draw_otherwise_is_refused(tmp_path: Path) -> None:
    teacher = HandTeacher()
    cache = open_cache(tmp_path, teacher)
    teacher.spec = replace(SPEC, temperature=2.0)
    with pytest.raises(ValueError, match=r"one way to draw targets, got the client: .*2\.0.*, the cache: .*1\.0"):
        TargetStream([], teacher, cache=cache)
    cache.close()


def test_targets_of_the_stream_say_how_they_were_drawn_from_the_teacher_and_from_the_cache(tmp_path: Path) -> None:
    teacher, batches = HandTeacher(), make_batches(3)
    cache = open_cache(tmp_path, teacher)
    got = list(TargetStream(batches, teacher, cache=cache, draw_set=0))
    got += list(TargetStream(batches, None, cache=cache, mode="cache", draw_set=0))
    assert {str(batch["targets"].spec.canonical()) for batch in got} == {str(SPEC.canonical())}
    cache.close()


def test_a_local_teacher_that_draws_otherwise_than_it_says_is_refused() -> None:
    def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
        return replace(expected_targets(sequence, draw_set), spec=replace(SPEC, temperature=2.0))

    client = LocalTeacherClient(score, info=INFO, spec=SPEC)
    with pytest.raises(ValueError, match="expected targets drawn by"):
        client.submit([TokenSequence(token_ids=np.arange(4, dtype=np.int32))])[0].result()
    client.close()


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefetch_batches >= 1"):
        TargetStream([], HandTeacher(), prefetch_batches=0)
    with pytest.raises(ValueError, match="needs a client"):
        TargetStream([], None)
    with pytest.raises(ValueError, match="needs a cache"):
        TargetStream([], HandTeacher(), mode="cache_then_online")
