"""One process of a student's run (under torchrun one of several): plan, build, train, report."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from logitstream import metrics
from logitstream.cache.disk import from_disk
from logitstream.client.access import check_access
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.data.batches import split_batch
from logitstream.data.corpus import CacheDataset, collate, load_sequences
from logitstream.data.student_limits import StudentLimits
from logitstream.errors import DiskHangs, LogitstreamError
from logitstream.files import naming, refuse_missing_folder, write_whole
from logitstream.tokenizer import Vocabulary, load_tokenizer
from logitstream.training.checkpoints import STAGING, choose_checkpoint
from logitstream.training.distributed import agree_on_teacher, expected_teacher, of_main_process, open_agreed_cache
from logitstream.training.first_choices import SPEC as FIRST_CHOICES_SPEC
from logitstream.training.first_choices import FirstChoices
from logitstream.training.report import ProgressDisplay, report
from logitstream.training.resumable import Stopped
from logitstream.training.split import split_cache, split_text
from logitstream.training.target_cache import TargetCache, may_hold_targets, open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import TargetSpec
from student_worker.announcing import warn_of_refusals, what_came_of_it, what_runs
from student_worker.config import StudentConfig
from student_worker.run_folder import locked
from student_worker.run_plan import RunPlan, make_plan, write_resolved


def run(config: StudentConfig, arguments: TrainingArguments, words: Sequence[str] = ()) -> None:
    """Load, train, evaluate, save; report.json, progress.jsonl and the student lie in `output_dir`.

    words: the command line, for the commands that the run suggests at its end.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    folder, is_main = Path(str(arguments.output_dir)), arguments.process_index == 0
    with contextlib.ExitStack() as resources:
        if is_main:
            resources.enter_context(locked(folder))
        with mendable():
            checkpoint = of_main_process(checkpoint_to_resume(arguments) if is_main else None)
        if (port := config.metrics.port) >= 0:
            local = arguments.local_process_index if port else 0
            metrics.serve(port + local, side="student", address=config.metrics.address)
        with mendable():
            tokenizer, trainer, plan = prepare(config, arguments, checkpoint, resources)
        display = ProgressDisplay(folder)
        trainer.add_callback(display)
        resources.callback(display.close)
        if is_main:
            display.say(what_runs(plan.config, arguments, trainer, checkpoint))
        figures = train(trainer, checkpoint)
        save_student(trainer, tokenizer, folder)
        if is_main:
            write_whole(folder / "report.json", json.dumps(figures, indent=2))
            display.say(what_came_of_it(figures, config, folder, words))


class CannotStart(LogitstreamError):
    """Settings, files or the teacher do not allow the run to begin."""


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """Raise what libraries refuse before training as CannotStart: users can mend it, so it is said in one line."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise CannotStart(str(error)) from error


def prepare(
    config: StudentConfig, arguments: TrainingArguments, checkpoint: Path | None, resources: contextlib.ExitStack
) -> tuple[PreTrainedTokenizerBase, DistillationTrainer, RunPlan]:
    """Load, plan, connect and build; `resources` closes what has to be closed."""
    if config.source != "cache":
        check_access(config.tls.files(), token_file=config.teacher.token_file)  # before minutes of packing
    for name in ("path", "config", "tokenizer"):
        refuse_missing_folder(f"model.{name}", getattr(config.model, name))
    tokenizer, model = load_tokenizer(config.model.tokenizer, config.model.path), load_model(config, arguments)
    train_set, heldout_set = load_data(
        config, arguments, tokenizer, limits=StudentLimits.of(model), checkpoint=checkpoint
    )
    connected = partial(connect, config, arguments, model, Vocabulary.of(tokenizer), checkpoint=checkpoint)
    plan = make_plan(config, arguments, train_set, checkpoint=checkpoint, connect=connected)
    if arguments.process_index == 0:
        write_resolved(plan.config, arguments)
    client = None
    if config.source != "cache":
        client = resources.enter_context(contextlib.closing(connected(plan.spec)))
        if config.source == "online":
            agree_on_teacher(client, plan.spec, Path(str(arguments.output_dir)))
    first_choices = None
    is_filled = of_main_process(_holds_targets(config.cache.path))  # of all: one of them will soon have made a new one
    if client is not None and len(heldout_set) and config.teacher.max_teacher_lag == 0 and not is_filled:
        asked = resources.enter_context(contextlib.closing(connected(FIRST_CHOICES_SPEC)))
        sequences = (one for i in range(len(heldout_set)) for _, one in split_batch(collate([heldout_set[i]])))
        first_choices = FirstChoices(asked, sequences)
    cache = open_cache(plan, client, Vocabulary.of(tokenizer), arguments.process_index)
    if cache is not None:
        resources.enter_context(contextlib.closing(cache))
    if client is not None and arguments.process_index == 0:
        warn_of_refusals(client.known_info, config.data.sequence_tokens)
    trainer = build_trainer(plan, arguments, model, client, cache, train_set, heldout_set, first_choices)
    return tokenizer, trainer, plan


def _holds_targets(cache: str) -> bool:
    """Return whether a run may be meant to do without its teacher; a disk that hangs holds no targets."""
    with contextlib.suppress(DiskHangs):
        return bool(cache) and from_disk(cache, lambda: may_hold_targets(cache), alone=False)
    return False


def load_model(config: StudentConfig, arguments: TrainingArguments) -> PreTrainedModel:
    """Return the student from its checkpoint, or untrained from its config at the run's seed."""
    auto: Any = AutoModelForCausalLM
    with naming("model.path" if config.model.path else "model.config", config.model.name):
        set_seed(arguments.seed)
        if config.model.path:
            model: PreTrainedModel = auto.from_pretrained(config.model.path, dtype=torch.float32)
        else:
            model = auto.from_config(AutoConfig.from_pretrained(config.model.config), dtype=torch.float32)
    return model


def load_data(
    config: StudentConfig,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: StudentLimits | None = None,
    checkpoint: Path | None = None,
) -> tuple[Dataset | CacheDataset, Dataset]:
    """Return training and held-out sequences, of the text or else of the cache. Raises ValueError beyond the limits."""
    data = config.data
    sizes: dict[str, Any] = {
        "heldout_sequences": data.heldout_sequences,
        "max_sequences": data.max_sequences,
        "cache": config.cache.path,
    }
    if not data.text:
        corpus = open_agreed_cache(config.cache.path, Path(str(arguments.output_dir)), checkpoint)
        return split_cache(CacheDataset(corpus), **sizes)
    with arguments.main_process_first(desc="packing the text"):
        sequences = load_sequences(
            data.text,
            tokenizer,
            sequence_tokens=data.sequence_tokens,
            text_column=data.text_column,
            document_start=data.document_start,
            document_end=data.document_end,
            limits=limits,
        )
    return split_text(sequences, cached_only=config.source == "cache", **sizes)


def connect(
    config: StudentConfig,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    spec: TargetSpec,
    *,
    checkpoint: Path | None,
) -> GrpcTeacherClient:
    """Return a client of the teacher's replicas; a run that resumes a checkpoint expects the teacher it began with."""
    teacher = config.teacher
    return GrpcTeacherClient(
        teacher.addresses,
        spec,
        vocab_size=model.config.get_text_config().vocab_size,
        tokenizer=vocabulary,
        client_id=teacher.client_id,
        tls=config.tls.files(),
        token_file=teacher.token_file,
        insecure=config.tls.insecure,
        deadline_seconds=teacher.deadline_seconds,
        stalled_seconds=teacher.stalled_seconds,
        connect_timeout_seconds=teacher.connect_timeout_seconds,
        max_teacher_lag=teacher.max_teacher_lag,
        fingerprint=expected_teacher(checkpoint, spec),
    )


def open_cache(
    plan: RunPlan, client: GrpcTeacherClient | None, vocabulary: Vocabulary, process_index: int
) -> TargetCache | None:
    """Return this process's view of the cache; None if nothing is kept."""
    config = plan.config
    if not config.cache.path:
        return None
    facts = {"text": config.data.text, "tokenizer": config.model.tokenizer or config.model.path}
    return open_target_cache(
        config.cache.path,
        client,
        plan.spec,
        online=config.source == "online",
        tokenizer=vocabulary,
        max_bytes=config.cache.max_bytes,
        writer_id=f"{config.teacher.client_id}-{process_index}",
        provenance=facts | config.cache.provenance,
    )


def build_trainer(
    plan: RunPlan,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    client: GrpcTeacherClient | None,
    cache: TargetCache | None,
    train_set: Dataset | CacheDataset,
    heldout_set: Dataset,
    first_choices: FirstChoices | None,
) -> DistillationTrainer:
    config = plan.config

    def stream(dataloader: DataLoader[Any]) -> TargetStream:
        return TargetStream(
            dataloader,
            client,
            cache=cache,
            mode=config.source,
            prefetch_batches=config.targets.prefetch_batches,
            draw_set=plan.draw_set,
        )

    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        data_collator=collate,
        wrap_dataloader=stream,
        ce_weight=config.loss.ce_weight,
        overhead_every=config.loss.overhead_every,
        first_choices=first_choices,
    )
    for other_display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other_display)
    return trainer


def train(trainer: DistillationTrainer, checkpoint: Path | None) -> dict[str, Any]:
    """The run's figures, the same on every process; without held-out sequences those of training alone.

    At a signal or an error a checkpoint of the steps done is left; raises Stopped or the error.
    """
    with trainer.stop.listening():
        heldout = evaluate(trainer, "before")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step and not report(trainer.stats).get("tokens_trained"):
            raise LogitstreamError("no token was trained on: each sequence was refused, damaged, or masked as a whole")
        try:
            heldout |= evaluate(trainer, "after")
        except Stopped:
            trainer.keep_progress()
            raise
    return heldout | report(trainer.stats)


def checkpoint_to_resume(arguments: TrainingArguments) -> Path | None:
    """What `resume_from_checkpoint` names in the output folder; see `choose_checkpoint`."""
    return choose_checkpoint(
        Path(str(arguments.output_dir)), arguments.resume_from_checkpoint, with_optimizer=not arguments.save_only_model
    )


def evaluate(trainer: DistillationTrainer, when: str) -> dict[str, Any]:
    """Cross-entropy [nats/token] of the held-out text and, where known, the agreement with the teacher's first choices.

    The loss is None, which JSON can hold, where no token is supervised or it is no number.
    """
    heldout: Any = trainer.eval_dataset
    found = trainer.evaluate() if len(heldout) else {}
    loss = found.get("eval_loss", math.nan)
    agreement = found.get("eval_teacher_top1_agreement")
    shown = {} if agreement is None else {f"heldout_teacher_top1_agreement_{when}": agreement}
    return {f"heldout_loss_{when}": loss if math.isfinite(loss) else None} | shown


def save_student(trainer: DistillationTrainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The student and its tokenizer into the output folder, each file whole or as it was."""
    staged = folder / STAGING / "student"
    trainer.save_model(str(staged))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    tokenizer.save_pretrained(staged)
    for path in staged.iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    shutil.rmtree(staged.parent, ignore_errors=True)
