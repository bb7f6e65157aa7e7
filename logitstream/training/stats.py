"""The statistics of a run, counted in one place for logs, progress.jsonl, Prometheus, checkpoints and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from logitstream import metrics
from logitstream.data.documents import Batch
from logitstream.data.loss_mask import supervised_mask
from logitstream.loss import Diagnostics
from logitstream.training.checkpoints import resumed_state
from logitstream.training.distributed import of_all_processes
from logitstream.training.overhead import Overhead, OverheadMeter, Pair, StepTimes
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
SUMS = ("steps", "tokens", "entries", "computing_seconds", *OF_THE_STREAM)
OF_THE_LOSS = (*Diagnostics._fields, "own_loss")


class RunStats(TrainerCallback):
    """Follows the trainer through each optimizer step and sums up what it sees, over all epochs and resumed runs.

    A step's time runs from the request for its first batch to the end of its optimizer step, without the time spent
    measuring the overhead; evaluation, checkpoints and logging are not part of it.

    sums: of this process; a resumed run goes on from the checkpoint's, which the main process takes over.
    epochs: each finished epoch's sums over all processes, its overhead among them; seconds and ratios are means.
    """

    def __init__(self, *, overhead_every: int) -> None:
        self.meter = OverheadMeter(every=overhead_every)
        self.stream: TargetStream | None = None
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.epochs: list[dict[str, float]] = []
        self.first_step = 0
        self._epoch_start = dict(self.sums)
        self._observed = dict.fromkeys(OF_THE_STREAM, 0.0)
        self._of_the_loss = torch.zeros(len(OF_THE_LOSS), dtype=torch.float64)
        self._logged = torch.zeros(len(SUMS) + len(OF_THE_LOSS), dtype=torch.float64)
        self._began = 0.0
        self._step = StepTimes()
        self._spec: TargetSpec | None = None

    def follow(self, stream: TargetStream) -> None:
        """Count what this new stream counts."""
        self.stream, self._observed = stream, dict.fromkeys(OF_THE_STREAM, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self._began = state.global_step, time.perf_counter()
        if not (before := resumed_state(state)):
            self.epochs, self._epoch_start = [], dict(self.sums)
            return
        is_main = state.is_world_process_zero
        self.sums, self._epoch_start = (
            {name: before[part][name] if is_main else 0.0 for name in SUMS} for part in ("sums", "epoch_start")
        )
        self.epochs = list(before["epochs"])
        self._logged[: len(SUMS)] = torch.tensor([before["sums"][name] for name in SUMS], dtype=torch.float64)
        if float(state.epoch or 0).is_integer() and len(self.epochs) < int(state.epoch or 0):
            self._end_epoch(before["overhead"])  # saved after the epoch's last step, before its end was noted

    def run_state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; every process calls it."""
        everyone = of_all_processes((self.sums, self._epoch_start))
        sums, start = ({name: sum(one[part][name] for one in everyone) for name in SUMS} for part in (0, 1))
        return {"sums": sums, "epoch_start": start, "epochs": self.epochs, "overhead": _logs(self.meter.overhead())}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.steps.clear()
        metrics.STUDENT_OVERHEAD.clear()  # an epoch has no overhead until it has measured one itself
        metrics.STUDENT_OVERHEAD_COST.set(0)

    def begin_step(self) -> None:
        """Note the time before the step's batches are asked for."""
        self._step = StepTimes(began=time.perf_counter())

    def is_due(self, inputs: Batch) -> bool:
        """Say if the micro-batch that has just begun is to be measured."""
        return self._step.micro_batches == 1 and inputs.get("targets") is not None and self.meter.is_due()

    @contextmanager
    def micro_batch(self, inputs: Batch) -> Iterator[None]:
        """Count a micro-batch around its forward and backward pass."""
        self._step.micro_batches += 1
        yield
        self._step.tokens = self._step.tokens + supervised_mask(inputs).sum()
        if inputs.get("targets") is not None:
            self.sums["entries"] += inputs["targets"].num_entries
            self._spec = inputs["targets"].spec
        self._step.computed = time.perf_counter()

    def add_pair(self, pair: Pair, *, seconds: float) -> None:
        """Add a measured micro-batch; seconds: what measuring took beside the pass that is trained on."""
        self._step.pair, self._step.measuring = pair, seconds

    def add_loss(self, diagnostics: Diagnostics, own_loss: Tensor) -> None:
        """Add a micro-batch's diagnostics; own_loss: its share of what the model adds to the step's loss."""
        now = torch.stack([*diagnostics, own_loss.detach().double()])
        self._of_the_loss = self._of_the_loss.to(now.device) + now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, step, since = time.perf_counter(), self._step, self._observe()
        step.waiting, step.decoding = since["waiting_seconds"], since["decoding_seconds"]
        step.optimizer, step.whole = now - step.computed, now - step.began
        self.meter.add(step)
        step.tokens = tokens = int(step.tokens)
        computing = max(step.whole - step.measuring - step.waiting, 0.0)
        self._add(since | {"steps": 1, "tokens": tokens, "computing_seconds": computing})
        metrics.STUDENT_TOKENS.inc(tokens)
        metrics.STUDENT_STEPS.inc()
        metrics.STUDENT_COMPUTING_SECONDS.inc(computing)
        if step.pair is not None:
            _export(self.meter.overhead())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        everyones = of_all_processes([step.waiting for step in self.meter.steps])
        overhead = self.meter.overhead(waiting=[max(waiting) for waiting in zip(*everyones, strict=True)])
        _export(overhead)
        self._add(self._observe())
        self._end_epoch(_logs(overhead))

    def _end_epoch(self, overhead: dict[str, float]) -> None:
        """Note the epoch's sums over all processes; every process calls it."""
        since = {name: value - self._epoch_start[name] for name, value in self.sums.items()}
        everyone = of_all_processes((since, overhead))
        sums = {name: sum(mine[name] for mine, _ in everyone) for name in SUMS}
        means = {name: sum(mine[name] for mine, _ in everyone) for name in SUMS if name.endswith("_seconds")}
        means |= {name: sum(ratios[name] for _, ratios in everyone) for name in everyone[0][1]}
        self.epochs.append(sums | {name: value / len(everyone) for name, value in means.items()})
        self._epoch_start = dict(self.sums)

    def logs(self, accelerator: Accelerator, state: TrainerState) -> dict[str, float]:
        """Return rates and diagnostics since the last call, over all processes; every process calls it.

        tokens are the run's so far; waiting_seconds and decoding_seconds too, as means over the processes. What is not
        known is left out: kl and its companions if no row had targets, router_loss if the student has none.
        """
        own = torch.tensor([*self.sums.values(), *self._of_the_loss.tolist()], dtype=torch.float64)
        total = accelerator.reduce(own.to(accelerator.device), "sum").cpu()
        since, self._logged = total - self._logged, total
        names, num_processes = (*SUMS, *OF_THE_LOSS), accelerator.num_processes
        run, last = (dict(zip(names, sums.tolist(), strict=True)) for sums in (total, since))
        seconds_a_step = (time.perf_counter() - self._began) / max(state.global_step - self.first_step, 1)
        logs = {
            "tokens": run["tokens"],
            "tokens_per_second": _ratio(
                last["tokens"], (last["waiting_seconds"] + last["computing_seconds"]) / num_processes
            ),
            "waiting_seconds": run["waiting_seconds"] / num_processes,
            "decoding_seconds": run["decoding_seconds"] / num_processes,
            "queue_batches": float(self.stream.queue_depth) if self.stream is not None else 0.0,
            "entries_per_token": _ratio(last["entries"], last["tokens"]),
            "payload_bytes_per_token": _ratio(last["payload_bytes"], last["target_rows"]),
            "seconds_left": seconds_a_step * (state.max_steps - state.global_step),
        }
        if run["own_loss"]:
            logs["router_loss"] = _ratio(last["own_loss"], last["steps"])
        return logs | diagnostic_means(last, self._spec) | _logs(self.meter.overhead())

    def _observe(self) -> dict[str, float]:
        """Return what the stream has counted since the last call."""
        before = self._observed
        if self.stream is not None:
            stats = self.stream.stats
            self._observed = {ours: float(getattr(stats, theirs)) for ours, theirs in OF_THE_STREAM.items()}
        return {name: value - before[name] for name, value in self._observed.items()}

    def _add(self, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            self.sums[name] += value


class HeldOutStats:
    """Sums of Diagnostics over one evaluation's batches in this process."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(Diagnostics._fields), dtype=torch.float64)
        self.spec: TargetSpec | None = None

    def add(self, seen: Diagnostics, spec: TargetSpec | None) -> None:
        """Add a batch; spec: of its targets, None if it has none."""
        self.sums = self.sums + torch.stack(seen).cpu()
        self.spec = self.spec or spec

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return means over all processes; each calls it. loss: cross-entropy per label, NaN if there was none."""
        total = accelerator.reduce(self.sums.to(accelerator.device), "sum").tolist()
        sums = dict(zip(Diagnostics._fields, total, strict=True))
        loss = sums["cross_entropy"] / sums["labelled_rows"] if sums["labelled_rows"] else math.nan
        spec = next((one for one in of_all_processes(self.spec) if one is not None), None)  # some may have had none
        return {"loss": loss} | diagnostic_means(sums, spec)


def diagnostic_means(sums: dict[str, float], spec: TargetSpec | None) -> dict[str, float]:
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


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _logs(overhead: Overhead | None) -> dict[str, float]:
    return overhead.logs() if overhead else {}


def _export(overhead: Overhead | None) -> None:
    if overhead is None:
        return
    for part in metrics.OVERHEAD_PARTS:
        metrics.STUDENT_OVERHEAD.labels(part).set(getattr(overhead, part))
    metrics.STUDENT_OVERHEAD_COST.set(overhead.measurement)
