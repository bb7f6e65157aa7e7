"""The fused loss on a GPU against its plain twin there. Never run so far: no GPU was at hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstream.fused_loss import fused_linear_sparse_kl
from logitstream.loss import sparse_kl
from tests.sparse_rows import random_targets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("num_items", [300.0, 65_536.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_gradients_are_the_plain_twins(dtype: torch.dtype, tolerance: float, num_items: float) -> None:
    """As under a gradient scaler; float16 has no room for a probability over 65,536."""
    scale = 65_536.0
    rng = np.random.default_rng(0)
    targets = random_targets(rng, num_rows=300, vocab_size=50_000, max_entries=40)
    hidden, weight = (
        torch.from_numpy(rng.normal(size=(rows, 256)) / 16).to("cuda", dtype).requires_grad_() for rows in (300, 50_000)
    )
    loss = fused_linear_sparse_kl(hidden, weight, targets, num_items=num_items, chunk_bytes=64 * 50_000 * 4).loss
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = sparse_kl(exact[0] @ exact[1].t(), targets, num_items=num_items)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(loss * scale, [hidden, weight]),
        torch.autograd.grad(expected * scale, exact),
        strict=True,
    ):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
