"""Processes that a launcher started and that do not know of each other are refused."""

from __future__ import annotations

import pytest

from logitstream.errors import RanksDiffer
from logitstream.training.distributed import expect_all_processes


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_all_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect_all_processes(2)
    with pytest.raises(RanksDiffer, match=r"2 processes were started .* ACCELERATE_USE_CPU=true"):
        expect_all_processes(1)
