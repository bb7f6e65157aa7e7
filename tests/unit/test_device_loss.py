"""The fused loss as on CUDA: in Triton's interpreter against its plain twin, and recorded on torch's device `meta`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logitstream.device_loss import DeviceRows
from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl
from logitstream.loss import Diagnostics, sparse_kl
from logitstream.types import SparseTargets
from tests.kernels import DEVICE
from tests.sparse_rows import drawn, random_targets

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, on overflow to infinity
ROWS, VOCAB, HIDDEN = 11, 300, 16
CHUNK_ROWS = 4


def by_kernel(hidden: torch.Tensor, weight: torch.Tensor | None, targets: SparseTargets | None, **options: Any) -> Any:
    """The loss as on CUDA; DeviceRows made by hand are the sign to take that path."""
    rows = options.pop("rows", None)
    rows = rows or DeviceRows.place(targets, options.get("labels"), options.get("loss_mask"), like=hidden)
    vocab_size = hidden.shape[1] if weight is None else len(weight)
    chunk_bytes = CHUNK_ROWS * -(-vocab_size // 64) * 64 * (2 if hidden.dtype == torch.bfloat16 else 4)
    return fused_linear_sparse_kl(hidden, weight, targets, device_rows=rows, chunk_bytes=chunk_bytes, **options)


def problem(dtype: torch.dtype, *, labels: bool = True, masked: bool = False) -> tuple[Any, ...]:
    rng = np.random.default_rng(7)
    targets = random_targets(rng, num_rows=ROWS, vocab_size=VOCAB, max_entries=9)
    tensors = [
        torch.from_numpy(rng.normal(size=shape) / 2).to(DEVICE, dtype).requires_grad_()
        for shape in ((ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    ]
    named = torch.from_numpy(rng.integers(0, VOCAB, ROWS)).to(DEVICE)
    named[3] = -100
    mask = torch.from_numpy(rng.random(ROWS) < 0.6).to(DEVICE)
    return *tensors, targets, {"labels": named if labels else None, "loss_mask": mask if masked else None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["no", "by the host", "on the device"])
@pytest.mark.parametrize(
    "extra", [{}, {"ce_weight": 0.3, "logit_softcap": 3.0}, {"ce_weight": 1.0}, {"temperature": 2.0, "ghost": True}]
)
def test_loss_gradients_and_diagnostics_are_the_plain_twins(
    dtype: torch.dtype, masked: str, extra: dict[str, Any]
) -> None:
    hidden, weight, bias, targets, options = problem(dtype, masked=masked != "no")
    extra = dict(extra)
    targets = drawn(targets, temperature=extra.pop("temperature", 1.0), ghost=extra.pop("ghost", False))
    targets = None if extra.get("ce_weight") == 1 else targets
    cap = extra.get("logit_softcap")
    rows = None
    if masked == "on the device":
        rows = DeviceRows.place(targets, options["labels"], None, like=hidden)
        mask = options["loss_mask"].view(torch.uint8)
        rows = DeviceRows(**{name: getattr(rows, name) for name in rows.__slots__} | {"index": None, "mask": mask})
    elif masked == "no":
        options["loss_mask"] = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*exact)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = sparse_kl(logits, targets, **options, **{k: v for k, v in extra.items() if k == "ce_weight"})
    got = by_kernel(hidden, weight, targets, bias=bias, rows=rows, **options, **extra)
    twin = fused_linear_sparse_kl(*exact[:2], targets, bias=exact[2], **options, **extra)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, ours, theirs in zip(Diagnostics._fields, got.diagnostics, twin.diagnostics, strict=True):
        if name != "agreements" or dtype == torch.float32:
            assert ours.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance), name
    assert got.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    ours = torch.autograd.grad(got.loss * 1.7, [hidden, weight, bias])
    for mine, true in zip(ours, torch.autograd.grad(expected * 1.7, exact), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= tolerance * true.norm()


def test_logits_in_place_of_hidden_states() -> None:
    hidden, weight, _, targets, options = problem(torch.float32)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    expected = sparse_kl(logits.double(), targets, **options)
    got = by_kernel(logits, None, targets, **options).loss
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    mine, true = (torch.autograd.grad(loss, logits)[0] for loss in (got, expected))
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


def test_what_is_not_a_number_in_a_row_that_does_not_count_stays_there() -> None:
    hidden, weight, _, targets, _ = problem(torch.bfloat16)
    mask = torch.ones(ROWS, dtype=torch.uint8, device=DEVICE)
    mask[5] = 0
    with torch.no_grad():
        hidden[5] = torch.nan
    rows = DeviceRows.place(targets, None, None, like=hidden)
    rows = DeviceRows(**{name: getattr(rows, name) for name in rows.__slots__} | {"mask": mask})
    got = by_kernel(hidden, weight, targets, rows=rows).loss
    assert got.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(got, [hidden, weight]))


def test_no_rows_are_no_loss() -> None:
    hidden, weight, _, targets, _ = problem(torch.bfloat16)
    got = by_kernel(hidden[:0], weight, targets.slice_rows(0, 0)).loss
    assert got.item() == 0
    assert not torch.autograd.grad(got, weight)[0].any()


class Recorder(TorchDispatchMode):
    """Counts operations, the bytes of the logits that they touch, and copies between host and device.

    Tensors are on the device `meta`: what a host would have to wait for (nonzero, item, a boolean index) fails there.
    """

    def __init__(self, logits_shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits_shape = logits_shape
        self.calls: Counter[str] = Counter()
        self.passes: list[str] = []
        self.blocking_copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        self.calls[name.split("::")[1].split(".")[0]] += 1
        if name.startswith("aten::_to_copy") and args[0].device.type != "meta":
            self.blocking_copies += not kwargs.get("non_blocking", False)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if "view" not in name and any(self._is_logits(x) for x in tensors) and not name.startswith("aten::empty"):
            self.passes += [name] if all(word not in name for word in ("slice", "aten::t", "detach", "alias")) else []
        return function(*args, **kwargs)

    def _is_logits(self, tensor: torch.Tensor) -> bool:
        """True for a chunk of logits, as it is or transposed."""
        rows, columns = self.logits_shape
        return tensor.dim() == 2 and rows in tensor.shape and max(tensor.shape) in (columns, -(-columns // 64) * 64)


def on_no_device(*, needs: tuple[bool, bool] = (True, True), steps: int = 1) -> Recorder:
    """Walk a forward and backward pass of two chunks and record it."""
    targets = random_targets(np.random.default_rng(0), num_rows=2 * CHUNK_ROWS, vocab_size=VOCAB, max_entries=9)
    hidden, weight = (
        torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device="meta").requires_grad_(needed)
        for rows, needed in zip((2 * CHUNK_ROWS, VOCAB), needs, strict=True)
    )
    labels = torch.empty(2 * CHUNK_ROWS, dtype=torch.int64, device="meta")
    mask = torch.empty(2 * CHUNK_ROWS, dtype=torch.bool, device="meta")
    with Recorder((CHUNK_ROWS, VOCAB)) as seen:
        result: FusedLoss = by_kernel(hidden, weight, targets, labels=labels, loss_mask=mask, ce_weight=0.1)
        result.loss.backward()
    return seen


def test_a_step_waits_for_nothing_and_reads_and_writes_the_logits_once_beside_the_products() -> None:
    seen = on_no_device()
    assert seen.blocking_copies == 0
    chunk = ["aten::mm.out", "logitstream::loss_gradient", "aten::mm.dtype_out"]
    assert seen.passes == [*chunk, "aten::mm.dtype_out", *chunk, "aten::addmm.dtype_out"]
    assert not {"item", "_local_scalar_dense", "nonzero", "index"} & set(seen.calls)


def test_a_frozen_head_leaves_out_its_product_and_its_gradient() -> None:
    seen = on_no_device(needs=(True, False))
    assert seen.calls["addmm"] == 0
    assert seen.calls["mm"] == 2 * 2  # two chunks: logits, and the hidden states' gradient
    assert seen.calls["loss_gradient"] == 2


@pytest.mark.parametrize("head_is_frozen", [False, True])
def test_on_the_cpu_too_a_frozen_head_leaves_out_its_product(head_is_frozen: bool) -> None:
    targets = random_targets(np.random.default_rng(0), num_rows=ROWS, vocab_size=VOCAB, max_entries=9)
    hidden, weight = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    weight.requires_grad_(not head_is_frozen)
    with Recorder((ROWS, VOCAB)) as seen:
        fused_linear_sparse_kl(hidden, weight, targets).loss.backward()
    assert seen.calls["mm"] == 2
    assert seen.calls["addmm_"] == (not head_is_frozen)
