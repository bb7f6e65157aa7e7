"""The draw's kernels against the exact distribution and the sampler table, and what they take on an H100."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from logitstream.distribution import Distribution
from logitstream.sampling import draw_key, row_uniforms
from logitstream.types import TargetSpec, TokenSequence
from tests.kernels import DEVICE, Build, compile_sm90, language_like

draw = pytest.importorskip("logitstream.kernels.draw")
SPECS = [
    TargetSpec(sampler="systematic", num_samples=22),
    TargetSpec(sampler="multinomial", num_samples=22, temperature=0.7),
    TargetSpec(sampler="multinomial", num_samples=22, proposal_temperature=0.8),
    TargetSpec(sampler="threshold", threshold=0.02),
    TargetSpec(sampler="top_k", top_k=16),
    TargetSpec(sampler="top_k_ghost", top_k=16, temperature=2.0),
]
Rows = list[dict[int, int]]


def named_rows(spec: TargetSpec, num_rows: int) -> tuple[Any, npt.NDArray[np.float64]]:
    """Name rows of three sequences, with gaps, and return their uniforms as the host makes them."""
    keys, sequences, rows, uniforms = [], [], [], []
    for place, names in enumerate(np.array_split(np.arange(num_rows), 3)):
        key = draw_key(spec, TokenSequence(token_ids=np.arange(place, place + 9, dtype=np.int32)), draw_set=place)
        chosen = np.sort(np.random.default_rng(place).choice(5000, size=len(names), replace=False))
        keys.append(key)
        sequences.append(np.full(len(names), place))
        rows.append(chosen)
        uniforms.append(row_uniforms(spec, key, chosen))
    on_device = [torch.from_numpy(np.concatenate(one).astype(np.int32)).to(DEVICE) for one in (sequences, rows)]
    words = torch.from_numpy(draw.key_words(keys).copy()).to(DEVICE)
    return draw.RowNames(words, *on_device), np.concatenate(uniforms)


def entries(packed: Tensor) -> Rows:
    """Return each row's counts by id; ids rise."""
    rows = []
    for ids, counts in zip(*packed.cpu().numpy(), strict=True):
        used = counts != draw.UNUSED
        assert (np.diff(ids[used]) > 0).all()
        rows.append(dict(zip(ids[used].tolist(), counts[used].tolist(), strict=True)))
    return rows


@pytest.mark.parametrize("per_row", [1, 3, 7, 50])
def test_uniforms_are_the_hosts_bit_for_bit(per_row: int) -> None:
    names, host = named_rows(TargetSpec(sampler="multinomial", num_samples=per_row), 200)
    assert np.array_equal(draw._uniforms(names, per_row, draw.launch_kernel).cpu().numpy(), host)


@pytest.mark.parametrize("sampler", ["systematic", "multinomial"])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "num_samples", "temperature"),
    [(18, 151_936, 50, 1.0), (3, 262_144, 100, 0.7), (6, 50_257, 22, 1.0), (40, 1000, 50, 2.0), (9, 130, 7, 1.0)],
)
def test_points_fall_where_the_exact_distribution_has_them(
    sampler: str, num_rows: int, vocab_size: int, num_samples: int, temperature: float
) -> None:
    logits = language_like(np.random.default_rng(vocab_size), num_rows, vocab_size)
    logits[0, -3] = 60.0  # a peak in the last block
    if vocab_size == 1000:
        logits[:, 256:512] = -torch.inf  # whole blocks without mass
        logits[:, 999] = -torch.inf
    spec = TargetSpec(sampler=sampler, num_samples=num_samples, temperature=temperature)
    names, uniforms = named_rows(spec, num_rows)
    drawn = entries(draw.draw(logits, spec, names))
    steps = np.arange(1, num_samples + 1) - uniforms if sampler == "systematic" else (1.0 - uniforms) * num_samples
    differ = 0
    for row, points in enumerate(np.sort(steps / num_samples, axis=1)):
        exact = np.cumsum(torch.softmax(logits[row].double() / temperature, 0).cpu().numpy())
        expected = np.minimum(np.searchsorted(exact, points * exact[-1]), vocab_size - 1)
        found = np.repeat(list(drawn[row]), list(drawn[row].values()))
        assert len(found) == num_samples
        moved = found != expected
        differ += moved.sum()
        low, high = np.minimum(found, expected)[moved], np.maximum(found, expected)[moved]
        assert (np.abs(exact[high - 1] - points[moved]) < 1e-6).all(), (low, high)
        assert torch.isfinite(logits[row, found]).all()
    assert differ <= max(1, num_rows * num_samples // 5000)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.sampler}-{spec.proposal_temperature}")
@pytest.mark.parametrize("vocab_size", [300, 5003])
def test_every_sampler_draws_what_the_table_draws(spec: TargetSpec, vocab_size: int) -> None:
    """Counts may move by a unit and points by an id where float32 sums differ: in few rows."""
    rng = np.random.default_rng(0)
    logits = language_like(rng, 30, vocab_size)
    logits += torch.from_numpy(rng.permuted(np.tile(np.arange(vocab_size) * 1e-2, (30, 1)), axis=1)).to(logits)
    names, uniforms = named_rows(spec, 30)
    drawn = entries(draw.draw(logits, spec, names))
    rows, ids, counts = spec.kind.draw(Distribution.of_logits_plain(logits.cpu(), spec.temperature), spec, uniforms)
    expected: Rows = [{} for _ in drawn]
    for row, token_id, count in zip(rows.tolist(), ids.tolist(), counts.tolist(), strict=True):
        expected[row][token_id] = count
    if spec.sampler.startswith("top_k"):  # which of equal logits is kept is open
        sizes = [[sorted([*row.values()] + [0] * (16 - len(row))) for row in one] for one in (drawn, expected)]
        assert np.abs(np.subtract(sizes[0], sizes[1])).max() <= 2
    else:
        assert sum(ours == theirs for ours, theirs in zip(drawn, expected, strict=True)) >= 28
    for ours, theirs in zip(drawn, expected, strict=True):
        assert abs(sum(ours.values()) - sum(theirs.values())) <= 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.sampler}-{spec.proposal_temperature}")
def test_bad_rows_are_marked_and_the_others_drawn(spec: TargetSpec) -> None:
    logits = language_like(np.random.default_rng(0), 6, 700)
    names, _ = named_rows(spec, 6)
    good = entries(draw.draw(logits, spec, names))
    logits[1, 77], logits[2, 699], logits[4] = torch.nan, torch.inf, -torch.inf
    packed = draw.draw(logits, spec, names)
    assert (packed[1, :, 0] == draw.BAD).tolist() == [False, True, True, False, True, False]
    assert entries(packed[:, [0, 3, 5]]) == [good[row] for row in (0, 3, 5)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.sampler}-{spec.proposal_temperature}")
def test_rows_of_a_wider_head_and_in_another_chunk_are_drawn_alike(spec: TargetSpec) -> None:
    wide = language_like(np.random.default_rng(0), 7, 640)
    wide[:, 603:] = 50.0
    names, _ = named_rows(spec, 7)
    later = draw.RowNames(names.keys, names.sequences[3:], names.rows[3:])
    assert entries(draw.draw(wide[:, :603], spec, names))[3:] == entries(draw.draw(wide[3:, :603].clone(), spec, later))
    assert draw.draw(wide[:0], spec, names).shape[1] == 0


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=lambda spec: f"{spec.sampler}-{spec.proposal_temperature}")
def test_the_mean_of_many_draws_is_the_distribution(spec: TargetSpec) -> None:
    """Fixed seeds; |z| < 5 over some 60 ids would fail by chance once in 30,000 runs."""
    one, num_draws = language_like(np.random.default_rng(1), 1, 400), 150
    names, _ = named_rows(spec, num_draws)
    weights = np.zeros((num_draws, 400))
    for row, drawn in enumerate(entries(draw.draw(one.expand(num_draws, -1).contiguous(), spec, names))):
        heads = sum(drawn.values()) / spec.kind.units(spec)
        tails = [token_id for token_id, count in drawn.items() if count == 0]
        for token_id, count in drawn.items():
            weights[row, token_id] = count / spec.kind.units(spec) if count else (1 - heads) / len(tails)
    exact = torch.softmax(one[0].double() / spec.temperature, 0).cpu().numpy()
    seen = exact > 1e-3
    error = weights.mean(axis=0) - exact
    noise = weights.std(axis=0)[seen] / num_draws**0.5 + 2e-3 / num_draws**0.5
    assert np.abs(error[seen] / noise).max() < 5


SIGNATURE = {
    **dict.fromkeys(("logits", "out"), "*bf16"),
    **dict.fromkeys(("maxima", "sums", "cutoffs", "peaks"), "*fp32"),
    **dict.fromkeys(("uniforms", "points", "starts", "totals", "weights", "v"), "*fp64"),
    **dict.fromkeys(("ids", "counts", "befores", "hits", "nums_points", "sequences", "rows", "units"), "*i32"),
    **dict.fromkeys(("keys", "blocks"), "*i64"),
    **dict.fromkeys(("V", "num_blocks", "num_tiles", "width", "points_width", "uniforms_width", "num_bits"), "i32"),
    **dict.fromkeys(("num_rows", "per_row", "v_stride", "grid", "limit"), "i32"),
    "stride": "i64",
    "scale": "fp32",
}
POINTERS = [name for name, kind in SIGNATURE.items() if kind.startswith("*")]
H100_BLOCKS = {"BLOCKS_2": 2048}


def test_kernels_compile_for_sm90_without_spills_and_read_the_logits_16_bytes_at_a_time() -> None:
    def build(name: str, constants: dict[str, Any], num_warps: int = 4, **types: str) -> Build:
        kernel = f"logitstream.kernels.draw_rows:{name}_kernel"
        aligned = [*POINTERS, "stride", "V"]
        return Build(
            kernel=kernel, signature=SIGNATURE | types, constants=constants, num_warps=num_warps, aligned=aligned
        )

    compiled = compile_sm90(
        [
            build("block_stats", {}),
            *(
                build("sample_rows", {**H100_BLOCKS, "SYSTEMATIC": systematic, "IS_TAIL": tail}, num_warps=8)
                for systematic, tail in ((True, False), (False, False), (True, True))
            ),
            build("totals", H100_BLOCKS),
            build("uniforms", {"ROWS": 128}, out="*fp64"),
            build("tail_stats", {}),
            build("gather_blocks", {}),
            build("round_rows", {"WIDTH_2": 128}),
        ]
    )
    assert [kernel.stack_bytes for kernel in compiled] == [0] * len(compiled)
    assert compiled[0].count(r"LDG[.].*128.*") >= 4
    assert compiled[0].registers <= 40
