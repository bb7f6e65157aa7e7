"""The overhead's arithmetic, on steps whose times are known."""

from __future__ import annotations

import pytest

from logitstream.training.overhead import OverheadMeter, Pair, overhead_of

STEP = {"micro_batches": 2, "waiting": 0.1, "decoding": 0.05, "optimizer": 0.2}


def pair(distillation: float, cross_entropy: float, *, wall_over_busy: float = 1.0) -> Pair:
    return (distillation / cross_entropy, cross_entropy * wall_over_busy)


def test_parts_are_ratios_to_a_cross_entropy_step() -> None:
    """Two micro-batches of 0.9 s and 0.2 s of optimizer: a cross-entropy step takes 2 s."""
    overhead = overhead_of([pair(0.95, 0.9)], **STEP)
    assert overhead["overhead_waiting"] == pytest.approx(0.1 / 2)
    assert overhead["overhead_decoding"] == pytest.approx(0.05 / 2)
    assert overhead["overhead_computing"] == pytest.approx(2 * 0.05 / 2)
    assert overhead["overhead_vs_cross_entropy"] == pytest.approx(0.05 + 0.025 + 0.05)
    assert overhead["overhead_vs_cross_entropy_without_waiting"] == pytest.approx(0.025 + 0.05)


def test_a_crowded_machine_stretches_both_passes_alike() -> None:
    """Passes that take thrice their CPU time: 10 % more work is 10 % of the passes' share, 2.7 s of 2.9 s."""
    overhead = overhead_of([pair(0.99, 0.9, wall_over_busy=3.0)], **STEP | {"micro_batches": 1})
    assert overhead["overhead_computing"] == pytest.approx(0.1 * 2.7 / 2.9)


def test_one_slow_pair_does_not_move_the_median() -> None:
    assert overhead_of([*[pair(1.0, 1.0)] * 4, pair(9.0, 1.0)], **STEP)["overhead_computing"] == 0


def test_nothing_measured_is_no_overhead() -> None:
    assert overhead_of([], **STEP) == {}


def test_every_nth_step_is_measured_after_the_warm_up() -> None:
    meter, due = OverheadMeter(every=3), []
    for step in range(10):
        if meter.is_due():
            due.append(step)
        meter.num_steps += 1
    assert due == [2, 5, 8]
    assert not any(OverheadMeter(every=0).is_due() for _ in range(5))
