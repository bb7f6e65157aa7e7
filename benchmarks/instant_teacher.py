"""A teacher server whose backend answers at once, and a bare grpc.aio server that moves the same bytes: what
benchmarks/serving.py measures the server's own cost with. Each is a process of its own, so that a client never shares
its interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc import aio

from logitstream import codec
from logitstream.rpc.channel import server_options
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server import server
from teacher_server.backend import EncodedTargets, ScoreRequest, ScoreResult
from tests.flat_settings import teacher_config

VOCAB_SIZE = 49_152
MAX_MESSAGE_BYTES = 16 << 20
BARE_METHOD = "/bare.Bare/Call"
BARE_HEADER = struct.Struct("<II")  # responses to give, bytes of each


def typical_targets(num_rows: int, *, seed: int = 0) -> SparseTargets:
    """Systematic draws (N = 50) from Zipf-like rows of as many entropies as English text has."""
    from logitstream.sampling import sample

    rng = np.random.default_rng(seed)
    import torch

    rank = np.log(np.arange(1, VOCAB_SIZE + 1))
    exponents = rng.uniform(0.8, 3.0, num_rows)
    logits = torch.from_numpy(np.stack([-s * rank[rng.permutation(VOCAB_SIZE)] for s in exponents]).astype(np.float32))
    sequence = TokenSequence(token_ids=rng.integers(0, VOCAB_SIZE, num_rows).astype(np.int32))
    return sample(logits, TargetSpec(num_samples=50), sequence)


class InstantBackend:
    """Rows of the same prepared targets for every sequence; `seconds_per_token` makes it a slow one."""

    def __init__(self, prepared: SparseTargets, *, seconds_per_token: float, encoded_before: bool) -> None:
        """encoded_before: targets of each length are encoded once, and what is left is the server's own work."""
        self._prepared = prepared
        self._seconds_per_token = seconds_per_token
        self._encoded_before = encoded_before
        self._by_length: dict[int, SparseTargets | EncodedTargets] = {}

    def describe(self) -> TeacherInfo:
        return TeacherInfo(
            model="instant",
            weights_digest="00" * 32,
            tokenizer_digest="00" * 32,
            vocab_size=VOCAB_SIZE,
            dtype="float32",
            max_sequence_tokens=8192,
            backend="instant",
        )

    def score(self, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        if self._seconds_per_token:
            time.sleep(self._seconds_per_token * sum(len(request.sequence) for request in batch))
        return [self._of_length(len(request.sequence)) for request in batch]

    def _of_length(self, length: int) -> SparseTargets | EncodedTargets:
        if length not in self._by_length:
            rows = self._prepared.num_rows
            repeated = SparseTargets.concatenate([self._prepared] * -(-length // rows))
            targets = repeated.slice_rows(0, length)
            encoded = EncodedTargets(codec.encode(targets), length, targets.num_entries)
            self._by_length[length] = encoded if self._encoded_before else targets
        return self._by_length[length]

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to free."""


class BareHandler(grpc.GenericRpcHandler):
    """Responses of given number and size to requests of any: the least that a grpc.aio server can do for a call."""

    def service(self, details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._answer) if details.method == BARE_METHOD else None

    async def _answer(self, request: bytes, context: aio.ServicerContext) -> None:
        num_responses, num_bytes = BARE_HEADER.unpack_from(request)
        payload = bytes(num_bytes)
        for _ in range(num_responses):
            await context.write(payload)


async def serve_bare(address_file: Path) -> None:
    bare = aio.server(options=server_options(MAX_MESSAGE_BYTES))
    bare.add_generic_rpc_handlers((BareHandler(),))
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    partial = address_file.with_suffix(f".{os.getpid()}")
    partial.write_text(f"127.0.0.1:{port}")
    partial.rename(address_file)
    await bare.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address_file", type=Path)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--encoded-before", action="store_true")
    parser.add_argument("--seconds-per-token", type=float, default=0.0)
    parser.add_argument("--max-batch-tokens", type=int, default=4096)
    args = parser.parse_args()
    if args.bare:
        asyncio.run(serve_bare(args.address_file))
        return
    logging.basicConfig(level="WARNING")
    backend = InstantBackend(
        typical_targets(512), seconds_per_token=args.seconds_per_token, encoded_before=args.encoded_before
    )
    config = teacher_config(
        model="instant",
        address="127.0.0.1:0",
        address_file=str(args.address_file),
        max_batch_tokens=args.max_batch_tokens,
        max_message_bytes=MAX_MESSAGE_BYTES,
        max_in_flight_tokens=1 << 23,
        max_queue_tokens=1 << 23,
        drain_seconds=2.0,
    )
    server.serve(config, lambda: server.Served(backend))


if __name__ == "__main__":
    main()
