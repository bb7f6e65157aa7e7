"""A teacher in the student's own process, for small models and for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace

from logitstream import codec
from logitstream.id_model import IdModel
from logitstream.types import Fingerprint, ReceivedTargets, SparseTargets, TargetSpec, TeacherInfo, TokenSequence


class LocalTeacherClient:
    """A TeacherClient whose `score(sequence, draw_set)` runs in one thread of its own, in the order of submission."""

    max_teacher_lag = 0

    def __init__(
        self, score: Callable[[TokenSequence, int], SparseTargets], *, info: TeacherInfo, spec: TargetSpec
    ) -> None:
        self.info, self.spec = info, spec
        self._score = score
        self._id_model = IdModel.from_bytes(info.id_model) if info.id_model else None
        self._fingerprint = Fingerprint.of(info, spec).digest
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="local-teacher")
        self._closed = False

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """Ask for targets. Unlike the executor's, these futures can be cancelled while `score` runs."""
        futures: list[Future[ReceivedTargets]] = [Future() for _ in sequences]
        for sequence, future in zip(sequences, futures, strict=True):
            self._executor.submit(self._answer, sequence, draw_set, future)
        return futures

    def close(self) -> None:
        self._closed = True
        self._executor.shutdown()

    def _answer(self, sequence: TokenSequence, draw_set: int, future: Future[ReceivedTargets]) -> None:
        if self._closed:
            future.cancel()
        if future.cancelled():
            return
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            try:
                received = self._receive(sequence, draw_set)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(received)

    def _receive(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets:
        sequence.validate(vocab_size=self.info.vocab_size, max_sequence_tokens=self.info.max_sequence_tokens)
        targets = self._score(sequence, draw_set)
        if targets.spec is not None:
            drawn = replace(targets.spec, codec_version=self.spec.codec_version).canonical()
            if drawn != self.spec.canonical():
                raise ValueError(f"expected targets drawn by {self.spec.canonical()}, got {drawn}")
        return ReceivedTargets(
            payload=codec.encode(targets, version=self.spec.codec_version, id_model=self._id_model),
            fingerprint=self._fingerprint,
            teacher_version=self.info.teacher_version,
            weights_digest=self.info.short_weights_digest,
        )
