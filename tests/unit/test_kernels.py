"""How the kernels are chosen, and that nothing else needs Triton."""

from __future__ import annotations

import subprocess
import sys

import torch

from logitstream.kernels import are_usable


def test_a_cpu_never_asks_for_triton() -> None:
    assert not are_usable(torch.device("cpu"))
    without = "import sys; sys.modules['triton'] = None; import logitstream.sampling, logitstream.fused_loss"
    subprocess.run([sys.executable, "-c", without], check=True)
