"""Cutting a ragged batch into passes, against an exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from teacher_server.transformers_backend import split_by_length


def cost(passes: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(one) * max(lengths[index] for index in one) + overhead for one in passes)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(0, 50), st.integers(1, 400))
def test_every_sequence_is_in_one_pass_and_no_pass_is_too_large(lengths: list[int], overhead: int, limit: int) -> None:
    passes = split_by_length(lengths, pass_overhead_tokens=overhead, max_padded_tokens=limit)
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    for one in passes:
        assert len(one) == 1 or len(one) * max(lengths[index] for index in one) <= limit


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 40))
def test_no_cut_of_the_sorted_lengths_is_cheaper(lengths: list[int], overhead: int) -> None:
    found = split_by_length(lengths, pass_overhead_tokens=overhead, max_padded_tokens=10_000)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cheapest = min(
        cost([order[i:j] for i, j in itertools.pairwise([0, *cuts, len(order)])], lengths, overhead)
        for count in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), count)
    )
    assert cost(found, lengths, overhead) == cheapest


def test_without_overhead_only_equal_lengths_share_a_pass() -> None:
    passes = split_by_length([5, 7, 5, 7, 9], pass_overhead_tokens=0, max_padded_tokens=10_000)
    assert [len({[5, 7, 5, 7, 9][index] for index in one}) for one in passes] == [1] * len(passes)


def test_many_sequences_are_cut_quickly_and_with_little_padding() -> None:
    lengths = [1 + (index * 7919) % 512 for index in range(1000)]
    passes = split_by_length(lengths, pass_overhead_tokens=32, max_padded_tokens=8192)
    padded = sum(len(one) * max(lengths[index] for index in one) for one in passes)
    assert padded < 1.05 * sum(lengths)
