"""The student's whole step (forward, backward, AdamW) under different losses, and the memory of head and loss alone.

    python -m benchmarks.student_step [--rounds 3] [--steps 4] [--parts …]

Needs `pip install --no-deps liger-kernel==0.8.5` beside the lock. Writes benchmarks/results/student_step.json and
docs/figures/student_step.png. Every case runs in a process of its own, forked from one that has imported everything and
computed nothing, one after the other, round by round; a ratio is the median over rounds of medians over steps, each
over the fused cross-entropy's of the same round. `paired` steps the three losses that matter most in turn within one
process, on one thread, for ratios that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import machine
from logitstream import codec
from logitstream.cache import CacheReader, CacheWriter
from logitstream.fused_loss import fused_linear_sparse_kl
from logitstream.sampling import sample
from logitstream.tokenizer import UNCHECKED_TOKENIZER
from logitstream.training.head_loss import HeadLoss, install_fused_loss
from logitstream.types import Fingerprint, SparseTargets, TargetSpec, TokenSequence

RESULTS = Path("benchmarks/results/student_step.json")
FIGURE = Path("docs/figures/student_step.png")
SIZES = {
    "30M": {"vocab_size": 49_152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    "60M": {"vocab_size": 151_936, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 9},
}
TOKENS = (256, 1024)
HEAD_SHAPES = ((49_152, 576, 2048), (49_152, 384, 1024), (151_936, 320, 1024))
"""V, H, tokens of the memory measurement; the first is issue 5's prototype."""
SPEC = TargetSpec(num_samples=50)
NUM_BATCHES = 2
WARM_UP_STEPS = 2
MIB = 1 << 20


class Problem:
    """A student, its optimizer and a few batches with dense and sparse targets of one synthetic teacher."""

    def __init__(self, size: str, num_tokens: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)
        self.vocab_size = SIZES[size]["vocab_size"]
        heads = SIZES[size]["hidden_size"] // 64
        size_settings: dict[str, Any] = dict(SIZES[size])
        config = LlamaConfig(
            **size_settings, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True
        )
        self.model: Any = AutoModelForCausalLM.from_config(config)
        assert install_fused_loss(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, self.vocab_size, num_tokens).astype(np.int32) for _ in range(NUM_BATCHES)]
        self.sequences = [TokenSequence(token_ids=token_ids) for token_ids in ids]
        self.inputs = [torch.from_numpy(token_ids.astype(np.int64))[None] for token_ids in ids]
        self.labels = [torch.from_numpy(np.append(token_ids[1:], token_ids[0]).astype(np.int64)) for token_ids in ids]

    def teacher_logits(self, batch: int) -> torch.Tensor:
        """Zipf-like next-token distributions, [T, V]."""
        generator = torch.Generator().manual_seed(batch)
        num_tokens = len(self.sequences[batch])
        ranks = -1.6 * torch.log(torch.arange(1, self.vocab_size + 1, dtype=torch.float32))
        noise = torch.randn(num_tokens, self.vocab_size, generator=generator)
        shift = torch.randint(self.vocab_size, (num_tokens, 1), generator=generator)
        return (ranks + 0.5 * noise).gather(1, (torch.arange(self.vocab_size) + shift) % self.vocab_size)

    def sparse(self, batch: int) -> SparseTargets:
        return sample(self.teacher_logits(batch), SPEC, self.sequences[batch])


def fused(problem: Problem, batch: int, targets: SparseTargets | None) -> torch.Tensor:
    arguments: dict[str, Any] = {"targets": targets}
    if targets is None:
        arguments |= {"labels": problem.labels[batch], "ce_weight": 1.0}
    loss: torch.Tensor = problem.model(input_ids=problem.inputs[batch], head_loss=HeadLoss(**arguments)).loss
    return loss


def logits_of(problem: Problem, batch: int) -> torch.Tensor:
    logits: torch.Tensor = problem.model(input_ids=problem.inputs[batch], use_cache=False).logits
    return logits[0]


Losses = Callable[[Problem], Iterator[torch.Tensor]]


def torch_cross_entropy(problem: Problem) -> Iterator[torch.Tensor]:
    for batch in itertools.cycle(range(NUM_BATCHES)):
        yield torch.nn.functional.cross_entropy(logits_of(problem, batch), problem.labels[batch])


def fused_cross_entropy(problem: Problem) -> Iterator[torch.Tensor]:
    for batch in itertools.cycle(range(NUM_BATCHES)):
        yield fused(problem, batch, None)


def dense_kl(problem: Problem) -> Iterator[torch.Tensor]:
    probs = torch.softmax(problem.teacher_logits(0), dim=1)
    while True:
        logprobs = torch.log_softmax(logits_of(problem, 0), dim=1)
        yield torch.nn.functional.kl_div(logprobs, probs, reduction="batchmean")


def liger_forward_kl(problem: Problem) -> Iterator[torch.Tensor]:
    """Liger's chunked fused linear JSD at β = 0, uncompiled: it projects the teacher's hidden states too."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    weight = problem.model.lm_head.weight
    teacher_hidden = torch.randn(len(problem.sequences[0]), weight.shape[1])
    teacher_weight = torch.randn_like(weight) * 0.1
    for batch in itertools.cycle(range(NUM_BATCHES)):
        hidden = problem.model.model(input_ids=problem.inputs[batch], use_cache=False)[0][0]
        yield loss(hidden, weight, teacher_hidden, teacher_weight, problem.labels[batch])


def ours_from_memory(problem: Problem) -> Iterator[torch.Tensor]:
    targets = [problem.sparse(batch) for batch in range(NUM_BATCHES)]
    for batch in itertools.cycle(range(NUM_BATCHES)):
        yield fused(problem, batch, targets[batch])


def ours_from_the_cache(problem: Problem) -> Iterator[torch.Tensor]:
    """Each step looks its sequence up on disk and decodes it in the step's own thread."""
    fingerprint = Fingerprint(
        weights_digest="ab" * 32,
        tokenizer_digest="cd" * 32,
        vocab_size=problem.vocab_size,
        dtype="float32",
        id_model_digest="",
        spec=SPEC.canonical(),
    )
    with tempfile.TemporaryDirectory() as folder:
        with CacheWriter(folder, fingerprint) as writer:
            for batch, sequence in enumerate(problem.sequences):
                writer.put(bytes([batch]) * 16, sequence.token_ids, None, codec.encode(problem.sparse(batch)), 0)
        reader = CacheReader(folder, fingerprint)
        for batch in itertools.cycle(range(NUM_BATCHES)):
            payload = reader.get(bytes([batch]) * 16)
            assert payload is not None
            yield fused(problem, batch, codec.decode(payload))


def ours_over_grpc(problem: Problem) -> Iterator[torch.Tensor]:
    """From a server that answers at once, a process on the same cores, through the prefetching stream."""
    from logitstream.client.teacher_client import GrpcTeacherClient
    from logitstream.training.target_stream import TargetStream

    with tempfile.TemporaryDirectory() as folder:
        address_file = Path(folder) / "address"
        command = [sys.executable, "-m", "tests.fake_backend_server", "--address-file", str(address_file)]
        command += ["--vocab-size", str(problem.vocab_size), "--entries-per-row", "12"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not address_file.exists() or not address_file.read_text().strip():
                time.sleep(0.1)
            client = GrpcTeacherClient(
                [address_file.read_text().strip()], SPEC, vocab_size=problem.vocab_size, tokenizer=UNCHECKED_TOKENIZER
            )
            batches = ({"input_ids": problem.inputs[batch]} for batch in itertools.cycle(range(NUM_BATCHES)))
            stream = TargetStream(batches, client, prefetch_batches=4)
            try:
                for step, batch in enumerate(stream):
                    yield fused(problem, step % NUM_BATCHES, batch["targets"])
            finally:
                stream.close()
                client.close()
        finally:
            server.terminate()
            server.wait()


CASES: dict[str, Losses] = {
    case.__name__: case
    for case in (
        fused_cross_entropy,
        torch_cross_entropy,
        ours_from_memory,
        ours_from_the_cache,
        ours_over_grpc,
        dense_kl,
        liger_forward_kl,
    )
}


def step_seconds(problem: Problem, losses: Iterator[torch.Tensor]) -> float:
    started = time.perf_counter()
    next(losses).backward()
    problem.optimizer.step()
    problem.optimizer.zero_grad()
    return time.perf_counter() - started


def run_case(size: str, num_tokens: int, case: str, steps: int) -> dict[str, float]:
    problem = Problem(size, num_tokens)
    losses = CASES[case](problem)
    for _ in range(WARM_UP_STEPS):
        step_seconds(problem, losses)
    idle = reset_peak()
    seconds = [step_seconds(problem, losses) for _ in range(steps)]
    losses.close()  # type: ignore[attr-defined]
    return {"ms": 1e3 * statistics.median(seconds), "peak_mib_over_idle": (peak() - idle) / MIB}


def run_paired(size: str, num_tokens: int, steps: int) -> dict[str, Any]:
    """Ratios of steps taken in turn, ours over both cross-entropies, on one thread: by the clock and in CPU time."""
    problem = Problem(size, num_tokens)
    torch.set_num_threads(1)
    names = ("ours_from_memory", "fused_cross_entropy", "torch_cross_entropy")
    losses = {name: CASES[name](problem) for name in names}
    rounds = []
    for _ in range(steps + WARM_UP_STEPS):
        times = {}
        for name in names:
            busy = time.thread_time()
            wall = step_seconds(problem, losses[name])
            times[name] = {"wall": wall, "cpu": time.thread_time() - busy}
        rounds.append(times)
    made: dict[str, Any] = {}
    for clock, other in itertools.product(("wall", "cpu"), names[1:]):
        values = [times[names[0]][clock] / times[other][clock] for times in rounds[WARM_UP_STEPS:]]
        low, middle, high = statistics.quantiles(values, n=4)
        made[f"{clock}_over_{other}"] = {"median": middle, "quartiles": [low, high]}
    return made


def run_head_memory(vocab_size: int, hidden_size: int, num_tokens: int, case: str) -> float:
    """MiB over the idle process at the peak of head and loss, the gradients of head and hidden states among them."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,))
    token_ids = torch.sort(torch.rand(num_tokens, vocab_size // 64).argsort(1)[:, :12] * 64, dim=1).values
    targets = SparseTargets(
        vocab_size=vocab_size,
        units=12,
        row_offsets=np.arange(num_tokens + 1, dtype=np.int64) * 12,
        token_ids=token_ids.reshape(-1).numpy().astype(np.int32),
        counts=np.ones(num_tokens * 12, np.int32),
    )
    fused_linear_sparse_kl(hidden[:4], weight, targets.slice_rows(0, 4)).loss.backward()  # threads, libraries
    hidden.grad = weight.grad = None
    idle = reset_peak()
    if case == "ours":
        fused_linear_sparse_kl(hidden, weight, targets).loss.backward()
    elif case == "fused_cross_entropy":
        fused_linear_sparse_kl(hidden, weight, None, labels=labels, ce_weight=1.0).loss.backward()
    else:
        torch.nn.functional.cross_entropy(hidden @ weight.t(), labels).backward()
    return (peak() - idle) / MIB


def reset_peak() -> int:
    """The resident bytes now, from which the peak starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, or its error as text, from a forked process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        try:
            theirs.send(function(*arguments))
        except Exception as error:  # a case that cannot run here is part of the result
            theirs.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def head_memory() -> dict[str, Any]:
    """MiB by shape and case; `gradient_apart` leaves out the head's gradient, which exists whatever the loss."""
    memory = {}
    for vocab_size, hidden_size, num_tokens in HEAD_SHAPES:
        row = {
            case: in_a_process(run_head_memory, vocab_size, hidden_size, num_tokens, case)
            for case in ("torch", "fused_cross_entropy", "ours")
        }
        gradient = 4 * vocab_size * hidden_size / MIB
        row["ours_over_torch"] = row["ours"] / row["torch"]
        row["ours_over_torch_gradient_apart"] = (row["ours"] - gradient) / (row["torch"] - gradient)
        memory[f"V={vocab_size} H={hidden_size} T={num_tokens}"] = row
    return memory


def paired(steps: int) -> dict[str, Any]:
    return {name(*case): in_a_process(run_paired, *case, steps) for case in itertools.product(SIZES, TOKENS)}


def table(rounds: int, steps: int) -> dict[str, Any]:
    made = {}
    for size, num_tokens in itertools.product(SIZES, TOKENS):
        runs = [{case: in_a_process(run_case, size, num_tokens, case, steps) for case in CASES} for _ in range(rounds)]
        made[name(size, num_tokens)] = {case: summary([run[case] for run in runs], runs) for case in CASES}
        print(json.dumps(made[name(size, num_tokens)]), flush=True)
    return made


def name(size: str, num_tokens: int) -> str:
    return f"{size} V={SIZES[size]['vocab_size']} T={num_tokens}"


def summary(results: list[Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    if any(isinstance(result, str) for result in results):
        return {"failed": next(result for result in results if isinstance(result, str))}
    ratios = [result["ms"] / run["fused_cross_entropy"]["ms"] for result, run in zip(results, runs, strict=True)]
    return {
        "ms": statistics.median(result["ms"] for result in results),
        "over_fused_cross_entropy": statistics.median(ratios),
        "peak_mib_over_idle": statistics.median(result["peak_mib_over_idle"] for result in results),
    }


def draw(table: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    width = 0.8 / len(CASES)
    for axis, key, label in (
        (axes[0], "over_fused_cross_entropy", "step time over fused cross-entropy"),
        (axes[1], "peak_mib_over_idle", "peak memory of a step over idle [MiB]"),
    ):
        for index, case in enumerate(CASES):
            values = [row[case].get(key, 0.0) for row in table.values()]
            axis.bar(np.arange(len(table)) + index * width, values, width, label=case.replace("_", " "))
        axis.set_xticks(
            np.arange(len(table)) + 0.4 - width / 2, [name.replace(" ", "\n") for name in table], fontsize=8
        )
        axis.set_ylabel(label)
    axes[0].axhline(1.0, color="black", lw=0.8)
    axes[1].legend(frameon=False, fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of `own_processes`")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a case in a round; twice as many pairs")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.parts:
        before = machine("torch", "transformers", "liger_kernel")
        figures = PARTS[part](options)
        settings = {"rounds": options.rounds, "steps": options.steps, "sizes": SIZES, "dtype": "float32"}
        load = {"load_after": round(os.getloadavg()[0], 1)}
        results[part] = {"figures": figures, "machine": before | load, "settings": settings}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    if "own_processes" in results:
        draw(results["own_processes"]["figures"])


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "head_and_loss_peak_mib": lambda options: head_memory(),
    "paired": lambda options: paired(2 * options.steps),
    "own_processes": lambda options: table(options.rounds, options.steps),
}


if __name__ == "__main__":
    main()
