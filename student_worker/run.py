"""One process of a student's run (under torchrun one of several): load, plan, build, train, report."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
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
from logitstream.training.checkpoints import choose_checkpoint
from logitstream.training.distributed import agree_on_teacher, expected_teacher, of_main_process, open_agreed_cache
from logitstream.training.first_choices import SPEC as FIRST_CHOICES_SPEC
from logitstream.training.first_choices import FirstChoices
from logitstream.training.report import ProgressDisplay, report
from logitstream.training.resumable import Stopped
from logitstream.training.split import split_cache, split_text
from logitstream.training.target_cache import may_hold_targets, open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import TargetSpec
from student_worker.config import StudentConfig
from student_worker.messages import warn_of_refusals, what_came_of_it, what_runs
from student_worker.run_folder import locked, save_student, write_resolved
from student_worker.run_plan import RunPlan, make_plan

Connect = Callable[[TargetSpec], GrpcTeacherClient]


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
        if (port := config.metrics.port) >= 0:
            port += arguments.local_process_index if port else 0
            metrics.serve(port, side="student", address=config.metrics.address)
        with mendable():
            tokenizer, plan, trainer = prepare(config, arguments, resources)
        display = ProgressDisplay(folder)
        trainer.add_callback(display)
        resources.callback(display.close)
        if is_main:
            display.say(what_runs(plan.config, arguments, trainer, plan.checkpoint))
        figures = train(trainer, plan.checkpoint)
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
    config: StudentConfig, arguments: TrainingArguments, resources: contextlib.ExitStack
) -> tuple[PreTrainedTokenizerBase, RunPlan, DistillationTrainer]:
    """Load the student and its data, plan the run, build the trainer; `resources` closes what has to be closed."""
    folder, is_main = Path(str(arguments.output_dir)), arguments.process_index == 0
    wanted, with_optimizer = arguments.resume_from_checkpoint, not arguments.save_only_model
    checkpoint = of_main_process(choose_checkpoint(folder, wanted, with_optimizer=with_optimizer) if is_main else None)
    if config.source != "cache":
        check_access(config.tls.files(), token_file=config.teacher.token_file)  # before minutes of packing
    tokenizer, model = load_student(config, arguments)
    vocabulary = Vocabulary.of(tokenizer)

    def connect(spec: TargetSpec) -> GrpcTeacherClient:
        return GrpcTeacherClient(
            spec=spec,
            vocab_size=model.config.get_text_config().vocab_size,
            tokenizer=vocabulary,
            tls=config.tls.files(),
            insecure=config.tls.insecure,
            fingerprint=expected_teacher(checkpoint, spec),
            **asdict(config.teacher),
        )

    limits = StudentLimits.of(model)
    train_set, heldout_set = load_data(config, arguments, tokenizer, limits=limits, checkpoint=checkpoint)
    plan = make_plan(config, arguments, train_set, checkpoint=checkpoint, connect=connect)
    if is_main:
        write_resolved(plan.config, arguments)
    client = None
    if config.source != "cache":
        client = resources.enter_context(contextlib.closing(connect(plan.spec)))
        if config.source == "online":
            agree_on_teacher(client, plan.spec, folder)
    first_choices = ask_first_choices(config, connect, heldout_set, resources) if client is not None else None
    stream = target_stream(plan, client, vocabulary, arguments.process_index, resources)
    if client is not None and is_main:
        warn_of_refusals(client.known_info, config.data.sequence_tokens)
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        data_collator=collate,
        wrap_dataloader=stream,
        first_choices=first_choices,
        **asdict(config.loss),
    )
    for other_display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other_display)
    return tokenizer, plan, trainer


def load_student(
    config: StudentConfig, arguments: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer, and the student from its checkpoint or untrained from its config at the run's seed."""
    named = config.model
    auto: Any = AutoModelForCausalLM
    for name in ("path", "config", "tokenizer"):
        refuse_missing_folder(f"model.{name}", getattr(named, name))
    tokenizer = load_tokenizer(named.tokenizer, named.path)
    set_seed(arguments.seed)
    if named.path:
        with naming("model.path", named.path):
            return tokenizer, auto.from_pretrained(named.path, dtype=torch.float32)
    with naming("model.config", named.config):
        return tokenizer, auto.from_config(AutoConfig.from_pretrained(named.config), dtype=torch.float32)


def load_data(
    config: StudentConfig,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: StudentLimits | None = None,
    checkpoint: Path | None = None,
) -> tuple[Dataset | CacheDataset, Dataset]:
    """Return training and held-out sequences, of the text or else of the cache. Raises ValueError beyond the limits."""
    data, cache = asdict(config.data), config.cache.path
    sizes: dict[str, Any] = {name: data.pop(name) for name in ("heldout_sequences", "max_sequences")}
    text = data.pop("text")
    if not text:
        corpus = open_agreed_cache(cache, Path(str(arguments.output_dir)), checkpoint)
        return split_cache(CacheDataset(corpus), cache=cache, **sizes)
    with arguments.main_process_first(desc="packing the text"):
        sequences = load_sequences(text, tokenizer, limits=limits, **data)
    return split_text(sequences, cache=cache, cached_only=config.source == "cache", **sizes)


def ask_first_choices(
    config: StudentConfig, connect: Connect, heldout_set: Dataset, resources: contextlib.ExitStack
) -> FirstChoices | None:
    """Ask the teacher for its first choices on the held-out text; None for a run that may have to do without it."""

    def holds_targets() -> bool:
        with contextlib.suppress(DiskHangs):  # a disk that hangs holds none
            path = config.cache.path
            return bool(path) and from_disk(path, lambda: may_hold_targets(path), alone=False)
        return False

    is_filled = of_main_process(holds_targets())  # of all: one of them will soon have made a new one
    if is_filled or not len(heldout_set) or config.teacher.max_teacher_lag:
        return None
    client = resources.enter_context(contextlib.closing(connect(FIRST_CHOICES_SPEC)))
    return FirstChoices(
        client, (one for i in range(len(heldout_set)) for _, one in split_batch(collate([heldout_set[i]])))
    )


def target_stream(
    plan: RunPlan,
    client: GrpcTeacherClient | None,
    vocabulary: Vocabulary,
    process_index: int,
    resources: contextlib.ExitStack,
) -> Callable[[DataLoader[Any]], TargetStream]:
    """Open this process's view of the cache, and return what wraps the dataloader."""
    config, cache = plan.config, None
    if config.cache.path:
        facts = {"text": config.data.text, "tokenizer": config.model.tokenizer or config.model.path}
        cache = open_target_cache(
            config.cache.path,
            client,
            plan.spec,
            online=config.source == "online",
            tokenizer=vocabulary,
            max_bytes=config.cache.max_bytes,
            writer_id=f"{config.teacher.client_id}-{process_index}",
            provenance=facts | config.cache.provenance,
        )
        resources.enter_context(contextlib.closing(cache))
    return lambda dataloader: TargetStream(
        dataloader,
        client,
        cache=cache,
        mode=config.source,
        prefetch_batches=config.targets.prefetch_batches,
        draw_set=plan.draw_set,
    )


def train(trainer: DistillationTrainer, checkpoint: Path | None) -> dict[str, Any]:
    """Return the run's figures, the same on every process; without held-out sequences those of training alone.

    A signal or an error leaves a checkpoint of the steps done. Raises Stopped or the error.
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


def evaluate(trainer: DistillationTrainer, when: str) -> dict[str, Any]:
    """Return the held-out cross-entropy [nats/token] and, if known, the agreement with the teacher's first choices.

    The loss is None, which JSON can hold, if no token is supervised or it is not finite.
    """
    heldout: Any = trainer.eval_dataset
    found = trainer.evaluate() if len(heldout) else {}
    loss = found.get("eval_loss", math.nan)
    agreement = found.get("eval_teacher_top1_agreement")
    shown = {} if agreement is None else {f"heldout_teacher_top1_agreement_{when}": agreement}
    return {f"heldout_loss_{when}": loss if math.isfinite(loss) else None} | shown
