"""The main job on one machine: a teacher server, two student workers, an epoch online, one from the cache, a report."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console

from demo.assets import MODEL_LICENCE, MODEL_NAME, TEXT_LICENCE, TEXT_NAME, teacher_folder, text_file
from demo.processes import ChildFailed
from demo.training import NUM_WORKERS, read_progress, train

SEQUENCE_TOKENS = 128
SEQUENCES_PER_STEP = 8
STUDENT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
console = Console()


def main() -> None:
    options = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    try:
        run(options)
    except KeyboardInterrupt:
        console.print("\nstopped; teacher and students have ended")
        sys.exit(130)
    except ChildFailed as error:
        console.print(f"[red]the demo failed:[/red] {error}", highlight=False)
        sys.exit(1)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--backend", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--seed", type=int, default=0, help="of the student's start, the data's order and the draws")
    parser.add_argument("--sequences", type=int, default=480, help=f"to train on, of {SEQUENCE_TOKENS} tokens")
    parser.add_argument("--heldout-sequences", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    if options.sequences < SEQUENCES_PER_STEP:
        parser.error(f"--sequences must be at least {SEQUENCES_PER_STEP}, one step's, got {options.sequences}")
    return options


def run(options: argparse.Namespace) -> None:
    """Assets, processes, evaluation, report; everything that was started has ended when this returns or raises."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started = time.monotonic()
    teacher, text = teacher_folder(), text_file()
    size = text.stat().st_size / 1e6
    console.print(f"teacher {MODEL_NAME} ({MODEL_LICENCE}); text: {TEXT_NAME} ({TEXT_LICENCE}, {size:.1f} MB)")
    make_room(options.output)
    configs = write_configs(options, teacher, text)
    figures_of_teacher = train(
        configs, options.output, num_steps=options.sequences // SEQUENCES_PER_STEP, console=console
    )
    console.print("evaluating on held-out text …")
    report = json.loads((options.output / "student" / "report.json").read_text())
    report |= figures_of_teacher | evaluate_heldout(options, teacher, text)
    report |= {"seed": options.seed, "backend": options.backend, "demo_seconds": round(time.monotonic() - started, 1)}
    write_report(report, options.output)


def make_room(output: Path) -> None:
    """An empty folder; what stands there is removed where an earlier demo made it, and refused otherwise."""
    if output.exists() and any(output.iterdir()) and not (output / "student.yaml").exists():
        raise ChildFailed(f"{output} is not empty and no earlier demo's: choose another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


def write_configs(options: argparse.Namespace, teacher: Path, text: Path) -> dict[str, Path]:
    """The two commands' YAML files, as a user would write them."""
    from transformers import AutoConfig

    output = options.output
    vocab_size = AutoConfig.from_pretrained(teacher).vocab_size
    student_config = output / "student-config"
    student_config.mkdir()
    (student_config / "config.json").write_text(json.dumps(STUDENT | {"vocab_size": vocab_size}, indent=2))
    address = f"127.0.0.1:{free_port()}"
    settings: dict[str, dict[str, Any]] = {
        "teacher": {
            "model": {"path": str(teacher), "dtype": "bfloat16" if has_fast_bfloat16() else "float32"},
            "backend": options.backend,
            "server": {"address": address},
            "limits": {"max_batch_tokens": 2048},
            "id_model": {"text": str(text)},
            "metrics": {"port": free_port()},
        },
        "student": {
            "model": {"config": str(student_config / "config.json"), "tokenizer": str(teacher)},
            "data": {
                "text": [str(text)],
                "sequence_tokens": SEQUENCE_TOKENS,
                "max_sequences": options.sequences,
                "heldout_sequences": options.heldout_sequences,
            },
            "teacher": {"addresses": [address]},
            "targets": {"source": "cache_then_online", "draws": "reuse", "seed": options.seed},
            "cache": {"path": str(output / "cache")},
            "loss": {"overhead_every": 5},
            "training": {
                "output_dir": str(output / "student"),
                "per_device_train_batch_size": SEQUENCES_PER_STEP // NUM_WORKERS,
                "num_train_epochs": 2,
                "learning_rate": 3.0e-3,
                "warmup_steps": 5,
                "lr_scheduler_type": "cosine",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": options.seed,
            },
        },
    }
    paths = {name: output / f"{name}.yaml" for name in settings}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump(settings[name], sort_keys=False))
    return paths


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere float32 is the faster one."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def evaluate_heldout(options: argparse.Namespace, teacher: Path, text: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from demo.evaluate import evaluate
    from logitstream.data.corpus import load_sequences
    from logitstream.training.split import split_text

    sequences = load_sequences([str(text)], AutoTokenizer.from_pretrained(teacher), sequence_tokens=SEQUENCE_TOKENS)
    _, heldout = split_text(sequences, heldout_sequences=options.heldout_sequences)
    return evaluate(options.output / "student", teacher, heldout["input_ids"])


def write_report(report: dict[str, Any], output: Path) -> None:
    from demo.report import plot_loss, table, write_html

    (output / "report.json").write_text(json.dumps(report, indent=2))
    plot_loss(read_progress(output / "student"), report, output / "loss.png")
    write_html(report, output / "loss.png", output / "report.html")
    console.print(table(report))
    console.print(
        f"report: {output}/report.html · student: {output}/student · logs: {output}/teacher.log, {output}/student.log"
    )


if __name__ == "__main__":
    main()
