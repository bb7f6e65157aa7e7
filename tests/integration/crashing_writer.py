"""A process that forks writers which append records until they are killed; started by test_cache_crash.py.

Reads lines `DIRECTORY SEED ACKS` and answers with the forked writer's pid; the writer appends to the file ACKS the
number of records after each flush. Without torch or pytest in it, a fork takes milliseconds.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import tempfile

import numpy as np

from logitstream.cache import CacheWriter, Record
from logitstream.types import Fingerprint, TargetSpec, TokenSequence, request_key

FINGERPRINT = Fingerprint(
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=1000,
    dtype="float32",
    id_model_digest="",
    spec=TargetSpec().canonical(),
)
DIGEST = FINGERPRINT.digest


def record(seed: int, number: int) -> Record:
    """The number-th record of a writer."""
    rng = np.random.default_rng((seed, number))
    token_ids = rng.integers(0, 1000, 20, dtype=np.int32)
    key = request_key(DIGEST, TokenSequence(token_ids=token_ids), 0)
    return Record(key, token_ids, None, rng.bytes(int(rng.integers(1, 3000))), 0)


def write_until_killed(directory: str, seed: int, acks: int) -> None:
    writer = CacheWriter(directory, FINGERPRINT, writer_id=f"w{seed}", shard_bytes=40_000, batch_bytes=5_000)
    number = 0
    while True:
        for _ in range(1 + number % 5):
            writer.put(*record(seed, number)[:5])
            number += 1
        if not writer.flush():
            raise RuntimeError(writer.disabled)
        os.write(acks, struct.pack("<q", number))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, CacheWriter(folder, FINGERPRINT) as writer:
        writer.put(*record(0, 0)[:5])  # what Arrow imports at its first use
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        directory, seed, ack_file = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                write_until_killed(directory, int(seed), os.open(ack_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
            except Exception as error:  # nobody is left to raise to
                print(f"writer {seed}: {error!r}", file=sys.stderr)
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
