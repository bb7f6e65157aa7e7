"""What training steps are made of: tokens, waiting, decoding, computing, diagnostics, overhead; logged and exported."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitstream import metrics
from logitstream.data.documents import Batch
from logitstream.data.loss_mask import supervised_mask
from logitstream.loss import Diagnostics
from logitstream.training.checkpoints import resumed_state
from logitstream.training.distributed import of_all_processes
from logitstream.training.overhead import Overhead, OverheadMeter, Pair, StepTimes, overhead_of
from logitstream.types import TargetSpec

if TYPE_CHECKING:
    from logitstream.training.target_stream import TargetStream

OF_THE_STREAM = {
    "waiting_seconds": "waiting_seconds",
    "decoding_seconds": "decoding_seconds",
    "payload_bytes": "payload_bytes",
    "target_rows": "rows",
}
"""Names of the sums that StreamStats counts, and theirs; `rows` alone is a name of Diagnostics."""
SUMS = ("steps", "tokens", "entries", "training_seconds", *OF_THE_STREAM)
OF_THE_LOSS = (*Diagnostics._fields, "own_loss")


class StepFigures(TrainerCallback):
    """Follows the trainer through each optimizer step.

    A step's time runs from the request for its first batch to the end of its optimizer step, less what measuring the
    overhead took; evaluation, checkpoints and logging are no part of it.
    """

    def __init__(self, *, overhead_every: int) -> None:
        self.meter = OverheadMeter(every=overhead_every)
        self.stream: TargetStream | None = None
        self._seen = dict.fromkeys(OF_THE_STREAM, 0.0)
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.of_the_loss = torch.zeros(len(OF_THE_LOSS), dtype=torch.float64)
        self._logged = torch.zeros(len(SUMS) + len(OF_THE_LOSS), dtype=torch.float64)
        self._epoch = -1
        self._micro_batches = 0
        self._tokens: Tensor | int = 0
        self._began = self._micro_began = self._computed = 0.0
        self._pair: Pair | None = None
        self._measuring = 0.0
        self._spec: TargetSpec | None = None

    def follow(self, stream: TargetStream) -> None:
        """The stream that the steps to come wait for."""
        self.stream, self._seen = stream, dict.fromkeys(OF_THE_STREAM, 0.0)

    def run_state(self) -> dict[str, float]:
        """The run's sums so far, over all processes; every process calls it."""
        return sum_over_processes(self.sums)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the sums of the checkpoint, in place of this trainer's; the main process takes over all."""
        if before := resumed_state(state, self):
            self.sums = {name: before.get(name, 0.0) if state.is_world_process_zero else 0.0 for name in SUMS}
            self._logged[: len(SUMS)] = torch.tensor([before.get(name, 0.0) for name in SUMS], dtype=torch.float64)

    def begin_step(self) -> None:
        """Before the step's batches are asked for."""
        self._began = time.perf_counter()
        self._micro_batches, self._tokens = 0, 0
        self._pair, self._measuring = None, 0.0

    def begin_micro_batch(self, inputs: Batch) -> bool:
        """Whether the micro-batch is to be timed beside its cross-entropy twin."""
        self._micro_began = time.perf_counter()
        self._micro_batches += 1
        return self._micro_batches == 1 and inputs.get("targets") is not None and self.meter.is_due()

    def add_pair(self, pair: Pair) -> None:
        """The micro-batch both ways; the time since its beginning that was not its own went into measuring."""
        self._pair = pair
        self._measuring = time.perf_counter() - self._micro_began - pair.distillation.wall

    def end_micro_batch(self, inputs: Batch) -> None:
        self._tokens = self._tokens + supervised_mask(inputs).sum()
        if inputs.get("targets") is not None:
            self.sums["entries"] += inputs["targets"].num_entries
            self._spec = inputs["targets"].spec
        self._computed = time.perf_counter()

    def add_loss(self, diagnostics: Diagnostics, own_loss: Tensor) -> None:
        """What a micro-batch's forward pass saw; own_loss: its share of what the model adds to the step's loss."""
        now = torch.stack([*diagnostics, own_loss.detach().double()])
        self.of_the_loss = self.of_the_loss.to(now.device) + now

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch += 1
        metrics.STUDENT_OVERHEAD.clear()  # an epoch's overhead is what it measured itself: none until then
        metrics.STUDENT_OVERHEAD_COST.set(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        whole = now - self._began
        waiting, decoding = self._stream_seconds()
        self.meter.add(
            StepTimes(
                epoch=self._epoch,
                micro_batches=self._micro_batches,
                waiting=waiting,
                decoding=decoding,
                optimizer=now - self._computed,
                whole=whole,
                measuring=self._measuring,
                pair=self._pair,
            )
        )
        self._count(int(self._tokens), whole - self._measuring, waiting)
        if self._pair is not None:
            _export(overhead_of(self.meter.of_epoch(self._epoch)))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self.meter.of_epoch(self._epoch)
        waiting = torch.tensor([step.waiting for step in steps], device=args.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(waiting, dist.ReduceOp.MAX)
        _export(overhead_of(steps, waiting=waiting.tolist()))

    def logs(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates and diagnostics since the last call, over all processes; every process calls it.

        tokens are the run's so far; waiting_seconds and decoding_seconds too, as means over the processes. What is not
        known is left out: kl and what goes with it where no row had targets, router_loss where the student has none.
        """
        own = torch.tensor([*self.sums.values(), *self.of_the_loss.tolist()], dtype=torch.float64)
        total = accelerator.reduce(own.to(accelerator.device), "sum").cpu()
        since, self._logged = total - self._logged, total
        names = (*SUMS, *OF_THE_LOSS)
        run, last = dict(zip(names, total.tolist(), strict=True)), dict(zip(names, since.tolist(), strict=True))
        num_processes = accelerator.num_processes
        logs = {
            "tokens": run["tokens"],
            "tokens_per_second": _ratio(last["tokens"], last["training_seconds"] / num_processes),
            "waiting_seconds": run["waiting_seconds"] / num_processes,
            "decoding_seconds": run["decoding_seconds"] / num_processes,
            "queue_batches": float(self.stream.queue_depth) if self.stream is not None else 0.0,
            "entries_per_token": _ratio(last["entries"], last["tokens"]),
            "payload_bytes_per_token": _ratio(last["payload_bytes"], last["target_rows"]),
        }
        if run["own_loss"]:
            logs["router_loss"] = _ratio(last["own_loss"], last["steps"])
        logs |= diagnostic_means(last, self._spec)
        return logs | _overhead_logs(overhead_of(self.meter.of_epoch(self._epoch)))

    def _stream_seconds(self) -> tuple[float, float]:
        """Seconds of waiting and of decoding since the last step's end; adds all that the stream counts to the sums."""
        if self.stream is None:
            return 0.0, 0.0
        now = {name: float(getattr(self.stream.stats, theirs)) for name, theirs in OF_THE_STREAM.items()}
        since = {name: value - self._seen[name] for name, value in now.items()}
        self._seen = now
        for name, value in since.items():
            self.sums[name] += value
        return since["waiting_seconds"], since["decoding_seconds"]

    def _count(self, tokens: int, seconds: float, waiting: float) -> None:
        self.sums["steps"] += 1
        self.sums["tokens"] += tokens
        self.sums["training_seconds"] += seconds
        metrics.STUDENT_TOKENS.inc(tokens)
        metrics.STUDENT_STEPS.inc()
        metrics.STUDENT_COMPUTING_SECONDS.inc(max(seconds - waiting, 0.0))


def diagnostic_means(sums: dict[str, float], spec: TargetSpec | None) -> dict[str, float]:
    """Means over the rows with targets of what `Diagnostics` sums up; empty where there were none.

    spec: how the targets were drawn. `teacher_top1_agreement` is the share of rows in which the student's first choice
    is the teacher's; of sampled targets only `draw_top1_agreement` is known: with an id that was drawn most often.
    """
    if not sums["kept_rows"]:
        return {}
    is_exact = spec is not None and spec.keeps_first_choice
    agreement = {f"{'teacher' if is_exact else 'draw'}_top1_agreement": sums["agreements"] / sums["kept_rows"]}
    if is_exact and spec is not None and spec.top_k == 1:  # one id says nothing of the rest
        return agreement
    means = {"kl": sums["kl"] / sums["kept_rows"], "student_kept_mass": sums["kept_mass"] / sums["kept_rows"]}
    return means | agreement


def sum_over_processes(mine: dict[str, float]) -> dict[str, float]:
    everyone = of_all_processes(mine)
    return {name: sum(one[name] for one in everyone) for name in mine}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _export(overhead: Overhead | None) -> None:
    if overhead is None:
        return
    for part in metrics.OVERHEAD_PARTS:
        metrics.STUDENT_OVERHEAD.labels(part).set(getattr(overhead, part))
    metrics.STUDENT_OVERHEAD_COST.set(overhead.measurement)


def _overhead_logs(overhead: Overhead | None) -> dict[str, float]:
    if overhead is None:
        return {}
    return {
        "overhead_vs_cross_entropy": overhead.total,
        "overhead_vs_cross_entropy_without_waiting": overhead.without_waiting,
        "overhead_measurement": overhead.measurement,
    }
