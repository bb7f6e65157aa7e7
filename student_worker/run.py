"""One process of a student's run (under torchrun one of several): load, plan, build, train, report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
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
from logitstream.client.connections import check_access
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.data.corpus import CacheDataset, collate, load_sequences
from logitstream.data.student_limits import StudentLimits
from logitstream.errors import LogitstreamError
from logitstream.files import naming, refuse_missing_folder, write_whole
from logitstream.settings import SettingsError
from logitstream.tokenizer import Vocabulary, load_tokenizer
from logitstream.training.checkpoints import STAGING, Stopped, choose_checkpoint
from logitstream.training.distributed import agree_on_teacher, expected_teacher, open_agreed_cache
from logitstream.training.first_choices import SPEC as FIRST_CHOICES_SPEC
from logitstream.training.first_choices import FirstChoices
from logitstream.training.report import ProgressDisplay, report
from logitstream.training.split import by_main_process, documents_of, split_cache, split_text
from logitstream.training.target_cache import open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import TargetSpec
from student_worker.config import StudentConfig
from student_worker.run_plan import RunPlan, make_plan

logger = logging.getLogger(__name__)

LOCK = ".lock"


class FolderInUse(LogitstreamError):
    """Another run writes to the output folder."""


def run(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Load, train, evaluate, save; report.json, progress.jsonl and the student lie in `output_dir`."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    folder, is_main = Path(str(arguments.output_dir)), arguments.process_index == 0
    with contextlib.ExitStack() as resources:
        if is_main:
            resources.enter_context(locked(folder))
        if (port := config.metrics.port) >= 0:
            port += arguments.local_process_index if port else 0
            metrics.serve(port, side="student", address=config.metrics.address)
        try:
            plan, tokenizer, trainer = prepare(config, arguments, resources)
        except (ValueError, SafetensorError) as error:  # what libraries refuse before training, users can mend
            raise SettingsError(str(error)) from error
        display = ProgressDisplay(folder)
        trainer.add_callback(display)
        resources.callback(display.close)
        if is_main:
            display.say(announcement(plan, trainer, folder))
        figures = train(trainer, plan.checkpoint)
        staged = folder / STAGING / "student"  # each file is moved to its place when it is whole
        trainer.save_model(str(staged))
        if arguments.should_save:
            tokenizer.save_pretrained(staged)
            for path in staged.iterdir():
                path.replace(folder / path.name)
        if is_main:
            write_whole(folder / "report.json", json.dumps(figures, indent=2))
            losses = (figures[f"heldout_loss_{when}"] for when in ("before", "after"))
            before, after = ("unknown" if loss is None else f"{loss:.3f}" for loss in losses)
            display.say(f"held-out loss {before} → {after} nats a token; student and report.json are in {folder}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the output folder and clear what a killed one left half-written. Raises FolderInUse.

    The lock is the process's own: it ends with it, however it ends, and no child inherits it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace")
            raise FolderInUse(f"{folder} is in use by {holder}: choose another --training.output_dir") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        yield


def prepare(
    config: StudentConfig, arguments: TrainingArguments, resources: contextlib.ExitStack
) -> tuple[RunPlan, PreTrainedTokenizerBase, DistillationTrainer]:
    """Load the student and its data, plan the run, build the trainer; `resources` closes what has to be closed."""
    folder, is_online = Path(str(arguments.output_dir)), config.source != "cache"
    wanted, with_optimizer = arguments.resume_from_checkpoint, not arguments.save_only_model
    checkpoint = by_main_process(lambda: choose_checkpoint(folder, wanted, with_optimizer=with_optimizer))
    if is_online:
        check_access(config.tls, config.teacher.token_file)  # before minutes of packing
    tokenizer, model = load_student(config, arguments)
    vocabulary = Vocabulary.of(tokenizer)

    def connect(spec: TargetSpec) -> GrpcTeacherClient:
        return GrpcTeacherClient(
            config.teacher,
            spec,
            vocab_size=model.config.get_text_config().vocab_size,
            tokenizer=vocabulary,
            tls=config.tls,
            fingerprint=expected_teacher(checkpoint, spec),
        )

    limits = StudentLimits.of(model)
    train_set, heldout_set = load_data(config, arguments, tokenizer, limits=limits, checkpoint=checkpoint)
    plan = make_plan(config, train_set, checkpoint=checkpoint, connect=connect)
    client = resources.enter_context(contextlib.closing(connect(plan.spec))) if is_online else None
    if client is not None and config.source == "online":
        agree_on_teacher(client, plan.spec, folder)
    first_choices = None
    if client is not None and not plan.has_cache and not config.teacher.max_teacher_lag and len(heldout_set):
        other = resources.enter_context(contextlib.closing(connect(FIRST_CHOICES_SPEC)))
        first_choices = FirstChoices(other, documents_of(heldout_set, range(len(heldout_set))))
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        data_collator=collate,
        wrap_dataloader=stream_maker(plan, client, vocabulary, arguments.process_index, resources),
        first_choices=first_choices,
        **asdict(config.loss),
    )
    for other_display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other_display)
    if arguments.process_index == 0:
        write_resolved(plan.config, arguments)
    return plan, tokenizer, trainer


def load_student(
    config: StudentConfig, arguments: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer, and the student from its checkpoint or untrained from its config at the run's seed."""
    named = config.model
    auto: Any = AutoModelForCausalLM
    refuse_missing_folder("model.tokenizer", named.tokenizer)
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


def stream_maker(
    plan: RunPlan,
    client: GrpcTeacherClient | None,
    vocabulary: Vocabulary,
    process_index: int,
    resources: contextlib.ExitStack,
) -> Any:
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
    options: Any = {"prefetch_batches": config.targets.prefetch_batches, "draw_set": plan.draw_sets}
    return lambda dataloader: TargetStream(dataloader, client, cache=cache, mode=config.source, **options)


def announcement(plan: RunPlan, trainer: DistillationTrainer, folder: Path) -> str:
    """Return one line: model, data, where targets come from, output."""
    config, sizes = plan.config, (len(trainer.train_dataset), len(trainer.eval_dataset))  # type: ignore[arg-type]
    student = config.model.path or f"an untrained {type(trainer.model).__name__}"
    origins = {"online": "the teacher", "cache": "the cache", "cache_then_online": "the cache, else from the teacher"}
    line = f"training {student} on {sizes[0]:,} sequences, {sizes[1]:,} held out; targets from {origins[config.source]}"
    return f"{line}; output: {folder}" + (f", going on from {plan.checkpoint.name}" if plan.checkpoint else "")


def write_resolved(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Write every setting as it is used to config.yaml; the file is a valid --config."""
    folder = Path(str(arguments.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    training: dict[str, Any] = arguments.to_dict()  # type: ignore[no-untyped-call]
    del training["hub_token"]
    settings = asdict(config) | {"training": {name: value for name, value in training.items() if value is not None}}
    write_whole(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


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
    found = trainer.evaluate() if len(trainer.eval_dataset) else {}  # type: ignore[arg-type]
    loss, agreement = found.get("eval_loss", math.nan), found.get("eval_teacher_top1_agreement")
    shown = {} if agreement is None else {f"heldout_teacher_top1_agreement_{when}": agreement}
    return {f"heldout_loss_{when}": loss if math.isfinite(loss) else None} | shown
