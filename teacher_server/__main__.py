"""`teacher-server`: parse, wire, serve. The only place of this package that chooses implementations."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstream.errors import one_line
from teacher_server.process import stop_while_starting

if TYPE_CHECKING:  # imported late: they take seconds, during which signals are already heeded
    from teacher_server.backend import TeacherBackend
    from teacher_server.config import TeacherConfig
    from teacher_server.server import Served

DESCRIPTION = "Score sequences with a large language model and stream sparse targets to student workers."


def main(argv: Sequence[str] | None = None) -> None:
    if argv is None:  # as a command
        stop_while_starting()
    from logitstream.settings import SettingsError, parse
    from teacher_server.config import TeacherConfig

    words = sys.argv[1:] if argv is None else argv
    try:
        config = parse(TeacherConfig, words, command="teacher-server", description=DESCRIPTION)
    except SettingsError as error:
        print(f"teacher-server: {one_line(error)} (see teacher-server --help)", file=sys.stderr)
        sys.exit(2)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if config.check:
        check(config)
        return
    from teacher_server.server import serve

    def load_checkpoint(folder: Path) -> TeacherBackend:
        model = replace(config.model, path=str(folder), tokenizer=config.model.tokenizer or config.model.path)
        return load_transformers(replace(config, model=model))

    serve(config, partial(load, config), load_checkpoint=load_checkpoint)


def check(config: TeacherConfig) -> None:
    """Load everything that serving needs, say what would be served, serve nothing; SystemExit says what is wrong."""
    from logitstream.errors import LogitstreamError
    from teacher_server.access import BearerTokens, check_tls
    from teacher_server.server import limits_for
    from teacher_server.servicer import described

    try:
        if config.server.token_file:
            BearerTokens(Path(config.server.token_file))
        if config.tls.cert:
            check_tls(config.tls)
        backend, id_model, vocabulary = load(config)
    except (OSError, ValueError, LogitstreamError) as error:
        raise SystemExit(f"teacher-server: {one_line(error)}") from error
    info, rules = backend.describe(), vocabulary.rules_digest if vocabulary is not None else ""
    for name, value in asdict(described(info, limits_for(config, info), id_model, rules)).items():
        print(f"{name}: {len(value)} bytes" if isinstance(value, bytes) else f"{name}: {value}")
    backend.close()
    print("the settings and the model are good")


def load(config: TeacherConfig) -> Served:
    """Load the teacher and what students are told of it."""
    from logitstream.tokenizer import Vocabulary
    from teacher_server.id_model_calibration import id_model_from
    from teacher_server.server import Served

    backend = load_vllm(config) if config.backend == "vllm" else load_transformers(config)
    tokenizer = tokenizer_of(config)
    return Served(backend, id_model_from(config.id_model, tokenizer, backend), Vocabulary.of(tokenizer))


def tokenizer_of(config: TeacherConfig) -> Any:
    """Load the tokenizer that is named, or the model's own."""
    from logitstream.tokenizer import load_tokenizer
    from teacher_server.weights import weights_folder

    name = config.model.tokenizer
    return load_tokenizer(name, name or str(weights_folder(config.model.path, config.model.revision)))


def load_transformers(config: TeacherConfig) -> TeacherBackend:
    import torch
    from safetensors import SafetensorError

    from teacher_server.transformers_backend import TransformersBackend

    model = config.model
    if model.num_threads:
        torch.set_num_threads(model.num_threads)
    try:
        return TransformersBackend.load(
            model.path,
            revision=model.revision,
            tokenizer=model.tokenizer,
            dtype=model.dtype,
            device=model.device,
            vocab_size=model.vocab_size,
            max_padded_tokens=config.limits.max_batch_tokens,
            logits_chunk_bytes=model.logits_chunk_bytes,
            compiles=model.compile,
        )
    except (RuntimeError, AssertionError, SafetensorError) as error:  # such as an unknown device or a file cut off
        raise ValueError(f"model {model.path} cannot be loaded on device {model.device!r}: {error}") from error


def load_vllm(config: TeacherConfig) -> TeacherBackend:
    from logitstream.tokenizer import Vocabulary
    from teacher_server.backend import check_vocab_size
    from teacher_server.vllm_backend import VllmBackend, engine_args
    from teacher_server.weights import digest_with_options, weights_digest, weights_folder

    model, options = config.model, config.vllm.options
    folder = weights_folder(model.path, model.revision)
    tokenizer = tokenizer_of(config)
    check_vocab_size(model.vocab_size, tokenizer)
    args = engine_args(
        str(folder),
        dtype=model.dtype,
        revision=model.revision,
        max_sequence_tokens=config.limits.max_sequence_tokens,
        vocab_size=model.vocab_size,
        logits_chunk_bytes=model.logits_chunk_bytes,
        options=options,
    )
    return VllmBackend(
        args,
        weights_digest=digest_with_options(weights_digest(folder), options),
        tokenizer_digest=Vocabulary.of(tokenizer).digest,
    )


if __name__ == "__main__":
    main()
