"""The loss kernel against `loss.sparse_kl` in float64: every element of the gradient within its dtype's rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from logitstream.loss import Diagnostics, sparse_kl
from logitstream.types import SparseTargets
from tests.kernels import DEVICE, Build, compile_sm90, traffic
from tests.sparse_rows import drawn, random_targets

kernels = pytest.importorskip("logitstream.kernels.loss")
NUM_WARPS, TILE, loss_gradient = kernels.NUM_WARPS, kernels.TILE, kernels.loss_gradient

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's, on overflow to infinity


class Case(NamedTuple):
    """A shape, what the targets are like, and the loss's options."""

    rows: int
    vocab: int
    most: int
    ce: float = 0.0
    temperature: float = 1.0
    cap: float | None = None
    ghost: bool = False
    threshold: bool = False
    labels: bool = False
    masked: bool = False
    padding: int = 0


CASES = {
    "smallest": Case(5, 130, 20, labels=True),
    "llama": Case(3, 128_256, 60),
    "qwen": Case(3, 151_936, 70, labels=True),
    "gemma": Case(2, 262_144, 40, ce=0.5, cap=30.0, labels=True),
    "gpt2, padded": Case(4, 50_257, 40, ce=0.2, labels=True, padding=15),
    "mixed": Case(7, 20_001, 130, ce=0.3, labels=True, masked=True),
    "temperature, tail entries": Case(7, 9_000, 40, temperature=2.0, threshold=True),
    "soft cap, tail entries": Case(7, 9_000, 40, ce=0.25, cap=15.0, threshold=True, labels=True),
    "many entries": Case(6, 1_000, 200, temperature=0.7, cap=30.0),
    "ghost": Case(7, 9_000, 40, ghost=True, labels=True),
    "ghost, mixed": Case(7, 4_096, 40, ce=0.4, ghost=True, labels=True, masked=True),
    "ghost at a temperature": Case(6, 5_000, 40, temperature=3.0, ghost=True),
    "two softmaxes": Case(7, 9_000, 40, ce=0.4, temperature=2.5, labels=True),
    "two softmaxes, all options": Case(7, 9_001, 40, ce=0.4, temperature=0.5, cap=20.0, ghost=True, labels=True),
    "cross-entropy alone": Case(6, 8_192, 0, ce=1.0, labels=True, masked=True),
}


def entries(targets: SparseTargets, scale: float) -> dict[str, Any]:
    """The targets' arrays as the kernel takes them."""
    arrays: dict[str, Any] = {"starts": targets.row_offsets, "ids": targets.token_ids, "counts": targets.counts}
    tensors = {name: torch.from_numpy(array.astype(np.int32)).to(DEVICE) for name, array in arrays.items()}
    scratch = torch.full((targets.num_entries,), torch.nan, device=DEVICE)
    return tensors | {"kept_logits": scratch, "units": targets.units, "tail_units": targets.tail_units, "kd": scale}


def with_tails(targets: SparseTargets, rng: np.random.Generator) -> SparseTargets:
    """The targets as of the sampler `threshold`: about half the entries are tail entries."""
    counts = np.where(rng.random(targets.num_entries) < 0.5, 0, targets.counts)
    return replace(targets, units=20 * targets.units, tail_units=4, counts=counts.astype(np.int32))


def problem(case: Case, shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, SparseTargets, dict[str, Any]]:
    """Logits in the dtype, targets with an empty row, and labels and mask where the case has them."""
    rng = np.random.default_rng(case.vocab)
    targets = random_targets(rng, num_rows=case.rows, vocab_size=case.vocab, max_entries=case.most, exact=case.ghost)
    if case.threshold:
        targets = with_tails(targets, rng)
    if not case.ghost and case.most:
        targets = SparseTargets.concatenate([targets.slice_rows(0, 1), targets.slice_rows(1, case.rows)])
        empty = replace(targets.slice_rows(0, 1), row_offsets=np.zeros(2, np.int64))
        empty = replace(empty, token_ids=targets.token_ids[:0], counts=targets.counts[:0])
        targets = SparseTargets.concatenate([empty, targets.slice_rows(1, case.rows)])
    logits = torch.from_numpy(rng.normal(size=(case.rows, case.vocab)).astype(np.float32) * 3)
    if shape == "late peaks":  # far above what the first tile lets expect: the reference is raised, twice
        logits[:, case.vocab // 2] = 120.0
        logits[:, case.vocab - 2] = 400.0
    if shape == "minus infinity":  # the first tile, and others here and there; not the kept ids
        gone = torch.from_numpy(rng.random((case.rows, case.vocab)) < 0.1)
        gone[:, : min(5_000, case.vocab // 2)] = True
        gone[targets.row_index(), targets.token_ids] = False
        logits[gone] = -torch.inf
    labels = mask = None
    if case.labels:
        labels = torch.from_numpy(rng.integers(case.vocab * 2 // 3, case.vocab, size=case.rows))
        labels[1] = -100
        if targets.num_entries:  # a label that is also a kept id
            labels[-1] = int(targets.token_ids[-1])
        logits[torch.arange(case.rows), labels.clamp(min=0)] = 1.5
    if case.masked:
        mask = torch.from_numpy(rng.random(case.rows) < 0.6)
        logits[~mask] = 0
    options = {"labels": labels, "loss_mask": mask, "ce_weight": case.ce}
    return logits.to(dtype), drawn(targets, temperature=case.temperature, ghost=case.ghost), options


def run(case: Case, logits: torch.Tensor, targets: SparseTargets, options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The gradient in float64 and the sums of the rows, of the mean over all rows; the logits are overwritten."""
    buffer = logits.to(DEVICE)
    if case.padding:
        buffer = torch.nn.functional.pad(buffer, (0, case.padding), value=7.0)
    factors, sums = (torch.full((case.rows, n), torch.nan, device=DEVICE) for n in (1, 7))
    labels, mask = options["labels"], options["loss_mask"]
    none = dict.fromkeys(("starts", "ids", "counts", "kept_logits")) | {"units": 1, "tail_units": 0, "kd": 0.0}
    loss_gradient(
        buffer,
        case.vocab,
        0,
        labels=labels.to(DEVICE) if labels is not None and (case.ce or case.temperature == 1) else None,
        mask=None if mask is None else mask.to(DEVICE).view(torch.uint8),
        rows=None,
        inverse_items=torch.tensor([1 / case.rows], device=DEVICE),
        factors=factors,
        sums=sums,
        ce=case.ce,
        temperature=case.temperature,
        softcap=case.cap or 0.0,
        has_ghost=case.ghost,
        **(none if case.ce == 1 else entries(targets, (1 - case.ce) * case.temperature)),
    )
    return buffer[:, : case.vocab].double().cpu() * factors.double().cpu(), Diagnostics(*sums.double().cpu().sum(0))


@pytest.mark.parametrize("shape", ["normal", "late peaks", "minus infinity"])
@pytest.mark.parametrize("name", CASES)
def test_each_element_of_the_gradient_is_the_specifications(name: str, shape: str) -> None:
    check(CASES[name], shape, torch.bfloat16)


@pytest.mark.parametrize("name", ["smallest", "mixed", "ghost, mixed", "two softmaxes"])
def test_float32_has_float32s_precision(name: str) -> None:
    check(CASES[name], "normal", torch.float32)


def check(case: Case, shape: str, dtype: torch.dtype) -> None:
    if case.cap and shape == "minus infinity":
        pytest.skip("a soft cap makes it a number")
    logits, targets, options = problem(case, shape, dtype)
    exact = logits.double().clone().requires_grad_()
    capped = exact if case.cap is None else case.cap * torch.tanh(exact / case.cap)
    everything = torch.ones(case.rows, dtype=torch.bool)
    options["loss_mask"] = everything if options["loss_mask"] is None else options["loss_mask"]
    expected = sparse_kl(capped, None if case.ce == 1 else targets, num_items=case.rows, **options)
    (gradient,) = torch.autograd.grad(expected, exact)
    if not case.masked:
        options["loss_mask"] = None
    got, sums = run(case, logits, targets, options)
    assert torch.isfinite(got).all()
    # Triton's interpreter cuts off where a GPU rounds; soft-capped logits are themselves rounded to float32.
    rounding = {torch.bfloat16: 2.0**-7 if DEVICE == "cpu" else 2.0**-8, torch.float32: 2e-6}[dtype]
    room = rounding * 1.01 * gradient.abs() + 3e-6 * gradient.abs().amax(1, keepdim=True)
    assert ((got - gradient).abs() <= room).all(), ((got - gradient).abs() / room).nan_to_num().max()
    total = (1 - case.ce) * case.temperature**2 * sums.kl + case.ce * sums.cross_entropy
    assert total.item() / case.rows == pytest.approx(expected.item(), rel=2e-5, abs=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter counts")
@pytest.mark.parametrize(("name", "reads"), [("mixed", 1), ("soft cap, tail entries", 1), ("two softmaxes", 2)])
def test_the_logits_are_read_and_written_once(name: str, reads: int) -> None:
    """Beside the kept ids and the label, and once more if two softmaxes need their sums first."""
    case = CASES[name]._replace(masked=False)
    logits, targets, options = problem(case, "normal", torch.bfloat16)
    buffer = logits.clone()
    with traffic(buffer) as seen:
        run(case, buffer, targets, options)
    few = 2 * (targets.num_entries + 2 * case.rows)
    first_tiles = logits.nbytes // (case.vocab // TILE + 1) if reads == 2 else 0
    assert reads * logits.nbytes <= seen["read"] <= reads * logits.nbytes + few + first_tiles
    assert logits.nbytes <= seen["written"] <= logits.nbytes + 2 * few


KERNEL_ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(("starts", "ids", "counts"), "*i32"),
    **dict.fromkeys(("kept_logits", "inverse_items", "factors", "sums"), "*fp32"),
    **dict.fromkeys(("labels", "rows"), "*i64"),
    **dict.fromkeys(("first_row", "V", "padded"), "i32"),
    **dict.fromkeys(("scale", "kd", "ce", "cap", "units", "tail_units"), "fp32"),
    "mask": "*u8",
    "stride": "i64",
}
OPTIONS = ("HAS_TARGETS", "HAS_LABELS", "HAS_MASK", "HAS_ROWS", "HAS_CAP", "HAS_GHOST", "TWO_SOFTMAXES")


def build(*options: str, dtype: str = "bf16", vocab_is_even: bool = True) -> Build:
    aligned = ("logits", "stride", "padded", "ids", "counts", "kept_logits", "factors", "sums")
    return Build(
        kernel="logitstream.kernels.loss:loss_gradient_kernel",
        signature=KERNEL_ARGUMENTS | {"logits": f"*{dtype}"},
        constants={name: name in options for name in OPTIONS}
        | {
            "TILE": TILE // (1 + (dtype == "fp32")),
            "K_TILE": 64,
        },
        num_warps=NUM_WARPS,
        aligned=(*aligned, "V") if vocab_is_even else aligned,
    )


def test_nothing_spills_on_sm_90_and_logits_travel_in_words_of_16_bytes() -> None:
    builds = [
        build("HAS_TARGETS", "HAS_LABELS"),
        build("HAS_TARGETS", "HAS_LABELS", vocab_is_even=False),
        build("HAS_TARGETS", "HAS_LABELS", "HAS_MASK", "HAS_CAP", dtype="fp32"),
        build("HAS_TARGETS", "HAS_GHOST", "HAS_ROWS"),
        build("HAS_LABELS"),
        build(*OPTIONS),
    ]
    for one in compile_sm90(builds):
        assert one.stack_bytes == 0
        assert one.count(r"LDL.*|STL.*") == 0
        assert one.registers <= 128  # four blocks of 128 threads on a multiprocessor at least
        assert one.count(r"LDG.*[.]128") >= 4
        assert one.count(r"STG.*[.]128") >= 2
        assert one.count(r"D(ADD|MUL|FMA)") == 0  # nothing became float64 by accident
