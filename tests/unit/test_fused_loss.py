"""The fused loss against its plain twin: the same values and gradients, and no larger errors against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl
from logitstream.loss import Diagnostics, sparse_kl
from logitstream.types import SparseTargets
from tests.sparse_rows import drawn, random_targets

CHUNK_ROWS = 3


def problem(
    seed: int,
    *,
    num_rows: int,
    vocab_size: int,
    max_entries: int,
    hidden_size: int = 8,
    exact: bool = False,
    padded: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparseTargets, torch.Tensor, torch.Tensor]:
    """hidden, weight, bias in float64, targets, labels, mask."""
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, num_rows=num_rows, vocab_size=vocab_size, max_entries=max_entries, exact=exact)
    rows = vocab_size + padded
    hidden, weight, bias = (
        torch.from_numpy(rng.normal(size=shape) * scale)
        for shape, scale in (((num_rows, hidden_size), 1.0), ((rows, hidden_size), 1.0), ((rows,), 0.3))
    )
    labels = torch.from_numpy(rng.integers(0, rows, num_rows))
    labels[rng.random(num_rows) < 0.2] = -100
    return hidden, weight, bias, targets, labels, torch.from_numpy(rng.random(num_rows) < 0.8)


def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(0, 11),
    vocab_size=st.integers(17, 90),
    max_entries=st.integers(0, 30),
    ce_weight=st.sampled_from([0.0, 0.25, 1.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    cap=st.sampled_from([None, 4.0]),
    ghost=st.booleans(),
    masked=st.booleans(),
    biased=st.booleans(),
    padded=st.sampled_from([0, 5]),
)
def test_values_and_gradients_are_the_plain_twins(
    seed: int,
    num_rows: int,
    vocab_size: int,
    max_entries: int,
    ce_weight: float,
    temperature: float,
    cap: float | None,
    ghost: bool,
    masked: bool,
    biased: bool,
    padded: int,
) -> None:
    hidden, weight, bias, targets, labels, mask = problem(
        seed, num_rows=num_rows, vocab_size=vocab_size, max_entries=max_entries, padded=padded
    )
    inputs = [hidden, weight, *([bias] if biased else [])]
    for tensor in inputs:
        tensor.requires_grad_()
    arguments: dict[str, Any] = {
        "targets": None if ce_weight == 1 else drawn(targets, temperature=temperature, ghost=ghost),
        "labels": labels if ce_weight else None,
        "ce_weight": ce_weight,
        "loss_mask": mask if masked else None,
    }
    expected = sparse_kl(plain(hidden, weight, bias if biased else None, cap), **arguments)
    got = fused_linear_sparse_kl(
        hidden,
        weight,
        bias=bias if biased else None,
        logit_softcap=cap,
        chunk_bytes=CHUNK_ROWS * 8 * len(weight),
        **arguments,
    ).loss
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    scale = 1.7  # a gradient from above other than 1
    for ours, theirs in zip(
        torch.autograd.grad(got * scale, inputs), torch.autograd.grad(expected * scale, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"ce_weight": 0.5}, {"ce_weight": 0.5, "temperature": 2.0}, {"logit_softcap": 3.0}],
)
@pytest.mark.parametrize("ghost", [False, True])
def test_gradcheck(options: dict[str, float], ghost: bool) -> None:
    options = dict(options)
    temperature = options.pop("temperature", 1.0)
    hidden, weight, bias, targets, labels, mask = problem(5, num_rows=7, vocab_size=19, max_entries=6, hidden_size=3)
    inputs = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_linear_sparse_kl(
            hidden,
            weight,
            drawn(targets, temperature=temperature, ghost=ghost),
            bias=bias,
            labels=labels,
            loss_mask=mask,
            chunk_bytes=CHUNK_ROWS * 8 * 19,
            **options,
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)


def errors(dtype: torch.dtype, seed: int, **shape: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Root mean square errors against float64 of the fused loss and of the plain twin, at the same dtype."""
    hidden, weight, _, targets, labels, mask = problem(seed, **shape)
    hidden, weight = hidden.to(dtype), (weight * 0.3).to(dtype)
    options: dict[str, Any] = {"loss_mask": mask, "labels": labels, "ce_weight": 0.25}
    chunk_bytes = 8 * 8 * len(weight)  # of fewer than 8 rows, MKL multiplies on an AMD processor in one chain of sums

    def run(fused: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        h, w = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight))
        if fused:
            loss = fused_linear_sparse_kl(h, w, targets, chunk_bytes=chunk_bytes, **options).loss
        else:
            loss = sparse_kl(torch.nn.functional.linear(h, w), targets, **options)
        grads = torch.autograd.grad(loss, [h, w])
        return {"loss": loss.detach(), "hidden": grads[0], "weight": grads[1]}

    exact = run(False, torch.float64)
    return tuple(  # type: ignore[return-value]
        {
            name: (value.double() - exact[name]).square().mean().sqrt().item()
            for name, value in run(fused, dtype).items()
        }
        for fused in (True, False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_no_more_than_the_plain_twins(dtype: torch.dtype) -> None:
    """Over ragged shapes and seeds. Rounding favours the one or the other in a single case, by up to 20 times where a
    product adds up 262,144 terms and the other one was lucky, so the median of the ratios is compared."""
    shapes = [
        {"num_rows": 40, "vocab_size": 17, "max_entries": 5},
        {"num_rows": 33, "vocab_size": 101, "max_entries": 60},
        {"num_rows": 50, "vocab_size": 1000, "max_entries": 300},
        {"num_rows": 11, "vocab_size": 20_011, "max_entries": 300},
    ]
    cases = [(seed, shape) for shape in shapes for seed in range(4)]
    cases += [(9, {"num_rows": 40, "vocab_size": 17, "max_entries": 0})]
    cases += [(9, {"num_rows": 5, "vocab_size": 262_144, "max_entries": 40})]
    pairs = [errors(dtype, seed, hidden_size=32, **shape) for seed, shape in cases]
    for name in ("hidden", "weight"):
        ratios = [ours[name] / theirs[name] for ours, theirs in pairs]
        assert np.median(ratios) <= 1.05, (name, ratios)
    assert np.mean([ours["loss"] for ours, _ in pairs]) <= 1.1 * np.mean([theirs["loss"] for _, theirs in pairs])


@pytest.mark.parametrize("num_items", [8_192.0, 65_536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"ce_weight": 0.5, "temperature": 2.0}, {"ghost": True}, {"logit_softcap": 4.0, "temperature": 3.0}]
)
def test_a_share_of_thousands_of_items_survives_low_precision(
    num_items: float, dtype: torch.dtype, autocast: bool, options: dict[str, Any]
) -> None:
    """Under a gradient scaler: no larger an error, against float64, than the plain twin's at the same dtype."""
    hidden, weight, bias, targets, labels, mask = problem(8, num_rows=40, vocab_size=3_000, max_entries=6)
    options = dict[str, Any](labels=labels, loss_mask=mask, num_items=num_items) | options
    cap: Any = options.pop("logit_softcap", None)
    targets = drawn(targets, temperature=options.pop("temperature", 1.0), ghost=options.pop("ghost", False))
    inputs = [(tensor * 0.3).to(dtype) for tensor in (hidden, weight, bias)]

    def gradients(inner: torch.dtype, *, fused: bool = False, scale: float = 65_536.0) -> list[torch.Tensor]:
        low = inner == dtype
        h, w, b = (tensor.to(torch.float32 if low and autocast else inner).requires_grad_() for tensor in inputs)
        with torch.autocast("cpu", dtype=dtype, enabled=low and autocast):
            if fused:
                chunk_bytes = 16 * 10 * len(w)
                extra: dict[str, Any] = {"bias": b, "logit_softcap": cap, "chunk_bytes": chunk_bytes}
                loss = fused_linear_sparse_kl(h, w, targets, **extra, **options).loss
            else:
                loss = sparse_kl(plain(h, w, b, cap), targets, **options)
        (loss * scale).backward()
        return [tensor.grad.double() / scale for tensor in (h, w, b) if tensor.grad is not None]

    exact = gradients(torch.float64, scale=1.0)
    for ours, theirs, true in zip(gradients(dtype, fused=True), gradients(dtype), exact, strict=True):
        assert (ours - true).norm() <= 1.05 * (theirs - true).norm()
        assert (ours - true).norm() <= 0.02 * true.norm()


def test_diagnostics_are_those_of_the_logits() -> None:
    hidden, weight, bias, targets, labels, mask = problem(3, num_rows=13, vocab_size=40, max_entries=5)
    got = fused_linear_sparse_kl(
        hidden, weight, targets, bias=bias, labels=labels, loss_mask=mask, chunk_bytes=CHUNK_ROWS * 8 * 40
    ).diagnostics
    logits = plain(hidden, weight, bias, None)
    probs = torch.softmax(logits, 1)
    rows = [row for row in range(13) if mask[row] and targets.row_offsets[row] < targets.row_offsets[row + 1]]
    mass, agreements = 0.0, 0
    for row in rows:
        entries = slice(targets.row_offsets[row], targets.row_offsets[row + 1])
        ids, counts = targets.token_ids[entries], targets.counts[entries]
        mass += probs[row, ids.tolist()].sum().item()
        agreements += int(logits[row].argmax()) in ids[counts == counts.max()]
    labelled = mask & (labels != -100)
    assert got.rows.item() == mask.sum()
    assert got.kept_rows.item() == len(rows)
    assert got.kept_mass.item() == pytest.approx(mass)
    assert got.agreements.item() == agreements
    assert got.labelled_rows.item() == labelled.sum()
    expected = torch.nn.functional.cross_entropy(logits[labelled], labels[labelled], reduction="sum")
    assert got.cross_entropy.item() == pytest.approx(expected.item())
    assert got.kl.item() / mask.sum().item() == pytest.approx(sparse_kl(logits, targets, loss_mask=mask).item())


@pytest.mark.parametrize("ce_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ghost", [False, True])
def test_logits_in_place_of_hidden_states_give_the_same(ce_weight: float, temperature: float, ghost: bool) -> None:
    hidden, weight, bias, targets, labels, mask = problem(3, num_rows=13, vocab_size=40, max_entries=5)
    targets = drawn(targets, temperature=temperature, ghost=ghost)
    arguments: dict[str, Any] = {"labels": labels, "loss_mask": mask, "ce_weight": ce_weight}
    arguments["chunk_bytes"] = CHUNK_ROWS * 8 * 40
    hidden.requires_grad_()
    fused = fused_linear_sparse_kl(hidden, weight, targets, bias=bias, **arguments)
    from_logits = fused_linear_sparse_kl(plain(hidden, weight, bias, None), None, targets, **arguments)
    for name, ours, theirs in zip(Diagnostics._fields, fused.diagnostics, from_logits.diagnostics, strict=True):
        assert theirs.item() == pytest.approx(ours.item(), rel=1e-9), name
    torch.testing.assert_close(from_logits.loss, fused.loss)
    found = (torch.autograd.grad(one.loss, hidden)[0] for one in (from_logits, fused))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("chunk_rows", "options"), [(100, {}), (CHUNK_ROWS, {}), (CHUNK_ROWS, {"logit_softcap": 4.0, "ce_weight": 0.5})]
)
def test_a_compiled_model_has_the_same_loss_and_gradients(chunk_rows: int, options: dict[str, Any]) -> None:
    """aot_eager: what traces a function into a graph, without the C++ that inductor makes of it."""
    hidden, weight, _, targets, labels, mask = problem(7, num_rows=13, vocab_size=40, max_entries=5)
    arguments: dict[str, Any] = {"labels": labels, "loss_mask": mask, "chunk_bytes": chunk_rows * 8 * 40} | options

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> FusedLoss:
        return fused_linear_sparse_kl(hidden * 1.5, weight, targets, **arguments)

    found = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        got = function(*inputs)
        found.append([got.loss, *got.diagnostics, *torch.autograd.grad(got.loss, inputs)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    """Kept ids whose probability underflows in float32 still have their exact log-probability."""
    hidden, weight, _, targets, _, _ = problem(2, num_rows=6, vocab_size=30, max_entries=5)
    hidden = (hidden * 300).float().requires_grad_()
    got = fused_linear_sparse_kl(hidden, weight.float(), targets).loss
    expected = sparse_kl(hidden.detach().double() @ weight.float().double().t(), targets)
    assert expected > 100
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.autograd.grad(got, hidden)[0].isfinite().all()


def test_tied_weights_get_both_gradients() -> None:
    _, weight, _, targets, _, _ = problem(1, num_rows=8, vocab_size=25, max_entries=5)
    weight.requires_grad_()
    ids = torch.arange(8)
    sparse_kl(torch.tanh(weight[ids]) @ weight.t(), targets).backward()
    expected, weight.grad = weight.grad, None
    fused_linear_sparse_kl(torch.tanh(weight[ids]), weight, targets).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_autocast_multiplies_in_its_dtype_and_accumulates_the_weights_gradient_in_float32() -> None:
    hidden, weight, _, targets, _, _ = problem(4, num_rows=40, vocab_size=200, max_entries=20, hidden_size=32)
    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_sparse_kl(h, w, targets, chunk_bytes=9 * 200 * 6).loss
    loss.backward()
    expected_h, expected_w = hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    sparse_kl(expected_h @ expected_w.t(), targets).backward()
    assert loss.dtype == w.grad.dtype == torch.float32
    assert (w.grad - expected_w.grad).norm() <= 0.02 * expected_w.grad.norm()
    assert (h.grad - expected_h.grad).norm() <= 0.02 * expected_h.grad.norm()


def test_without_gradients_nothing_is_kept_for_backward() -> None:
    hidden, weight, _, targets, _, _ = problem(6, num_rows=8, vocab_size=25, max_entries=5)
    weight.requires_grad_()
    with torch.no_grad():
        evaluated = fused_linear_sparse_kl(hidden, weight, targets).loss
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, sparse_kl(hidden @ weight.t(), targets).detach())


def test_a_frozen_head_still_passes_gradients_on() -> None:
    hidden, weight, _, targets, _, _ = problem(6, num_rows=8, vocab_size=25, max_entries=5)
    hidden.requires_grad_()
    expected = torch.autograd.grad(sparse_kl(hidden @ weight.t(), targets), hidden)
    got = torch.autograd.grad(fused_linear_sparse_kl(hidden, weight, targets).loss, hidden)
    torch.testing.assert_close(got, expected)


def test_backward_can_be_called_again() -> None:
    hidden, weight, _, targets, _, _ = problem(6, num_rows=4, vocab_size=25, max_entries=5)
    loss = fused_linear_sparse_kl(hidden.requires_grad_(), weight.requires_grad_(), targets).loss
    first = torch.autograd.grad(loss * 3, [hidden, weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, [hidden, weight]), first)


def test_a_smaller_student_vocabulary_is_refused() -> None:
    hidden, weight, _, targets, _, _ = problem(6, num_rows=4, vocab_size=25, max_entries=5)
    with pytest.raises(ValueError, match="vocabulary has 24"):
        fused_linear_sparse_kl(hidden, weight[:24], targets)
