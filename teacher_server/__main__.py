"""`teacher-server`: parse, wire, serve. The only place of this package that chooses implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from teacher_server import logs
from teacher_server.backend import TeacherBackend
from teacher_server.config import TeacherConfig

DESCRIPTION = "Score sequences with a large language model and stream sparse targets to student workers."


def main(argv: Sequence[str] | None = None) -> None:
    from logitstream.settings import parse_settings

    (config,) = parse_settings([TeacherConfig], command="teacher-server", description=DESCRIPTION, argv=argv)
    logs.configure(level=config.log_level, as_json=config.log_json)
    if config.check:
        check(config)
        return
    from teacher_server.server import serve

    def load_checkpoint(folder: Path) -> TeacherBackend:
        return backend_factory(replace(config, model=str(folder), tokenizer=config.tokenizer or config.model))()

    can_replace = config.backend == "transformers"
    serve(config, backend_factory(config), load_checkpoint=load_checkpoint if can_replace else None)


def check(config: TeacherConfig) -> None:
    """Load everything that serving needs, say what was found, serve nothing."""
    backend = backend_factory(config)()
    for name, value in asdict(backend.describe()).items():
        print(f"{name}: {len(value)} bytes" if isinstance(value, bytes) else f"{name}: {value}")
    backend.close()
    print("the settings and the model are good")


def backend_factory(config: TeacherConfig) -> Callable[[], TeacherBackend]:
    """What loads the teacher: called in a thread, so that health checks are answered meanwhile."""

    def load_transformers() -> TeacherBackend:
        import torch

        from teacher_server.transformers_backend import TransformersBackend

        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        return TransformersBackend.load(
            config.model,
            revision=config.revision,
            tokenizer=config.tokenizer,
            dtype=config.dtype,
            device=config.device,
            max_padded_tokens=config.max_batch_tokens,
            logits_chunk_bytes=config.logits_chunk_bytes,
        )

    def load_vllm() -> TeacherBackend:
        from transformers import AutoTokenizer

        from logitstream.tokenizer import tokenizer_digest
        from teacher_server.vllm_backend import VllmBackend
        from teacher_server.weights import weights_digest, weights_folder

        folder = weights_folder(config.model, config.revision)
        return VllmBackend(
            str(folder),
            weights_digest=weights_digest(folder),
            tokenizer_digest=tokenizer_digest(AutoTokenizer.from_pretrained(config.tokenizer or folder)),
            dtype=config.dtype,
            revision=config.revision,
            max_sequence_tokens=config.max_sequence_tokens or None,
            engine_options=config.backend_options,
        )

    return load_vllm if config.backend == "vllm" else load_transformers


if __name__ == "__main__":
    main()
