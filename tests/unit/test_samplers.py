"""A sampler is one row of one table: nothing else knows its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from logitstream.codec import decode, encode
from logitstream.rpc.convert import spec_from_message, spec_to_message
from logitstream.samplers import SAMPLERS, Entries, Float64s, Sampler
from logitstream.sampling import sample
from logitstream.types import TargetSpec, TokenSequence

ROOT = Path(__file__).parents[2]
CHOOSERS = {"logitstream/types.py", "logitstream/samplers.py", "logitstream/training/first_choices.py"}
"""The table, the spec's default, and a caller that wants the teacher's most likely id."""


def test_no_other_module_names_a_sampler() -> None:
    """Field names such as top_k and threshold are no sampler names, so those two are not looked for."""
    names = SAMPLERS.keys() - {"top_k", "threshold", "full"}
    for folder in ("logitstream", "teacher_server"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            if str(path.relative_to(ROOT)) not in CHOOSERS:
                assert not names & {text for text in texts if isinstance(text, str)}, path


@pytest.fixture
def first_ids() -> Iterator[Sampler]:
    """A row that keeps the first top_k ids, each with the same weight."""

    def draw(distribution: object, spec: TargetSpec, uniforms: Float64s) -> Entries:
        rows, ids = (index.ravel() for index in np.indices((len(uniforms), spec.top_k)))
        return rows, ids, np.ones_like(ids)

    sampler = Sampler(
        name="first_ids",
        size_field="top_k",
        units=lambda spec: spec.top_k,
        uniforms=lambda spec: 0,
        entries=lambda spec, vocab_size: min(spec.top_k, vocab_size),
        draw=draw,
        is_unbiased=False,
    )
    SAMPLERS[sampler.name] = sampler
    yield sampler
    del SAMPLERS[sampler.name]


def test_a_row_more_is_a_sampler_more(first_ids: Sampler) -> None:
    spec = TargetSpec(sampler="first_ids", top_k=3)
    assert spec_from_message(spec_to_message(spec)) == spec == TargetSpec.from_canonical(spec.canonical())
    assert spec.canonical().keys() == {"sampler", "top_k", "temperature", "seed", "codec_version"}
    targets = sample(torch.randn(4, 100), spec, TokenSequence(token_ids=np.arange(4, dtype=np.int32)))
    received = decode(encode(targets), spec=spec, vocab_size=100, num_rows=4)
    assert received.token_ids.tolist() == [0, 1, 2] * 4
    np.testing.assert_allclose(received.weights(), 1 / 3)
