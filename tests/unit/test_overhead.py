"""The overhead's arithmetic, on steps whose times are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from logitstream.training.overhead import Overhead, OverheadMeter, Pair, StepTimes

STEP = StepTimes(micro_batches=2, waiting=0.1, decoding=0.05, optimizer=0.2, whole=3.0)


def pair(distillation: float, cross_entropy: float, *, wall_over_busy: float = 1.0) -> Pair:
    return Pair(ratio=distillation / cross_entropy, cross_entropy_seconds=cross_entropy * wall_over_busy)


def overhead_of(steps: Sequence[StepTimes], *, waiting: Sequence[float] | None = None) -> Overhead | None:
    meter = OverheadMeter(every=1)
    for step in steps:
        meter.add(step)
    return meter.overhead(waiting=waiting)


def test_parts_are_ratios_to_a_cross_entropy_step() -> None:
    """Two micro-batches of 0.9 s and 0.2 s of optimizer: a cross-entropy step takes 2 s."""
    measured = replace(STEP, pair=pair(0.95, 0.9), measuring=0.9, whole=3.9)
    overhead = overhead_of([STEP, measured, replace(STEP, waiting=0.4)])
    assert overhead is not None
    assert overhead.waiting == pytest.approx(0.2 / 2)
    assert overhead.decoding == pytest.approx(0.05 / 2)
    assert overhead.computing == pytest.approx(2 * 0.05 / 2)
    assert overhead.total == pytest.approx(0.1 + 0.025 + 0.05)
    assert overhead.logs()["overhead_vs_cross_entropy_without_waiting"] == pytest.approx(0.025 + 0.05)
    assert overhead.measurement == pytest.approx(0.9 / 9.9)


def test_a_crowded_machine_stretches_both_passes_alike() -> None:
    """Passes that take thrice their CPU time: 10 % more work is 10 % of the passes' share, 2.7 s of 2.9 s."""
    measured = replace(STEP, micro_batches=1, pair=pair(0.99, 0.9, wall_over_busy=3.0))
    overhead = overhead_of([measured])
    assert overhead is not None
    assert overhead.computing == pytest.approx(0.1 * 2.7 / 2.9)


def test_one_slow_pair_does_not_move_the_median() -> None:
    steps = [replace(STEP, pair=pair(1.0, 1.0))] * 4 + [replace(STEP, pair=pair(9.0, 1.0))]
    overhead = overhead_of(steps)
    assert overhead is not None
    assert overhead.computing == 0


def test_the_slowest_process_decides_how_long_a_step_waits() -> None:
    measured = replace(STEP, pair=pair(0.9, 0.9))
    overhead = overhead_of([measured], waiting=[0.6])
    assert overhead is not None
    assert overhead.waiting == pytest.approx(0.3)


def test_nothing_measured_is_no_overhead() -> None:
    assert overhead_of([STEP]) is None


def test_every_nth_step_is_measured_after_the_warm_up() -> None:
    meter, due = OverheadMeter(every=3), []
    for step in range(10):
        if meter.is_due():
            due.append(step)
        meter.add(STEP)
    assert due == [2, 5, 8]
    assert not any(OverheadMeter(every=0).is_due() for _ in range(5))
