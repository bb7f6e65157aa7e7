"""The teacher's part of benchmarks/gpu.py: draws against float64, their time, and teachers against their forward."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from logitstream import codec
from logitstream.sampling import draw as plain_draw
from logitstream.sampling import draw_key, row_uniforms, unpack
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.transformers_backend import TransformersBackend

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

SAMPLERS = ("systematic", "multinomial", "threshold", "top_k")
NATS = 3.0
"""Random weights' logits are scaled to about this entropy, as a language model's."""


def language_like(bench: Bench, num_rows: int, vocab_size: int) -> Tensor:
    """Return bf16 logits of about two nats: normal ones with sixty far larger."""
    logits = torch.randn(num_rows, vocab_size, device=bench.device) * 2
    places = torch.randint(vocab_size, (num_rows, 60), device=bench.device)
    logits.scatter_add_(1, places, torch.empty(num_rows, 60, device=bench.device).exponential_(0.25) + 4)
    return logits.bfloat16()


class Draws:
    """Rows of one sequence, and how they are drawn on the device and by the specification."""

    def __init__(self, bench: Bench, num_rows: int, vocab_size: int) -> None:
        from logitstream.kernels.draw import RowNames, key_words

        self.logits = language_like(bench, num_rows, vocab_size)
        self.sequence = TokenSequence(token_ids=np.arange(9, dtype=np.int32))
        self.rows = np.arange(num_rows)
        words = torch.from_numpy(key_words([draw_key(TargetSpec(), self.sequence, 0)])).to(bench.device)
        names = torch.arange(num_rows, dtype=torch.int32, device=bench.device)
        self.names = RowNames(words, torch.zeros_like(names), names)

    def on_device(self, spec: TargetSpec) -> Tensor:
        from logitstream.kernels.draw import draw

        packed: Tensor = draw(self.logits, spec, self.names)
        return packed

    def plain(self, spec: TargetSpec, stop: int) -> SparseTargets:
        key = draw_key(TargetSpec(), self.sequence, 0)
        return plain_draw(self.logits[:stop], spec, row_uniforms(spec, key, self.rows[:stop]))


def draws_are_right(bench: Bench) -> None:
    """Compare draws with those of plain torch from the same uniforms; neighbours are what float32 sums may move."""
    for vocab_size in (1000,) if bench.smoke else (151_936, 128_256, 262_144, 50_257):
        num_rows = 8 if bench.smoke else 256
        draws, found = Draws(bench, num_rows, vocab_size), {}
        for sampler in SAMPLERS:
            spec = TargetSpec(sampler=sampler)
            with torch.inference_mode():
                drawn, is_bad = unpack(draws.on_device(spec).cpu().numpy(), spec, vocab_size)
            expected = draws.plain(spec, num_rows)
            same = [
                np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.counts, b.counts)
                for a, b in ((t.slice_rows(r, r + 1) for t in (drawn, expected)) for r in range(num_rows))
            ]
            found[f"{sampler}_rows_that_differ"] = 1 - sum(same) / num_rows
            if sampler == "systematic":
                sums = np.add.reduceat(drawn.counts, drawn.row_offsets[:-1])
                found["counts_sum_to_n"] = bool((sums == spec.num_samples).all()) and not is_bad.any()
        bench.say(f"draws_are_right_{vocab_size}", **found)


def draw_time(bench: Bench) -> None:
    """Time draws by chunk, in µs a row, beside the time to read the logits once and the plain draw's."""
    shapes = [(1000, 8)] if bench.smoke else [(151_936, 128), (151_936, 3456), (128_256, 4096), (262_144, 2048)]
    for vocab_size, num_rows in shapes:
        draws, found = Draws(bench, num_rows, vocab_size), {}
        with torch.inference_mode():
            for sampler in SAMPLERS:
                spec = TargetSpec(sampler=sampler)
                found[sampler] = 1e6 * bench.seconds(partial(draws.on_device, spec)) / num_rows
            few = min(num_rows, 128)
            found["plain"] = 1e6 * bench.seconds(partial(draws.plain, TargetSpec(), few), repeats=3, warm=1) / few
        found["one_read"] = 1e6 * vocab_size * 2 / bench.copy_bytes_per_second
        found["over_one_read"] = found["systematic"] / found["one_read"]
        bench.say(f"draw_us_{vocab_size}_{num_rows}", **found)


def backend_of(bench: Bench, model: Any, **options: Any) -> TransformersBackend:
    tokens = 64 if bench.smoke else 16_384
    vocab_size = model.get_output_embeddings().weight.shape[0]
    info = TeacherInfo(
        model="random",
        weights_digest="00" * 32,
        tokenizer_digest="00" * 32,
        vocab_size=vocab_size,
        dtype="bfloat16",
        max_sequence_tokens=tokens,
    )
    return TransformersBackend(model, info, max_padded_tokens=tokens, **options)


def sequences_of(bench: Bench, vocab_size: int, count: int, *, seed: int) -> list[TokenSequence]:
    rng, length = np.random.default_rng(seed), 24 if bench.smoke else 1024
    return [TokenSequence(token_ids=rng.integers(0, vocab_size, length).astype(np.int32)) for _ in range(count)]


def encoded_bytes(scored: Future[list[Any]]) -> int:
    return sum(len(codec.encode(targets)) for targets in scored.result())


class Teacher:
    """A random model, batches to score with it, and its bare forward: body and head, chunk by chunk."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.model = bench.model(name).eval().requires_grad_(False)
        self.weight = self.model.get_output_embeddings().weight
        batch, self.chunk_rows = (2, 24) if bench.smoke else (16, 3456)
        self.batches = [sequences_of(bench, len(self.weight), batch, seed=seed) for seed in range(4)]
        self.num_tokens = sum(map(len, self.batches[0]))
        self.ids = torch.from_numpy(np.stack([one.token_ids for one in self.batches[0]])).long().to(bench.device)

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """Return the last chunk's logits."""
        hidden = self.model.base_model(input_ids=self.ids, use_cache=False)[0].flatten(0, 1)
        for part in hidden.split(self.chunk_rows):
            logits = part @ self.weight.t()
        return logits

    def spec(self) -> TargetSpec:
        """Return a spec whose temperature gives the random logits about a language model's entropy."""
        std = float(self.forward().float().std())
        return TargetSpec(temperature=max(0.01, std / (2 * (np.log(len(self.weight)) - NATS)) ** 0.5))


def teacher(bench: Bench, name: str) -> None:
    """Compare a teacher that draws and encodes, two batches in flight, with its bare forward; then through gRPC."""
    teacher = Teacher(bench, name)
    num_tokens, spec = teacher.num_tokens, teacher.spec()
    forward = bench.seconds(teacher.forward, repeats=3, warm=1)
    bench.say(f"teacher_{name}_bare", tokens_per_second=num_tokens / forward)
    backend = backend_of(bench, teacher.model)
    requests = [[ScoreRequest(sequence=one, spec=spec) for one in sequences] for sequences in teacher.batches]
    alone = bench.seconds(partial(backend.score, requests[0]), repeats=3, warm=1)
    bench.say(f"teacher_{name}_one_batch", of_bare=forward / alone, share_beyond_forward=alone / forward - 1)
    sizes: list[int] = []
    rounds = 2 if bench.smoke else 8

    def in_flight() -> None:
        with ThreadPoolExecutor(backend.batches_at_once) as scoring, ThreadPoolExecutor(2) as encoding:
            scored = [scoring.submit(backend.score, requests[i % 4]) for i in range(rounds)]
            sizes.extend(encoding.map(encoded_bytes, scored))

    started = time.perf_counter()
    peak = bench.peak_gib(in_flight)
    seconds = (time.perf_counter() - started) / rounds
    found = {"of_bare": forward / seconds, "tokens_per_second": num_tokens / seconds, "peak_gib": peak}
    bench.say(f"teacher_{name}_in_flight_encoded", **found, bytes_per_token=sum(sizes) / (rounds * num_tokens))
    backend.close()
    bench.part(f"teacher_{name}_through_grpc", lambda: through_grpc(bench, name, spec, num_tokens / forward))


def through_grpc(bench: Bench, name: str, spec: TargetSpec, bare: float) -> None:
    """Ask a server process of the same model for targets, and compare with the bare forward's tokens a second."""
    from logitstream.client.teacher_client import GrpcTeacherClient
    from logitstream.tokenizer import UNCHECKED_TOKENIZER

    vocab_size = 1500 if bench.smoke else {"1b": 128_256, "8b": 151_936}[name]
    with serving(bench, name) as address:
        client = GrpcTeacherClient([address], spec, vocab_size=vocab_size, tokenizer=UNCHECKED_TOKENIZER)
        try:
            for count in (4, 4 if bench.smoke else 128):  # the first warms up
                asked = sequences_of(bench, vocab_size, count, seed=9 + count)
                started = time.perf_counter()
                for future in client.submit(asked):
                    future.result(timeout=60)
                rate = sum(map(len, asked)) / (time.perf_counter() - started)
        finally:
            client.close()
    bench.say(f"teacher_{name}_through_grpc", tokens_per_second=rate, of_bare=rate / bare)


@contextmanager
def serving(bench: Bench, name: str) -> Iterator[str]:
    """Start a server process of a random model and yield its address; ImportError if it lacks a package."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "address"
        command = [sys.executable, "-m", "benchmarks.gpu", "--serve", name, str(path), *["--smoke"] * bench.smoke]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not path.exists():
                if server.poll() is not None:
                    last = (server.communicate()[1].strip().splitlines() or ["no message"])[-1]
                    raise (ImportError if "ModuleNotFoundError" in last else RuntimeError)(last)
                time.sleep(0.1)
            yield path.read_text().strip()
        finally:
            server.terminate()
            server.communicate(timeout=60)


def serve(bench: Bench, name: str, address_file: Path) -> None:
    """Serve a random model until the process is told to stop."""
    from teacher_server.server import Served
    from teacher_server.server import serve as serve_backend
    from tests.flat_settings import teacher_config

    config = teacher_config(
        model="random",
        address="127.0.0.1:0",
        address_file=str(address_file),
        max_batch_tokens=16_384,
        max_in_flight_tokens=1 << 20,
        max_queue_tokens=1 << 20,
    )
    serve_backend(config, lambda: Served(backend_of(bench, bench.model(name).eval())))


PARTS: dict[str, Callable[[Bench], None]] = {
    "draws_are_right": draws_are_right,
    "draw_time": draw_time,
    "teacher_1b": lambda bench: teacher(bench, "1b"),
    "teacher_8b": lambda bench: teacher(bench, "8b"),
}
