"""The blocked search against a running sum over the whole vocabulary."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from logitstream.inverse_cdf import (
    GATHER_BYTES,
    at_least,
    locate,
    locate_blocked,
    locate_in_logits,
    locate_plain,
    relative_probs,
    relative_probs_plain,
    scratch,
    without,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1 << 32), st.floats(0.1, 30), st.floats(0, 0.95))
def test_locate_finds_what_the_plain_search_finds(vocab_size: int, seed: int, scale: float, share_cut: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab_size, generator=generator) * scale
    cut = torch.rand(6, vocab_size, generator=generator) < share_cut
    cut[:, seed % vocab_size] = False
    logits[cut] = -torch.inf
    distribution = relative_probs(logits, 1.0, np.arange(6), scratch(logits))
    points = (1 - torch.rand(6, 50, generator=generator, dtype=torch.float64)).sort(dim=1).values
    points[:, -1] = 1.0
    plain = locate_plain(distribution, points)
    for found in (torch.from_numpy(locate(distribution, points.numpy())), locate_blocked(distribution, points)):
        # A point on the border of two ids may fall on either side, by the rounding of a block's float32 sum.
        assert (found != plain)[:, :-1].double().mean() < 0.01
        assert distribution.values.gather(1, found).min() > 0


@pytest.mark.parametrize("vocab_size", [49_152, 151_936, 262_144])
def test_locate_at_real_vocabulary_sizes(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, vocab_size, generator=generator) * 4
    distribution = relative_probs(logits, 1.0, np.arange(3), scratch(logits))
    points = (1 - torch.rand(3, 5000, generator=generator, dtype=torch.float64)).sort(dim=1).values
    plain = locate_plain(distribution, points)
    assert (locate_blocked(distribution, points) != plain).double().mean() < 1e-3
    assert np.mean(locate(distribution, points.numpy()) != plain.numpy()) < 1e-3
    fused = locate_in_logits(logits, 1.0, np.arange(3), points.numpy())
    assert np.mean(fused != plain.numpy()) < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1 << 32), st.floats(0.01, 40), st.floats(0.3, 3))
@example(122, 85287247, 36.5, 2.342177027187476)
def test_compiled_probabilities_err_no_more_than_torchs(
    vocab_size: int, seed: int, scale: float, temperature: float
) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    logits[0, seed % vocab_size] = -torch.inf if vocab_size > 1 else 0.0
    exact = (logits.double() - logits.double().amax(dim=-1, keepdim=True)).div(temperature).exp()
    compiled = relative_probs(logits, temperature, np.arange(3), scratch(logits).clone())
    plain = relative_probs_plain(logits, temperature, np.arange(3), scratch(logits).clone())
    seen = exact > 1e-30
    for one in (compiled, plain):
        values = one.values[:, :vocab_size].double()
        # Relative, in 10^-6: an exponent below 70 errs by roundings of the difference (at most 4.1), of 1/temperature
        # (4.2) and of their product (3.8); then one or two roundings of the exponential.
        assert ((values / exact)[seen] - 1).abs().max() < 1.3e-5
        assert values[exact == 0].abs().sum() == 0
        torch.testing.assert_close(one.total(), exact.sum(dim=1), rtol=1e-6, atol=0)


def test_entries_of_a_share_are_found_and_taken_out() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)) * 3
    probs = torch.softmax(logits.double(), dim=-1)
    distribution = relative_probs(logits, 1.0, np.arange(20), scratch(logits))
    rows, ids, shares = at_least(distribution, 0.03)
    expected_rows, expected_ids = (probs >= 0.03).nonzero(as_tuple=True)
    torch.testing.assert_close(rows, expected_rows)
    torch.testing.assert_close(ids, expected_ids)
    torch.testing.assert_close(shares, probs[rows, ids], rtol=1e-5, atol=0)
    before = distribution.total().clone()
    rest = without(distribution, rows, ids)
    left = torch.where(probs >= 0.03, 0.0, probs).sum(dim=1)
    torch.testing.assert_close(rest.total() / before, left, rtol=1e-4, atol=1e-9)


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            self.num_bytes = max(self.num_bytes, tensor.nbytes if isinstance(tensor, torch.Tensor) else 0)
        return result


def test_the_torch_search_gathers_a_bounded_number_of_blocks() -> None:
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    distribution = relative_probs(logits, 1.0, np.arange(9), scratch(logits))
    points = (1 - torch.rand(9, 40_000, dtype=torch.float64)).sort(dim=1).values
    with LargestResult() as largest:
        found = locate_blocked(distribution, points)
    assert largest.num_bytes < GATHER_BYTES < 9 * 40_000 * 64 * 12
    assert (found != locate_plain(distribution, points)).double().mean() < 1e-3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs two cores to bind to")
def test_threads_draw_on_the_other_cores_of_the_process_where_the_drawing_thread_is_bound_to_one() -> None:
    script = """
import os, threading
import numpy as np, torch
from logitstream import inverse_cdf
torch.set_num_threads(2)
cores, done = os.sched_getaffinity(0), threading.Event()
threading.Thread(target=done.wait, daemon=True).start()
os.sched_setaffinity(0, {min(cores)})  # as OpenMP does to its first thread
inverse_cdf.locate_in_logits(torch.zeros(4, 64), 1.0, np.arange(4), np.full((4, 1), 0.5))
assert inverse_cdf._threads(os.getpid()).submit(os.sched_getaffinity, 0).result() == cores - {min(cores)}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_device_s_path_compiles_to_the_same_ids() -> None:
    """Uniforms, the check for bad rows and the counting of equal ids are the host's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 1000, generator=generator) * 4
    points = (1 - torch.rand(6, 20, generator=generator, dtype=torch.float64)).sort(dim=1).values

    def located(logits: torch.Tensor, buffer: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return locate_blocked(relative_probs_plain(logits, 0.7, np.arange(6), buffer), points)

    expected = located(logits, torch.zeros(6, 1024), points)
    compiled = torch.compile(located, backend="aot_eager")(logits, torch.zeros(6, 1024), points)
    assert torch.equal(compiled, expected)
    distribution = relative_probs_plain(logits, 0.7, np.arange(6), torch.zeros(6, 1024))
    whole = torch.compile(locate_blocked, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(distribution, points), expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86 processors")
def test_exponentials_are_taken_512_bits_at_a_time_on_an_intel_processor_too(tmp_path: Path) -> None:
    """LLVM keeps loops to 256 bits there; the code is made for one and looked at, not run."""
    script = """if True:
        from numba import types, typeof
        from logitstream.cpu_kernels import EXP2, fill_rows
        bits, values, sums = (types.Array(dtype, 2, "C") for dtype in (types.uint16, types.float32, types.float64))
        fill_rows.compile((bits, types.uint32, types.float32, typeof(EXP2), values, sums))
        print(fill_rows.inspect_asm(fill_rows.signatures[0]))
    """
    intel = {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx512f,+avx512dq,+avx512bw,+avx512vl",
    }
    made = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **intel, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    products = [line for line in made.stdout.splitlines() if "vfmadd" in line and "%zmm" in line]
    assert len(products) >= 5, "the polynomial of degree 5"
