"""One process of a student, or under torchrun one of several, trained on a teacher's targets."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
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
from logitstream.training.split import split_cache, split_text
from logitstream.training.stopping import Stopped
from logitstream.training.target_cache import TargetCache, may_hold_targets, open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import Fingerprint, TargetSpec
from student_worker.announcing import warn_of_refusals, what_came_of_it, what_runs
from student_worker.budget_search import calibration_sequences, choose_spec
from student_worker.config import StudentConfig
from student_worker.run_folder import locked
from student_worker.run_plan import adopt_cache_spec, choose_draw_set


def run(config: StudentConfig, arguments: TrainingArguments, words: Sequence[str] = ()) -> None:
    """Load, train, evaluate, save; report.json, progress.jsonl and the student lie in `output_dir`.

    words: the command's own, for the commands that it names at its end.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    folder, is_main = output_folder(arguments), arguments.process_index == 0
    with contextlib.ExitStack() as resources:
        if is_main:
            resources.enter_context(locked(folder))
        with mendable():
            checkpoint = of_main_process(checkpoint_to_resume(arguments) if is_main else None)
        if config.metrics_port:
            port = config.metrics_port + arguments.local_process_index
            metrics.serve(port, side="student", address=config.metrics_address)
        with mendable():
            tokenizer, trainer = prepare(config, arguments, checkpoint, resources)
        display = ProgressDisplay(folder)
        trainer.add_callback(display)
        resources.callback(display.close)
        if is_main:
            display.say(what_runs(config, arguments, trainer, checkpoint))
        figures = train(trainer, checkpoint)
        save_student(trainer, tokenizer, folder)
        if is_main:
            write_whole(folder / "report.json", json.dumps(figures, indent=2))
            display.say(what_came_of_it(figures, config, folder, words))


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


class CannotStart(LogitstreamError):
    """Settings, files or the teacher do not allow the run to begin."""


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """What the libraries refuse before training is a user's to mend: raised as CannotStart, to be said in a line."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise CannotStart(str(error)) from error


def prepare(
    config: StudentConfig, arguments: TrainingArguments, checkpoint: Path | None, resources: contextlib.ExitStack
) -> tuple[PreTrainedTokenizerBase, DistillationTrainer]:
    """Everything that training needs, loaded and connected; what has to be closed again goes to `resources`."""
    folder = output_folder(arguments)
    if config.targets != "cache":
        check_access(config.tls_files(), token_file=config.token_file)  # before minutes of packing
    for setting in ("model", "model_config", "tokenizer"):
        refuse_missing_folder(setting, getattr(config, setting))
    if not config.text:
        adopt_cache_spec(config)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    with naming("model" if config.model else "model_config", config.model or config.model_config):
        model = load_model(config, arguments)
    train_set, heldout_set = load_data(
        config, arguments, tokenizer, limits=StudentLimits.of(model), resumes=checkpoint is not None
    )
    vocab_size, vocabulary = model.config.get_text_config().vocab_size, Vocabulary.of(tokenizer)

    def connected(spec: TargetSpec) -> GrpcTeacherClient:
        expected = expected_teacher(folder, spec, resumes=checkpoint is not None)
        return connect(config, spec, vocab_size, vocabulary, expected)

    if config.bytes_per_token or config.noise:
        meet_budget(config, train_set, connected)
    corpus = train_set.cache if isinstance(train_set, CacheDataset) else None
    draw_set = choose_draw_set(config, arguments, len(train_set), cache=corpus)
    draw_set, config.draws = of_main_process((draw_set, config.draws))  # the cache may grow while they look
    if arguments.process_index == 0:
        write_resolved(config, arguments)
    client = None
    if config.targets != "cache":
        client = connected(config.target_spec())
        resources.enter_context(contextlib.closing(client))
        if config.targets == "online":
            agree_on_teacher(client, config.target_spec(), folder)
    first_choices = None
    is_filled = of_main_process(_holds_targets(config.cache))  # of all: one of them will soon have made a new one
    if client is not None and len(heldout_set) and config.max_teacher_lag == 0 and not is_filled:
        asked = connected(FIRST_CHOICES_SPEC)
        resources.enter_context(contextlib.closing(asked))
        sequences = (one for i in range(len(heldout_set)) for _, one in split_batch(collate([heldout_set[i]])))
        first_choices = FirstChoices(asked, sequences)
    cache = open_cache(config, client, vocabulary, arguments.process_index, resources)
    if client is not None and arguments.process_index == 0:
        warn_of_refusals(client.known_info, config.sequence_tokens)
    trainer = build_trainer(config, arguments, model, client, cache, train_set, heldout_set, draw_set)
    trainer.first_choices = first_choices
    return tokenizer, trainer


def _holds_targets(cache: str) -> bool:
    """Whether a run may be meant to do without its teacher; a disk that hangs holds none."""
    with contextlib.suppress(DiskHangs):
        return bool(cache) and from_disk(cache, lambda: may_hold_targets(cache), alone=False)
    return False


def load_data(
    config: StudentConfig,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: StudentLimits | None = None,
    resumes: bool = False,
) -> tuple[Dataset | CacheDataset, Dataset]:
    """Training and held-out sequences: of the text or, without one, of the cache; ValueError beyond the limits."""
    sizes: dict[str, Any] = {
        "heldout_sequences": config.heldout_sequences,
        "max_sequences": config.max_sequences,
        "cache": config.cache,
    }
    if not config.text:
        corpus = open_agreed_cache(config.cache, output_folder(arguments), resumes=resumes)
        return split_cache(CacheDataset(corpus), **sizes)
    with arguments.main_process_first(desc="packing the text"):
        sequences = load_sequences(
            config.text,
            tokenizer,
            sequence_tokens=config.sequence_tokens,
            text_column=config.text_column,
            document_start=config.document_start,
            document_end=config.document_end,
            limits=limits,
        )
    return split_text(sequences, cached_only=config.targets == "cache", **sizes)


def write_resolved(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Every setting as it was used; the file is a valid --config."""
    folder = output_folder(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    trainer_settings: dict[str, Any] = arguments.to_dict()  # type: ignore[no-untyped-call]
    settings = asdict(config) | {name: value for name, value in trainer_settings.items() if value is not None}
    del settings["hub_token"]
    write_whole(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


def output_folder(arguments: TrainingArguments) -> Path:
    """TrainingArguments' output_dir, whose default is trainer_output."""
    return Path(arguments.output_dir or "trainer_output")


def load_model(config: StudentConfig, arguments: TrainingArguments) -> PreTrainedModel:
    """The student from its checkpoint, or untrained from its config at the run's seed."""
    set_seed(arguments.seed)
    auto: Any = AutoModelForCausalLM
    if config.model:
        model: PreTrainedModel = auto.from_pretrained(config.model, dtype=torch.float32)
    else:
        model = auto.from_config(AutoConfig.from_pretrained(config.model_config), dtype=torch.float32)
    return model


def meet_budget(
    config: StudentConfig, train_set: Dataset | CacheDataset, connect: Callable[[TargetSpec], GrpcTeacherClient]
) -> None:
    """Put N, θ or k in place of a budget in bytes or noise; from the cache alone those of the cache."""
    spec = choose_spec(
        connect if config.targets != "cache" else None,
        calibration_sequences(train_set),
        config.target_spec(),
        bytes_per_token=config.bytes_per_token,
        noise=config.noise,
        cache=config.cache,
    )
    config.draw_by(spec)
    config.bytes_per_token = config.noise = 0.0


def connect(
    config: StudentConfig,
    spec: TargetSpec,
    vocab_size: int,
    vocabulary: Vocabulary,
    expected: Fingerprint | None = None,
) -> GrpcTeacherClient:
    """A client of the teacher's replicas."""
    return GrpcTeacherClient(
        config.teacher,
        spec,
        vocab_size=vocab_size,
        tokenizer=vocabulary,
        client_id=config.client_id,
        tls=config.tls_files(),
        token_file=config.token_file,
        insecure=config.insecure,
        deadline_seconds=config.deadline_seconds,
        stalled_seconds=config.stalled_seconds,
        connect_timeout_seconds=config.connect_timeout_seconds,
        max_teacher_lag=config.max_teacher_lag,
        fingerprint=expected,
    )


def open_cache(
    config: StudentConfig,
    client: GrpcTeacherClient | None,
    vocabulary: Vocabulary,
    process_index: int,
    resources: contextlib.ExitStack,
) -> TargetCache | None:
    """This process's view of the cache; None where nothing is kept."""
    if not config.cache:
        return None
    cache = open_target_cache(
        config.cache,
        client,
        config.target_spec(),
        online=config.targets == "online",
        tokenizer=vocabulary,
        max_bytes=config.cache_max_bytes,
        writer_id=f"{config.client_id}-{process_index}",
        provenance={"text": config.text, "tokenizer": config.tokenizer or config.model} | config.cache_provenance,
    )
    return resources.enter_context(contextlib.closing(cache))


def build_trainer(
    config: StudentConfig,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    client: GrpcTeacherClient | None,
    cache: TargetCache | None,
    train_set: Dataset | CacheDataset,
    heldout_set: Dataset,
    draw_set: int | None,
) -> DistillationTrainer:
    def stream(dataloader: DataLoader[Any]) -> TargetStream:
        return TargetStream(
            dataloader,
            client,
            cache=cache,
            mode=config.target_mode(),
            prefetch_batches=config.prefetch_batches,
            draw_set=draw_set,
        )

    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        data_collator=collate,
        wrap_dataloader=stream,
        ce_weight=config.ce_weight,
        overhead_every=config.overhead_every,
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
        if trainer.state.global_step and not trainer.has_trained():
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
        output_folder(arguments), arguments.resume_from_checkpoint, with_optimizer=not arguments.save_only_model
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
