"""What distillation costs over cross-entropy, measured in the same run: the same batch, fused head and step both ways.

At every n-th optimizer step the first micro-batch's forward and backward pass is timed twice, with its targets and as
plain cross-entropy, in turn first and second; `measuring` takes every trace of the cross-entropy pass back, so the
student trains as if nothing had been measured. Clipping, optimizer and scheduler are timed once and belong
to both. Per optimizer step of n micro-batches, in medians over the measured steps:

    cross-entropy step = n·(forward + backward without targets) + optimizer
    computing          = n·(forward + backward without targets)·(median of the pairs' ratios − 1)
    waiting, decoding  = their means over all steps: waiting is what the step stood still for, decoding its CPU seconds,
                         counted whole although it runs in a thread beside the step

and the figures are these over the cross-entropy step. On a CPU a pair's ratio is one of the training thread's CPU time:
it takes part in all of a pass's work, and other processes on the same cores (the teacher's, another worker's) disturb
it little, where they make single wall times differ by a factor of two. Measuring takes time in which targets arrive: it
can hide at most its own share (`measurement`) of waiting. Under data parallelism every process measures at the same
step, from a barrier on, and a step waits as long as the process that waits longest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

MAX_STEPS = 10_000
"""Steps that are remembered: a longer run's figures are those of its last ones."""
WARM_UP_STEPS = 2
"""First steps that are never measured: they allocate memory and start threads. The first measured step rehearses its
cross-entropy pass once, for the same reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """One forward and backward pass: seconds by the clock, and of the training thread (a CPU's) or again the clock."""

    wall: float
    busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One micro-batch with its targets and as plain cross-entropy."""

    distillation: PassTime
    cross_entropy: PassTime


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one optimizer step. pair: its measured micro-batch both ways, None if it was not measured."""

    epoch: int
    micro_batches: int
    waiting: float
    decoding: float
    optimizer: float
    whole: float
    measuring: float = 0.0
    pair: Pair | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Extra time of a distillation step over a cross-entropy step, as ratios; measurement is over the run's time."""

    waiting: float
    decoding: float
    computing: float
    measurement: float
    num_measured: int

    @property
    def without_waiting(self) -> float:
        return self.decoding + self.computing

    @property
    def total(self) -> float:
        return self.waiting + self.without_waiting


def overhead_of(steps: Sequence[StepTimes], *, waiting: Sequence[float] | None = None) -> Overhead | None:
    """The overhead that some steps show; None where none of them was measured.

    waiting: seconds each step stood still for the slowest process; without it, this process's own.
    """
    measured = [(step.micro_batches, step.pair) for step in steps if step.pair is not None]
    if not measured:
        return None
    passes = median(n * pair.cross_entropy.wall for n, pair in measured)
    cross_entropy_step = passes + median(step.optimizer for step in steps)
    ratio = median(pair.distillation.busy / pair.cross_entropy.busy for _, pair in measured)
    whole = math.fsum(step.whole for step in steps)
    return Overhead(
        waiting=fmean(waiting or [step.waiting for step in steps]) / cross_entropy_step,
        decoding=fmean(step.decoding for step in steps) / cross_entropy_step,
        computing=passes * (ratio - 1) / cross_entropy_step,
        measurement=math.fsum(step.measuring for step in steps) / whole if whole else 0.0,
        num_measured=len(measured),
    )


class OverheadMeter:
    """Remembers the steps of a run and says which are to be measured; every=0: none."""

    def __init__(self, *, every: int) -> None:
        if every < 0:
            raise ValueError(f"overhead_every must not be negative, got {every}")
        self.every = every
        self.steps: deque[StepTimes] = deque(maxlen=MAX_STEPS)
        self.num_measured = 0
        self._num_steps = 0

    def is_due(self) -> bool:
        """Whether the step that begins is to be measured: the same answer on every process."""
        past_warm_up = self._num_steps - WARM_UP_STEPS
        return self.every > 0 and past_warm_up >= 0 and past_warm_up % self.every == 0

    def add(self, step: StepTimes) -> None:
        self._num_steps += 1
        self.num_measured += step.pair is not None
        self.steps.append(step)

    def of_epoch(self, epoch: int) -> list[StepTimes]:
        """The remembered steps of one epoch."""
        return [step for step in self.steps if step.epoch == epoch]
