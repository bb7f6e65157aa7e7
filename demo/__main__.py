"""The main job on one machine: a teacher server, two student workers, an epoch online, one from the cache, a report."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from demo.assets import MODEL_LICENCE, MODEL_NAME, TEXT_LICENCE, TEXT_NAME, teacher_folder, text_file
from demo.processes import ChildFailed, child, stop, wait_for

NUM_WORKERS = 2
SEQUENCE_TOKENS = 128
SEQUENCES_PER_STEP = 8
START_SECONDS = 600.0
EPOCH_SECONDS = 1800.0
LINE_SECONDS = 10.0
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--backend", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--seed", type=int, default=0, help="of the student's start, the data's order and the draws")
    parser.add_argument("--sequences", type=int, default=480, help=f"to train on, of {SEQUENCE_TOKENS} tokens")
    parser.add_argument("--heldout-sequences", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    if options.sequences < SEQUENCES_PER_STEP:
        parser.error(f"--sequences must be at least {SEQUENCES_PER_STEP}, one step's, got {options.sequences}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\nstopped; teacher and students have ended")
        sys.exit(130)
    except ChildFailed as error:
        print(f"the demo failed: {error}")
        sys.exit(1)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> None:
    """Train, evaluate, report; everything that was started has ended when this returns or raises."""
    from transformers.utils import logging

    from demo.report import evaluate_heldout, write_report

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started = time.monotonic()
    teacher, text, output = teacher_folder(), text_file(), options.output
    size = text.stat().st_size / 1e6
    print(f"teacher {MODEL_NAME} ({MODEL_LICENCE}); text: {TEXT_NAME} ({TEXT_LICENCE}, {size:.1f} MB)")
    if output.exists() and any(output.iterdir()) and not (output / "student.yaml").exists():
        raise ChildFailed(f"{output} is not empty and no earlier demo's: choose another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    metrics_port = write_configs(options, teacher, text)
    report = train(output, metrics_port, num_steps=options.sequences // SEQUENCES_PER_STEP)
    print("evaluating on held-out text …")
    report |= json.loads((output / "student" / "report.json").read_text())
    sizes = {"sequence_tokens": SEQUENCE_TOKENS, "heldout_sequences": options.heldout_sequences}
    report |= evaluate_heldout(output / "student", teacher, text, **sizes)
    report |= {"seed": options.seed, "backend": options.backend, "demo_seconds": round(time.monotonic() - started, 1)}
    write_report(report, read_progress(output), output)


def write_configs(options: argparse.Namespace, teacher: Path, text: Path) -> int:
    """Write the two commands' YAML files, as a user would; return the port of the teacher's metrics."""
    import torch
    from transformers import AutoConfig

    output, metrics_port, address = options.output, _free_port(), f"127.0.0.1:{_free_port()}"
    student = STUDENT | {"vocab_size": AutoConfig.from_pretrained(teacher).vocab_size}
    (output / "student-config").mkdir()
    (output / "student-config" / "config.json").write_text(json.dumps(student, indent=2))
    fast_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    settings: dict[str, dict[str, Any]] = {
        "teacher": {
            "model": {"path": str(teacher), "dtype": "bfloat16" if fast_bfloat16 else "float32"},
            "backend": options.backend,
            "server": {"address": address},
            "limits": {"max_batch_tokens": 2048},
            "id_model": {"text": str(text)},
            "metrics": {"port": metrics_port},
        },
        "student": {
            "model": {"config": str(output / "student-config" / "config.json"), "tokenizer": str(teacher)},
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
    for name, part in settings.items():
        (output / f"{name}.yaml").write_text(yaml.safe_dump(part, sort_keys=False))
    return metrics_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(output: Path, metrics_port: int, *, num_steps: int) -> dict[str, Any]:
    """Train two epochs of `num_steps`, the second with the teacher stopped; return the teacher's figures."""
    teacher_log, student_log = output / "teacher.log", output / "student.log"
    teacher_command = ["-m", "teacher_server", "--config", str(output / "teacher.yaml")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_WORKERS}"]
    student_command = [*launcher, "-m", "student_worker", "--config", str(output / "student.yaml")]
    last_line, last_step = time.monotonic(), 0

    def steps_done() -> int:
        nonlocal last_line, last_step
        rows = read_progress(output)
        if rows and rows[-1]["step"] > last_step and time.monotonic() - last_line >= LINE_SECONDS:
            row = rows[-1]
            last_line, last_step = time.monotonic(), row["step"]
            print(
                f"{row['step']}/{2 * num_steps} steps · loss {row['loss']:.3f} nats · {row['tokens_per_second']:,.0f} "
                f"tokens/s · waited {row['waiting_seconds']:.1f} s for targets",
                flush=True,
            )
        return int(rows[-1]["step"]) if rows else 0

    with child("teacher server", teacher_command, teacher_log) as teacher:
        running = {"teacher server": (teacher, teacher_log)}
        print("loading the teacher …", flush=True)
        serves = "serving on"
        wait_for(lambda: serves in teacher_log.read_text(errors="replace"), running, seconds=START_SECONDS, what=serves)
        with child("student workers", student_command, student_log, env={"OMP_NUM_THREADS": "1"}) as student:
            students = {"student workers": (student, student_log)}
            end = "the end of the online epoch"
            wait_for(lambda: steps_done() >= num_steps, students | running, seconds=EPOCH_SECONDS, what=end)
            figures = teacher_figures(metrics_port)
            stop(teacher)
            print("teacher stopped; the second epoch comes from the cache", flush=True)
            end = "the end of training"
            wait_for(lambda: bool(steps_done()) and student.poll() == 0, students, seconds=EPOCH_SECONDS, what=end)
            return figures


def read_progress(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the student's progress.jsonl so far."""
    path = output / "student" / "progress.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last piece may be half written
    return [json.loads(line) for line in lines]


def teacher_figures(metrics_port: int) -> dict[str, Any]:
    """Return the teacher's throughput while it scored, from its own metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = {(s.name, s.labels.get("stage")): s.value for family in families for s in family.samples}
    seconds = sum(samples[("logitstream_teacher_stage_seconds_sum", stage)] for stage in ("forward", "draw"))
    tokens = samples[("logitstream_teacher_tokens_total", None)]
    return {"teacher_tokens_scored": int(tokens), "teacher_tokens_per_second": tokens / seconds if seconds else None}


if __name__ == "__main__":
    main()
