"""The run's figures, from the same metrics that Prometheus sees: in all and by epoch, over every process."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitstream import metrics
from logitstream.training.checkpoints import resumed_state
from logitstream.training.distributed import of_all_processes

COUNTS = {
    "tokens": "logitstream_student_tokens_total",
    "received_bytes": "logitstream_student_received_bytes_total",
    "entries": "logitstream_student_entries_total",
    "rows": "logitstream_student_target_rows_total",
    "cache_hits": "logitstream_cache_hits_total",
}
SECONDS = {
    "waiting_seconds": "logitstream_student_waiting_seconds_total",
    "decoding_seconds": "logitstream_student_decoding_seconds_total",
    "computing_seconds": "logitstream_student_computing_seconds_total",
}
OVERHEAD = "logitstream_student_overhead_vs_cross_entropy_ratio"


class RunReport(TrainerCallback):
    """Reads the counters at each epoch's end; add it after the trainer's own callbacks.

    A resumed run goes on from what its checkpoint's `run_state` holds, so that its figures are the whole run's.
    """

    def __init__(self) -> None:
        self.first_step = 0
        self.epochs: list[dict[str, float]] = []
        """Each finished epoch's sums and overheads, over all processes."""
        self._before: dict[str, float] = {}
        """The same of the part of the current epoch that came before the run was resumed."""
        self._mark: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step, self._mark = state.global_step, _read()
        resumed = resumed_state(state, self)
        self.epochs, self._before = list(resumed.get("epochs", [])), dict(resumed.get("current", {}))
        if self._before and float(state.epoch or 0).is_integer():  # saved between two epochs
            if len(self.epochs) < int(state.epoch or 0):  # before the end of the first was noted
                self.epochs.append(self._before)
            self._before = {}

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epochs.append(self._current())
        self._before, self._mark = {}, _read()

    def run_state(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "current": self._current()}

    def _current(self) -> dict[str, float]:
        """Of the epoch so far: counts are sums over the processes, seconds and ratios means; every process calls it."""
        sums = _over_processes({name: value - self._mark[name] for name, value in _read().items()})
        whole = {name: value + self._before.get(name, 0.0) for name, value in sums.items()}
        return self._before | whole | _over_processes(_read_overhead())

    def figures(self) -> dict[str, Any]:
        """Counts are sums over the processes, seconds and ratios are means.

        Overheads are those of the last epoch that measured one and received targets from a teacher and, as `offline_…`,
        of the last one that measured one and needed none; `replay_over_online_throughput` compares the last epoch of
        either kind. resumed_at_step: where a resumed run went on; its figures are the whole run's.
        """
        resumed = {"resumed_at_step": self.first_step} if self.first_step else {}
        epochs: list[dict[str, Any]] = [sums | _rates(sums) for sums in self.epochs]
        if not epochs:
            return resumed | {"epochs": []}
        total = {name: sum(epoch[name] for epoch in epochs) for name in (*COUNTS, *SECONDS)}
        report = resumed | _rates(total) | {"tokens_trained": int(total["tokens"])}
        report["seconds_waiting_for_targets"] = total["waiting_seconds"]
        online = [epoch for epoch in epochs if epoch["received_bytes"]]
        offline = [epoch for epoch in epochs if not epoch["received_bytes"]]
        report |= _last_overhead(online)
        report |= {f"offline_{name}": value for name, value in _last_overhead(offline).items()}
        if online and offline:
            report["replay_over_online_throughput"] = (
                offline[-1]["student_tokens_per_second"] / online[-1]["student_tokens_per_second"]
            )
        return report | {"epochs": epochs}


def _last_overhead(epochs: list[dict[str, Any]]) -> dict[str, float]:
    """Of the last epoch that measured one; empty where none did."""
    measured = [{name: value for name, value in epoch.items() if name.startswith("overhead_")} for epoch in epochs]
    return next((overhead for overhead in reversed(measured) if overhead), {})


def _rates(sums: dict[str, float]) -> dict[str, Any]:
    """Bytes are over rows received, entries over tokens trained on; None where there were none."""
    return {
        "student_tokens_per_second": sums["tokens"] / (sums["waiting_seconds"] + sums["computing_seconds"]),
        "bytes_per_token": sums["received_bytes"] / sums["rows"] if sums["rows"] else None,
        "entries_per_token": sums["entries"] / sums["tokens"] if sums["tokens"] else None,
    }


def _read() -> dict[str, float]:
    return {name: metrics.value(counter) or 0.0 for name, counter in (COUNTS | SECONDS).items()}


def _read_overhead() -> dict[str, float]:
    """The exported ratios under the report's names; empty where none was measured."""
    parts = {part: metrics.value(OVERHEAD, part=part) for part in metrics.OVERHEAD_PARTS}
    known = {part: value for part, value in parts.items() if value is not None}
    if len(known) < len(parts):
        return {}
    named = {f"overhead_{part}": known[part] for part in ("waiting", "decoding", "computing")}
    return named | {
        "overhead_vs_cross_entropy": known["total"],
        "overhead_vs_cross_entropy_without_waiting": known["total"] - known["waiting"],
    }


def _over_processes(mine: dict[str, float]) -> dict[str, float]:
    everyone = of_all_processes(mine)
    return {name: sum(one[name] for one in everyone) / (1 if name in COUNTS else len(everyone)) for name in mine}
