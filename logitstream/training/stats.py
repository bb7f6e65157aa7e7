"""The statistics of a run, counted in one place for logs, progress.jsonl, Prometheus, checkpoints and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from logitstream import metrics
from logitstream.data.documents import Batch
from logitstream.loss import Diagnostics
from logitstream.training.checkpoints import resumed_state
from logitstream.training.distributed import of_all_processes
from logitstream.training.overhead import OverheadMeter, overhead_of
from logitstream.types import TargetSpec

if TYPE_CHECKING:
    from logitstream.training.target_stream import TargetStream

OF_THE_STREAM = {
    "waiting_seconds": "waiting_seconds",
    "decoding_seconds": "decoding_seconds",
    "payload_bytes": "payload_bytes",
    "target_rows": "rows",
    "received_bytes": "received_bytes",
    "received_rows": "received_rows",
    "cache_hits": "cached_sequences",
}
"""Our names for what StreamStats counts, and its own."""
SECONDS = ("computing_seconds", "optimizer_seconds", "measuring_seconds")
COUNTED = ("steps", "micro_batches", "tokens", "entries", *SECONDS, *OF_THE_STREAM)
OF_THE_LOSS = (*Diagnostics._fields, "own_loss")
MEANS = ("steps", "micro_batches", "own_loss", "seconds", "overhead")
"""Counts with one of these in their name are alike in every process: their mean is the run's, not their sum."""

Counts = dict[str, float]


class RunStats(TrainerCallback):
    """Follows the trainer through each optimizer step and counts what it sees, by epoch, over all parts of a run.

    A step's time runs from the request for its first batch to the end of its optimizer step, without the time spent
    measuring the overhead; evaluation, checkpoints and logging are not part of it.

    epochs: what this process has counted in each epoch, and the epoch's overhead. The main process takes over what all
        had counted before a checkpoint that the run goes on from.
    """

    def __init__(self, *, overhead_every: int) -> None:
        self.meter = OverheadMeter(every=overhead_every)
        self.stream: TargetStream | None = None
        self.epochs: list[Counts] = []
        self.first_step = 0
        self.step: dict[str, Any] = {}
        """Counts of the optimizer step that has begun."""
        self._observed = dict.fromkeys(OF_THE_STREAM, 0.0)
        self._of_the_loss = torch.zeros(len(OF_THE_LOSS), dtype=torch.float64)
        self._logged: Counts = {}
        self._run_began = self._step_began = self._pass_ended = 0.0
        self._spec: TargetSpec | None = None

    def follow(self, stream: TargetStream) -> None:
        """Count what this new stream counts."""
        self.stream, self._observed = stream, dict.fromkeys(OF_THE_STREAM, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self._run_began = state.global_step, time.perf_counter()
        before = resumed_state(state).get("epochs", [])
        self.epochs = [
            {name: value if state.is_world_process_zero or _is_mean(name) else 0.0 for name, value in epoch.items()}
            for epoch in before
        ]
        self._of_the_loss = torch.zeros_like(self._of_the_loss)
        self._logged = total_of(before)

    def run_state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; every process calls it."""
        epochs = self.of_all_processes()
        return {"tokens": total_of(epochs)["tokens"], "epochs": epochs}

    def of_all_processes(self) -> list[Counts]:
        """Return each epoch's counts summed over all processes, of seconds and ratios the means; each calls it."""
        return [_merged(parts) for parts in zip(*of_all_processes(self.epochs), strict=True)]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        while len(self.epochs) <= int(state.epoch or 0):
            self.epochs.append(dict.fromkeys(COUNTED, 0.0))
        self.meter.pairs.clear()
        metrics.STUDENT_OVERHEAD.clear()  # an epoch has no overhead until it has measured one itself

    def begin_step(self) -> None:
        """Note the time before the step's batches are asked for."""
        self._step_began = time.perf_counter()
        self.step = {"steps": 1, "micro_batches": 0, "tokens": 0, "entries": 0, "measuring_seconds": 0.0}

    def end_pass(self, batch: Batch) -> None:
        """Count a micro-batch after its backward pass."""
        self._pass_ended = time.perf_counter()
        self.step["micro_batches"] += 1
        if (targets := batch.get("targets")) is not None:
            self.step["entries"] += targets.num_entries
            self._spec = targets.spec

    def add_loss(self, diagnostics: Diagnostics, own_loss: Tensor) -> None:
        """Add a micro-batch's diagnostics; own_loss: its share of what the model adds to the step's loss."""
        if not self.meter.is_undoing:
            now = torch.stack([*diagnostics, own_loss.detach().double()])
            self._of_the_loss = self._of_the_loss.to(now.device) + now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, seen, epoch = time.perf_counter(), self._observe() | self.step, self.epochs[-1]
        seen["tokens"] = int(seen["tokens"])  # counted by the device until now
        seen["optimizer_seconds"] = now - self._pass_ended
        whole = now - self._step_began - seen["measuring_seconds"]
        seen["computing_seconds"] = max(whole - seen["waiting_seconds"], 0.0)
        for name, value in seen.items():
            epoch[name] += value
        metrics.STUDENT_TOKENS.inc(seen["tokens"])
        metrics.STUDENT_STEPS.inc()
        metrics.STUDENT_COMPUTING_SECONDS.inc(seen["computing_seconds"])
        self.meter.num_steps += 1
        if seen["measuring_seconds"]:
            self._note_overhead(epoch["waiting_seconds"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in self._observe().items():
            self.epochs[-1][name] += value
        self._note_overhead(max(of_all_processes(self.epochs[-1]["waiting_seconds"])))

    def _note_overhead(self, waiting_seconds: float) -> None:
        """Note and export the epoch's overhead so far, if a step was measured; waiting_seconds: of all its steps."""
        epoch = self.epochs[-1]
        found = overhead_of(
            self.meter.pairs,
            micro_batches=epoch["micro_batches"],
            waiting=waiting_seconds,
            decoding=epoch["decoding_seconds"],
            optimizer=epoch["optimizer_seconds"],
        )
        epoch |= found
        for part in metrics.OVERHEAD_PARTS if found else ():
            name = "overhead_vs_cross_entropy" if part == "total" else f"overhead_{part}"
            metrics.STUDENT_OVERHEAD.labels(part).set(found[name])

    def logs(self, state: TrainerState) -> Counts:
        """Return rates and diagnostics since the last call, over all processes; every process calls it.

        tokens are the run's so far; waiting_seconds and decoding_seconds too, as means over the processes. What is not
        known is left out: kl and its companions if no row had targets, router_loss if the student has none.
        """
        own = total_of(self.epochs) | dict(zip(OF_THE_LOSS, self._of_the_loss.tolist(), strict=True))
        run = _merged(of_all_processes(own))
        last = {name: value - self._logged.get(name, 0.0) for name, value in run.items()}
        self._logged = run
        seconds_a_step = (time.perf_counter() - self._run_began) / max(state.global_step - self.first_step, 1)
        logs = {
            "tokens": run["tokens"],
            "tokens_per_second": _ratio(last["tokens"], last["waiting_seconds"] + last["computing_seconds"]),
            "waiting_seconds": run["waiting_seconds"],
            "decoding_seconds": run["decoding_seconds"],
            "queue_batches": float(self.stream.queue_depth) if self.stream is not None else 0.0,
            "entries_per_token": _ratio(last["entries"], last["tokens"]),
            "payload_bytes_per_token": _ratio(last["payload_bytes"], last["target_rows"]),
            "seconds_left": seconds_a_step * (state.max_steps - state.global_step),
        }
        if run["own_loss"]:
            logs["router_loss"] = _ratio(last["own_loss"], last["steps"])
        return logs | diagnostic_means(last, self._spec) | overhead_in(self.epochs[-1])

    def _observe(self) -> Counts:
        """Return what the stream has counted since the last call."""
        before = self._observed
        if self.stream is not None:
            stats = self.stream.stats
            self._observed = {ours: float(getattr(stats, theirs)) for ours, theirs in OF_THE_STREAM.items()}
        return {name: value - before[name] for name, value in self._observed.items()}


def heldout_means(seen: Sequence[tuple[Diagnostics, TargetSpec | None]]) -> Counts:
    """Return means over an evaluation's batches in all processes, each of which calls it.

    seen: each batch's sums, and how its targets were drawn. loss: cross-entropy per label, NaN if there was none.
    """
    sums = torch.zeros(len(Diagnostics._fields), dtype=torch.float64)
    for diagnostics, _ in seen:
        sums = sums + torch.stack(diagnostics).cpu()
    everyone = of_all_processes((sums.tolist(), next((spec for _, spec in seen if spec is not None), None)))
    total = _merged([dict(zip(Diagnostics._fields, own, strict=True)) for own, _ in everyone])
    loss = total["cross_entropy"] / total["labelled_rows"] if total["labelled_rows"] else math.nan
    return {"loss": loss} | diagnostic_means(total, next((spec for _, spec in everyone if spec is not None), None))


def diagnostic_means(sums: Counts, spec: TargetSpec | None) -> Counts:
    """Return the means of a sum of `Diagnostics` over the rows with targets; empty without any.

    spec: how the targets were drawn. `teacher_top1_agreement` is the share of rows in which the student's first choice
    is the teacher's; sampled targets tell only `draw_top1_agreement`, with an id that was drawn most often.
    """
    if not sums["kept_rows"]:
        return {}
    is_exact = spec is not None and not spec.kind.is_unbiased
    agreement = {f"{'teacher' if is_exact else 'draw'}_top1_agreement": sums["agreements"] / sums["kept_rows"]}
    if is_exact and spec is not None and spec.top_k == 1:  # one id says nothing about the others
        return agreement
    means = {"kl": sums["kl"] / sums["kept_rows"], "student_kept_mass": sums["kept_mass"] / sums["kept_rows"]}
    return means | agreement


def _is_mean(name: str) -> bool:
    return any(word in name for word in MEANS)


def _merged(everyone: Sequence[Counts]) -> Counts:
    """Return the sums over processes; the means of what is alike in each, of seconds and of ratios."""
    found: Counts = {}
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [one[name] for one in everyone if name in one]
        found[name] = sum(values) / (len(values) if _is_mean(name) else 1)
    return found


def total_of(epochs: Sequence[Counts]) -> Counts:
    return {name: sum(epoch[name] for epoch in epochs) for name in COUNTED}


def overhead_in(epoch: Counts) -> Counts:
    return {name: value for name, value in epoch.items() if name.startswith("overhead_")}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
