"""One process of a student, or under torchrun one of several, trained on a teacher's targets."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from logitstream import metrics
from logitstream.tokenizer import tokenizer_digest
from logitstream.types import Fingerprint, TargetSpec
from student_worker.agreement import agree_on_teacher, expected_teacher, of_main_process, open_agreed_cache
from student_worker.cached_draws import adopt_cache_spec, choose_draw_set
from student_worker.calibration import calibration_sequences, choose_spec
from student_worker.config import StudentConfig
from student_worker.data import CacheDataset, collate, load_sequences, split_heldout
from student_worker.progress import ProgressDisplay
from student_worker.report import RunReport
from student_worker.target_cache import TargetCache, open_target_cache
from student_worker.target_stream import TargetStream
from student_worker.teacher_client import GrpcTeacherClient
from student_worker.trainer import DistillationTrainer


def run(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Load, train, evaluate, save; report.json, progress.jsonl and the student lie in `output_dir`."""
    if config.metrics_port:
        port = config.metrics_port + arguments.local_process_index
        metrics.serve(port, side="student", address=config.metrics_address)
    if not config.text:
        adopt_cache_spec(config)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
    train_set, heldout_set = load_data(config, arguments, tokenizer)
    model = load_model(config, arguments)
    vocab_size, digest = model.config.get_text_config().vocab_size, tokenizer_digest(tokenizer)
    if config.bytes_per_token or config.noise:
        meet_budget(config, train_set, lambda spec: connect(config, spec, vocab_size, digest))
    corpus = train_set.cache if isinstance(train_set, CacheDataset) else None
    draw_set = choose_draw_set(config, arguments, len(train_set), cache=corpus)
    draw_set, config.draws = of_main_process((draw_set, config.draws))  # the cache may grow while they look
    if arguments.process_index == 0:
        write_resolved(config, arguments)
    with contextlib.ExitStack() as resources:
        client = None
        if config.targets != "cache":
            resumes = checkpoint_to_resume(arguments) is not None
            expected = expected_teacher(output_folder(arguments), config.target_spec(), resumes=resumes)
            client = connect(config, config.target_spec(), vocab_size, digest, expected)
            resources.enter_context(contextlib.closing(client))
            if config.targets == "online":
                agree_on_teacher(client, config.target_spec(), output_folder(arguments))
        cache = open_cache(config, client, digest, arguments.process_index, resources)
        trainer = build_trainer(config, arguments, model, client, cache, train_set, heldout_set, draw_set)
        report = train(trainer, arguments)
    trainer.save_model()
    if arguments.process_index == 0:
        tokenizer.save_pretrained(output_folder(arguments))
        (output_folder(arguments) / "report.json").write_text(json.dumps(report, indent=2))


def load_data(
    config: StudentConfig, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset] | tuple[CacheDataset, CacheDataset]:
    """Training and held-out sequences: of the text or, without one, of the cache."""
    limits = {
        "heldout_sequences": config.heldout_sequences,
        "max_sequences": config.max_sequences,
        "seed": arguments.seed,
    }
    if not config.text:
        resumes = checkpoint_to_resume(arguments) is not None
        corpus = open_agreed_cache(config.cache, output_folder(arguments), resumes=resumes)
        return split_heldout(CacheDataset(corpus), **limits)
    with arguments.main_process_first(desc="packing the text"):
        sequences = load_sequences(
            config.text, tokenizer, sequence_tokens=config.sequence_tokens, text_column=config.text_column
        )
    return split_heldout(sequences, **limits)


def write_resolved(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Every setting as it was used; the file is a valid --config."""
    folder = output_folder(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    trainer_settings: dict[str, Any] = arguments.to_dict()  # type: ignore[no-untyped-call]
    settings = asdict(config) | {name: value for name, value in trainer_settings.items() if value is not None}
    del settings["hub_token"]
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


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
    config: StudentConfig, spec: TargetSpec, vocab_size: int, digest: str, expected: Fingerprint | None = None
) -> GrpcTeacherClient:
    """A client of the teacher's replicas."""
    return GrpcTeacherClient(
        config.teacher,
        spec,
        vocab_size=vocab_size,
        tokenizer_digest=digest,
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
    digest: str,
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
        tokenizer_digest=digest,
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
    heldout_set: Dataset | CacheDataset,
    draw_set: int | None,
) -> DistillationTrainer:
    def stream(dataloader: DataLoader[Any]) -> TargetStream:
        return TargetStream(
            dataloader,
            client,
            spec=config.target_spec(),
            cache=cache,
            mode=config.targets,
            prefetch_batches=config.prefetch_batches,
            spill_batches=config.spill_batches,
            draw_set=draw_set,
        )

    return DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        data_collator=collate,
        wrap_dataloader=stream,
        ce_weight=config.ce_weight,
        overhead_every=config.overhead_every,
        callbacks=[ProgressDisplay(output_folder(arguments))],
    )


def train(trainer: DistillationTrainer, arguments: TrainingArguments) -> dict[str, Any]:
    """The run's figures, the same on every process; without held-out sequences those of training alone."""
    run_report = RunReport()
    trainer.add_callback(run_report)
    losses = {"heldout_loss_before": heldout_loss(trainer)}
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
    losses["heldout_loss_after"] = heldout_loss(trainer)
    return losses | run_report.figures()


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """What `resume_from_checkpoint` names; `latest`: the newest checkpoint in output_dir, None before the first."""
    named, folder = arguments.resume_from_checkpoint, output_folder(arguments)
    if named != "latest" or not folder.exists():
        return None if named == "latest" else named
    newest: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    return newest


def heldout_loss(trainer: DistillationTrainer) -> float | None:
    """Cross-entropy in nats per token; None, which JSON can hold, where no token is supervised or it is no number."""
    heldout: Any = trainer.eval_dataset
    loss: float = trainer.evaluate()["eval_loss"] if len(heldout) else math.nan
    return loss if math.isfinite(loss) else None
