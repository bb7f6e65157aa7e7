"""Processes of one student that meet other replicas first, or find other sequences in a cache, take the main one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitstream.cache import CacheWriter
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.data.corpus import CacheDataset
from logitstream.errors import CacheError, FingerprintMismatch, LogitstreamError
from logitstream.training.distributed import agree_on_teacher, expected_teacher, open_agreed_cache
from logitstream.types import TargetSpec
from tests.fake_teacher import SPEC, TOKENIZER_DIGEST, VOCAB_SIZE, fake_teacher, weights_digest
from tests.integration.crashing_writer import FINGERPRINT, record

PROCESS = """
import sys
from pathlib import Path
import torch.distributed as dist
from logitstream.errors import LogitstreamError
from logitstream.training.distributed import agree_on_teacher
from logitstream.client.connections import TeacherSettings
from logitstream.client.teacher_client import GrpcTeacherClient
from tests.fake_teacher import SPEC, TOKENIZER_DIGEST, VOCAB_SIZE

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
for turn, pair in enumerate((sys.argv[2:4], sys.argv[4:6], sys.argv[6:8])):
    settings = TeacherSettings(addresses=[pair[rank]], connect_timeout_seconds=1.0 if turn == 2 else 60.0)
    client = GrpcTeacherClient(settings, SPEC, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER_DIGEST)
    try:
        agree_on_teacher(client, SPEC, folder)
        outcome = client.info.weights_digest
    except LogitstreamError as error:
        outcome = f"{type(error).__name__} {error}"
    print(f"turn {turn} {outcome}\\n", end="", flush=True)
    client.close()
    dist.barrier()
dist.destroy_process_group()
"""


def printed_by_two(script: str, folder: Path, *arguments: str) -> list[str]:
    """The lines that two processes of torchrun print, which must end well."""
    file = folder / "process.py"
    file.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*launch, str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()


def test_all_processes_train_from_one_teacher_or_end_with_the_same_error(tmp_path: Path) -> None:
    nobody = "127.0.0.1:9"
    with fake_teacher() as (_, a), fake_teacher() as (_, twin), fake_teacher("--weights", "b") as (_, b):
        printed = printed_by_two(PROCESS, tmp_path, str(tmp_path), a, twin, a, b, a, nobody)
    lines = sorted(line for line in printed if line.startswith("turn"))
    assert lines[::2] == lines[1::2]
    same, unlike, missing = lines[::2]
    digest_a, digest_b = weights_digest("a", 0), weights_digest("b", 0)
    assert same == f"turn 0 {digest_a}"
    assert "FingerprintMismatch processes 0 and 1 of this run have found teachers that differ" in unlike
    assert f"weights_digest: '{digest_a}' against '{digest_b}'" in unlike
    assert f"TeacherUnavailable no teacher came up within 1 s at {nobody}" in missing
    assert digest_a in (tmp_path / "teacher.json").read_text()


HELDOUT = """
import json
import torch
import torch.distributed as dist
from logitstream.loss import Diagnostics
from logitstream.training.first_choices import SPEC
from logitstream.training.stats import heldout_means

dist.init_process_group("gloo")
seen = {name: torch.tensor(4.0, dtype=torch.float64) for name in Diagnostics._fields}
nothing = {name: torch.zeros((), dtype=torch.float64) for name in ("kept_rows", "agreements", "kl", "kept_mass")}
batches = [(Diagnostics(**seen | nothing), None)] if dist.get_rank() == 0 else [(Diagnostics(**seen), SPEC)]
print(json.dumps(heldout_means(batches)) + "\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_held_out_figures_do_not_depend_on_which_process_has_the_targets(tmp_path: Path) -> None:
    """The main process's batches may be those whose first choices were not asked for."""
    expected = {"loss": 1.0, "teacher_top1_agreement": 1.0}
    assert [json.loads(line) for line in printed_by_two(HELDOUT, tmp_path)] == [expected] * 2


def test_a_resumed_run_refuses_another_teacher_but_may_draw_otherwise(tmp_path: Path) -> None:
    with fake_teacher() as (_, a), fake_teacher("--weights", "b") as (_, b):
        client = GrpcTeacherClient([a], SPEC, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER_DIGEST)
        agree_on_teacher(client, SPEC, tmp_path)
        client.close()
        spec = TargetSpec(num_samples=9, codec_version=1)
        assert expected_teacher(None, spec) is None
        expected = expected_teacher(tmp_path / "checkpoint-1", spec)
        client = GrpcTeacherClient([a], spec, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER_DIGEST, fingerprint=expected)
        assert client.info.weights_digest == weights_digest("a", 0)
        client.close()
        client = GrpcTeacherClient([b], spec, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER_DIGEST, fingerprint=expected)
        with pytest.raises(FingerprintMismatch, match=weights_digest("b", 0)):
            agree_on_teacher(client, spec, tmp_path)
        client.close()


CACHE_PROCESS = """
import sys, threading
from pathlib import Path
import torch.distributed as dist
from logitstream.cache import CacheWriter
from logitstream.training.distributed import open_agreed_cache
from logitstream.data.corpus import CacheDataset
from tests.integration.crashing_writer import FINGERPRINT, record

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
writer = CacheWriter(folder / "cache", FINGERPRINT, writer_id=str(rank))
stop = threading.Event()

def write():
    number = 0
    while not stop.wait(0.003):
        writer.put(*record(rank, number)[:5])
        writer.flush()
        number += 1

writer.put(*record(rank, 1_000_000)[:5])
writer.flush()
dist.barrier()
thread = threading.Thread(target=write)
thread.start()
for turn in range(10):
    cache = open_agreed_cache(str(folder / "cache"), folder / "run")
    dataset = CacheDataset(cache)
    seen = hash(b"".join(cache.key(i) for i in range(len(cache)))), len(dataset)
    print(f"turn {turn} {seen}\\n", end="", flush=True)
    dist.barrier()
stop.set()
thread.join()
writer.close()
dist.destroy_process_group()
"""


def test_all_processes_train_on_the_sequences_that_the_main_one_found_in_a_cache_that_grows(tmp_path: Path) -> None:
    printed = printed_by_two(CACHE_PROCESS, tmp_path, str(tmp_path))
    lines = sorted(line for line in printed if line.startswith("turn"))
    assert len(lines) == 20
    assert lines[::2] == lines[1::2]
    assert len(set(lines)) == 10  # it grew meanwhile


def test_a_resumed_run_goes_on_with_its_sequences_after_the_cache_grew_and_is_refused_after_it_shrank(
    tmp_path: Path,
) -> None:
    def write(start: int, stop: int) -> None:
        with CacheWriter(tmp_path / "cache", FINGERPRINT) as writer:
            for number in range(start, stop):
                writer.put(*record(0, number)[:5])

    run = tmp_path / "run"

    def sequences(*, resumes: bool) -> list[list[int]]:
        with open_agreed_cache(str(tmp_path / "cache"), run, run / "checkpoint-1" if resumes else None) as cache:
            dataset = CacheDataset(cache)
            return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]

    write(0, 10)
    first = sequences(resumes=False)
    write(10, 13)
    assert sequences(resumes=True) == sequences(resumes=True) == first
    assert len(sequences(resumes=False)) == 13  # a new run takes all of them
    (shard, *_) = sorted((tmp_path / "cache").glob("*.arrow"))
    shard.unlink()
    with pytest.raises(CacheError, match="does not hold the sequences any more"):
        sequences(resumes=True)


def test_a_note_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    assert expected_teacher(None, SPEC) is None
    assert expected_teacher(checkpoint, SPEC) is None
    (tmp_path / "teacher.json").write_bytes(b"{")
    with pytest.raises(LogitstreamError, match=r"teacher\.json cannot be read .*: delete it"):
        expected_teacher(checkpoint, SPEC)
