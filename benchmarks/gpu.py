"""One run of at most six minutes on one GPU: the costs of the teacher's draw and of the student's loss, both checked.

    python -m benchmarks.gpu [--smoke] [--out benchmarks/results]      writes gpu.json and gpu.md there

Random weights, no network. Parts: ceilings of the chip; draws and loss against their specifications; a draw's time
against one read of the logits; 1B and 8B teachers against their bare forward, through gRPC where it is installed; a
0.6B student's step under several losses. A part that fails or finds a package missing says so and leaves the others;
none begins after 330 s. --smoke runs every line with tiny shapes, on a CPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

DEADLINE_SECONDS = 330
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model": "qwen3", "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 128, "vocab": 1500},
    "0.6b": {"model": "qwen3", "hidden_size": 1024, "layers": 28, "heads": 16, "inner": 3072, "vocab": 151_936},
    "1b": {"model": "llama", "hidden_size": 2048, "layers": 16, "heads": 32, "inner": 8192, "vocab": 128_256},
    "8b": {"model": "qwen3", "hidden_size": 4096, "layers": 36, "heads": 32, "inner": 12_288, "vocab": 151_936},
}


class Bench:
    """Measure on one device, with real or tiny sizes; lines: found so far."""

    def __init__(self, *, smoke: bool) -> None:
        self.smoke = smoke
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")
        self.lines: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self.copy_bytes_per_second = 1.0

    def say(self, name: str, **values: Any) -> None:
        """Add a line and print it."""
        self.lines[name] = {key: round(v, 5) if isinstance(v, float) else v for key, v in values.items()}
        print(f"[{time.monotonic() - self.started:5.0f} s] {name}: {self.lines[name]}", flush=True)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run a part; if it fails, say how. Afterwards its memory is free."""
        if time.monotonic() - self.started > DEADLINE_SECONDS:
            return self.say(name, skipped="no time left")
        try:
            work()
        except ImportError as error:
            self.say(name, skipped=f"missing: {error}")
        except Exception as error:
            self.say(name, failed=f"{type(error).__name__}: {error}"[:400])
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        return None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, repeats: int = 7, warm: int = 2) -> float:
        """Return the median of several runs, each begun and ended with nothing left to do on the device."""
        for _ in range(warm):
            work()
        taken = []
        for _ in range(1 if self.smoke else repeats):
            self.synchronize()
            begun = time.perf_counter()
            work()
            self.synchronize()
            taken.append(time.perf_counter() - begun)
        return median(taken)

    def peak_gib(self, work: Callable[[], object]) -> float:
        """Return the most memory beyond what was in use before, 0 on a CPU."""
        if not self.on_gpu:
            work()
            return 0.0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def without_waits(self, work: Callable[[], object]) -> bool:
        """Return if work never waits for the device; on a CPU it is only run."""
        if not self.on_gpu:
            work()
            return True
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except RuntimeError as error:
            print(f"  waits: {error}", flush=True)
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def model(self, name: str) -> Any:
        """Return a model of random bf16 weights, made on the device."""
        from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

        shape = SHAPES["tiny" if self.smoke else name]
        config: Any = (LlamaConfig if shape["model"] == "llama" else Qwen3Config)(
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape.get("kv_heads", 8),
            head_dim=max(16, min(128, shape["hidden_size"] // shape["heads"])) if shape["model"] == "llama" else 128,
            vocab_size=shape["vocab"],
            tie_word_embeddings=name in ("0.6b", "1b"),
        )
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(self.device)


def measure_ceilings(bench: Bench) -> None:
    """Read what the chip does at best: a copy's bytes, read and written, and a large product."""
    size, width = (1 << 20, 256) if bench.smoke else (1 << 31, 8192)
    source, copy = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.copy_bytes_per_second = 2 * size / bench.seconds(lambda: copy.copy_(source))
    left, right = (torch.randn(width, width, device=bench.device).bfloat16() for _ in range(2))
    flops = 2 * width**3 / bench.seconds(lambda: left @ right)
    bench.say("ceilings", copy_tb_per_second=bench.copy_bytes_per_second / 1e12, bf16_tflops=flops / 1e12)


def machine() -> dict[str, Any]:
    """Describe the chip and the versions that matter."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "numpy", "grpcio", "liger_kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: a CPU"
    return {"chip": chip, "cuda": torch.version.cuda, "cores": os.cpu_count(), "versions": versions}


def table(result: dict[str, Any]) -> str:
    """Return the lines as a Markdown table."""
    rows = [f"{result['machine']['chip']}, torch {result['machine']['versions']['torch']}", "", "| line | found |"]
    rows.append("|---|---|")
    for name, values in result["lines"].items():
        found = ", ".join(f"{key} {value}" for key, value in values.items())
        rows.append(f"| {name} | {found} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    from benchmarks import gpu_student, gpu_teacher

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, for a test of this program")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="the folder to write to")
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(smoke=options.smoke)
    if options.serve:
        return gpu_teacher.serve(bench, options.serve[0], Path(options.serve[1]))
    bench.part("ceilings", lambda: measure_ceilings(bench))
    for name, work in (gpu_teacher.PARTS | gpu_student.PARTS).items():
        bench.part(name, lambda work=work: work(bench))  # type: ignore[misc]
    result = {"machine": machine(), "seconds": time.monotonic() - bench.started, "smoke": bench.smoke}
    result["lines"] = bench.lines
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "gpu.md").write_text(table(result))
    failed = [name for name, line in bench.lines.items() if "failed" in line]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
