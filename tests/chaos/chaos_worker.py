"""A student worker without a model: it checks each batch's targets and writes them down in its audit log.

The log is its checkpoint: a batch counts as trained on once its line is written, and a worker that is started again
goes on after the last whole line.
"""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitstream.client.connections import Connecting, TeacherSettings
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.training.target_cache import open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.types import SparseTargets, TokenSequence
from tests.fake_teacher import SPEC, TOKENIZER_DIGEST, VOCAB_SIZE, expected_targets

NUM_SEQUENCES = 480
NUM_TOKENS = 48
BATCH_SEQUENCES = 8
STEP_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    rank: int
    num_workers: int
    addresses: tuple[str, ...]
    folder: Path
    with_cache: bool

    @property
    def audit(self) -> Path:
        return self.folder / f"audit-{self.rank}.jsonl"

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"


def corpus() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(0, 990, (NUM_SEQUENCES, NUM_TOKENS))


def shard(settings: WorkerSettings, epoch: int) -> list[list[int]]:
    """This worker's batches of an epoch, as indices of sequences."""
    order = np.random.default_rng(epoch).permutation(NUM_SEQUENCES)[settings.rank :: settings.num_workers]
    return [order[start : start + BATCH_SEQUENCES].tolist() for start in range(0, len(order), BATCH_SEQUENCES)]


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a torn last one is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def epochs_done(path: Path) -> int:
    """By the log of a worker that may be writing to it."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return int(json.loads(whole.splitlines()[-1])["epoch"]) if whole else 0


def work(settings: WorkerSettings) -> None:
    """Train until the stop file is there at the end of an epoch."""
    torch.set_num_threads(1)
    done = read_audit(settings.audit)
    epoch, batch = (done[-1]["epoch"], done[-1]["batch"] + 1) if done else (0, 0)
    client = GrpcTeacherClient(
        TeacherSettings(addresses=list(settings.addresses), client_id=f"worker-{settings.rank}", deadline_seconds=60.0),
        SPEC,
        vocab_size=VOCAB_SIZE,
        tokenizer=TOKENIZER_DIGEST,
        connecting=Connecting(
            describe_seconds=2.0, stalled_seconds=2.0, keepalive_seconds=0.5, keepalive_timeout_seconds=0.5
        ),
    )
    cache = open_target_cache(settings.folder / "cache", client, SPEC) if settings.with_cache else None
    audit = os.open(settings.audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        batches = shard(settings, epoch)
        stream = TargetStream(
            [{"input_ids": torch.from_numpy(corpus()[rows])} for rows in batches[batch:]],
            client,
            cache=cache,
            mode="online" if cache is None else "cache_then_online",
            prefetch_batches=4,
        )
        stream.set_epoch(epoch)
        for number, got in enumerate(stream.over(iter(stream.dataloader), first_step=batch), start=batch):
            check(got["targets"], got["input_ids"].numpy(), epoch)
            time.sleep(STEP_SECONDS)
            rss = rss_bytes("self")
            line = {"epoch": epoch, "batch": number, "sequences": batches[number], "rss": rss}
            os.write(audit, (json.dumps(line) + "\n").encode())
        assert stream.stats.refused_sequences == 0
        epoch, batch = epoch + 1, 0
        if settings.stop_file.exists():
            break
    client.close()
    if cache is not None:
        cache.close()


def check(targets: SparseTargets, input_ids: np.ndarray[Any, Any], epoch: int) -> None:
    rows = [expected_targets(TokenSequence(token_ids=ids.astype(np.int32)), epoch) for ids in input_ids]
    want = SparseTargets.concatenate(rows)
    assert np.array_equal(targets.token_ids, want.token_ids)
    assert np.array_equal(targets.row_offsets, want.row_offsets)


def rss_bytes(process: int | str) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize()
