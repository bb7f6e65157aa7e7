"""Triton kernels in tests: on a GPU where there is one, else in Triton's interpreter (`conftest.py` chooses).

A test file begins with `module = pytest.importorskip("logitstream.kernels.NAME")`: Triton has no builds for some
machines. `compile_sm90` needs no GPU; this file, run as a program, is the process that it compiles in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel to compile.

    kernel: "module:name"; signature: Triton's type of each argument, such as "*bf16" or "i32" (more than it takes is
    fine, so that kernels share one); constants: the constexpr arguments; aligned: arguments that 16 divides.
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    aligned: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Describe a kernel built for sm_90: spills lie in stack_bytes, beside arrays that the compiler could not keep."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """Return how many of its instructions match, such as r"LDG.*[.]128": loads of 16 bytes."""
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def compile_sm90(builds: Sequence[Build]) -> list[Compiled]:
    """Compile in a process of its own, as this one may have Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels"],
        input=json.dumps([asdict(build) for build in builds]),
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [Compiled(**one) for one in json.loads(done.stdout)]


def language_like(rng: np.random.Generator, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Return bf16 logits of about two nats: normal ones with sixty far larger."""
    logits = rng.normal(size=(num_rows, vocab_size)) * 2
    for row in logits:
        row[rng.integers(vocab_size, size=60)] += rng.exponential(4.0, size=60) + 4
    return torch.from_numpy(logits.astype(np.float32)).to(DEVICE, torch.bfloat16)


@contextmanager
def traffic(tensor: torch.Tensor) -> Iterator[Counter[str]]:
    """Count the bytes that kernels read from and write to a tensor's memory, in the interpreter."""
    from triton.runtime import interpreter

    real, seen = interpreter._interpreter, Counter[str]()
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()

    class Counting:
        def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
            self.note("read", addresses, mask)
            return real.load(addresses, mask, other, dtype)

        def store(self, addresses: Any, values: Any, mask: Any) -> Any:
            self.note("written", addresses, mask)
            return real.store(addresses, values, mask)

        def note(self, kind: str, addresses: Any, mask: Any) -> None:
            is_inside = (addresses >= first) & (addresses < end) & mask
            seen[kind] += int(np.count_nonzero(is_inside)) * tensor.element_size()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    interpreter._interpreter = Counting()
    try:
        yield seen
    finally:
        interpreter._interpreter = real


def _compile(build: Build) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(import_module(module), name)
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in build.constants else build.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned if name in names},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": build.num_warps})
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([tool, "--dump-sass", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions: dict[str, int] = {}
    for one in re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.M):
        instructions[one] = instructions.get(one, 0) + 1
    return Compiled(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=int(built.metadata.shared),
        instructions=instructions,
    )


if __name__ == "__main__":
    json.dump([asdict(_compile(Build(**one))) for one in json.load(sys.stdin)], sys.stdout)
