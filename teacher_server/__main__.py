"""`teacher-server`: parse, wire, serve. The only place of this package that chooses implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstream.errors import one_line
from teacher_server.process import stop_while_starting

if TYPE_CHECKING:  # imported late: they take seconds, during which signals are already heeded
    from logitstream.tokenizer import Vocabulary
    from teacher_server.backend import TeacherBackend
    from teacher_server.config import TeacherConfig

DESCRIPTION = "Score sequences with a large language model and stream sparse targets to student workers."


def main(argv: Sequence[str] | None = None) -> None:
    if argv is None:  # as a command
        stop_while_starting()
    from logitstream.settings import SettingsError, parse
    from teacher_server import logs
    from teacher_server.config import TeacherConfig

    words = sys.argv[1:] if argv is None else argv
    try:
        config = parse(TeacherConfig, words, command="teacher-server", description=DESCRIPTION)
    except SettingsError as error:
        print(f"teacher-server: {one_line(error)} (see teacher-server --help)", file=sys.stderr)
        sys.exit(2)
    logs.configure(level=config.log.level, as_json=config.log.json)
    if config.check:
        check(config)
        return
    from teacher_server.server import serve

    def load_checkpoint(folder: Path) -> TeacherBackend:
        model = replace(config.model, path=str(folder), tokenizer=config.model.tokenizer or config.model.path)
        return backend_factory(replace(config, model=model))()

    serve(
        config,
        backend_factory(config),
        load_checkpoint=load_checkpoint if config.backend == "transformers" else None,
        make_id_model=lambda backend: id_model_of(config, backend),
        load_vocabulary=lambda: vocabulary_of(config),
    )


def check(config: TeacherConfig) -> None:
    """Load everything that serving needs, say what would be served, serve nothing; SystemExit says what is wrong."""
    from logitstream.errors import LogitstreamError
    from logitstream.rpc.certificates import certificate_expiry
    from teacher_server.access import BearerTokens, check_tls
    from teacher_server.server import limits_for
    from teacher_server.servicer import described

    try:
        if config.server.token_file:
            BearerTokens(Path(config.server.token_file))
        if config.tls.cert:
            check_tls(config.tls)
            print(f"certificate expires at: {datetime.fromtimestamp(certificate_expiry(config.tls.cert), UTC)}")
        backend = backend_factory(config)()
        id_model, rules = id_model_of(config, backend), vocabulary_of(config).rules_digest
    except (OSError, ValueError, LogitstreamError) as error:
        raise SystemExit(f"teacher-server: {one_line(error)}") from error
    info = backend.describe()
    for name, value in asdict(described(info, limits_for(config, info), id_model, rules)).items():
        print(f"{name}: {len(value)} bytes" if isinstance(value, bytes) else f"{name}: {value}")
    backend.close()
    print("the settings and the model are good")


def id_model_of(config: TeacherConfig, backend: TeacherBackend) -> bytes:
    """Return codec version 2's id model; empty if the settings name none.

    Raises ValueError if it does not fit into the message that tells students of it.
    """
    from teacher_server.id_model_calibration import id_model_from

    path = Path(config.id_model.file) if config.id_model.file else None
    text = Path(config.id_model.text) if config.id_model.text else None
    content = id_model_from(path, text, tokenizer_of(config) if text is not None else None, backend)
    if len(content) > config.limits.max_message_bytes:
        raise ValueError(
            f"limits.max_message_bytes must be at least {len(content)}, the size of the id model, "
            f"got {config.limits.max_message_bytes}"
        )
    return content


def vocabulary_of(config: TeacherConfig) -> Vocabulary:
    """Load the vocabulary, which a student with another tokenizer is told."""
    from logitstream.tokenizer import Vocabulary

    return Vocabulary.of(tokenizer_of(config))


def tokenizer_of(config: TeacherConfig) -> Any:
    """Load the tokenizer that is named, or the model's own."""
    from logitstream.tokenizer import load_tokenizer
    from teacher_server.weights import weights_folder

    name = config.model.tokenizer
    return load_tokenizer(name, name or str(weights_folder(config.model.path, config.model.revision)))


def backend_factory(config: TeacherConfig) -> Callable[[], TeacherBackend]:
    """Return a function that loads the teacher, to be called in a thread while health checks are answered."""
    return partial(load_vllm if config.backend == "vllm" else load_transformers, config)


def load_transformers(config: TeacherConfig) -> TeacherBackend:
    import torch
    from safetensors import SafetensorError

    from teacher_server.transformers_backend import TransformersBackend

    if config.model.num_threads:
        torch.set_num_threads(config.model.num_threads)
    try:
        return TransformersBackend.load(
            config.model.path,
            revision=config.model.revision,
            tokenizer=config.model.tokenizer,
            dtype=config.model.dtype,
            device=config.model.device,
            vocab_size=config.model.vocab_size,
            max_padded_tokens=config.limits.max_batch_tokens,
            logits_chunk_bytes=config.model.logits_chunk_bytes,
        )
    except (RuntimeError, AssertionError, SafetensorError) as error:  # such as an unknown device or a file cut off
        raise ValueError(
            f"model {config.model.path} cannot be loaded on device {config.model.device!r}: {error}"
        ) from error


def load_vllm(config: TeacherConfig) -> TeacherBackend:
    from logitstream.tokenizer import Vocabulary
    from teacher_server.backend import check_vocab_size
    from teacher_server.vllm_backend import VllmBackend, engine_args
    from teacher_server.weights import digest_with_options, weights_digest, weights_folder

    with_code = bool(config.vllm.options.get("trust_remote_code"))
    folder = weights_folder(config.model.path, config.model.revision, with_code=with_code)
    tokenizer = tokenizer_of(config)
    check_vocab_size(config.model.vocab_size, tokenizer)
    args = engine_args(
        str(folder),
        dtype=config.model.dtype,
        revision=config.model.revision,
        max_sequence_tokens=config.limits.max_sequence_tokens,
        vocab_size=config.model.vocab_size,
        logits_chunk_bytes=config.model.logits_chunk_bytes,
        options=config.vllm.options,
    )
    return VllmBackend(
        args,
        weights_digest=digest_with_options(weights_digest(folder, with_code=with_code), config.vllm.options),
        tokenizer_digest=Vocabulary.of(tokenizer).digest,
    )


if __name__ == "__main__":
    main()
