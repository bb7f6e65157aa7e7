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
    """A teacher in this process: `score(sequence, draw_set)` runs in one thread of the client's own."""

    max_teacher_lag = 0

    def __init__(
        self, score: Callable[[TokenSequence, int], SparseTargets], *, info: TeacherInfo, spec: TargetSpec
    ) -> None:
        self._score = score
        self._info = info
        self.spec = spec
        self._id_model = IdModel.from_bytes(info.id_model) if info.id_model else None
        self._digest = Fingerprint.of(info, spec).digest
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="local-teacher")

    @property
    def info(self) -> TeacherInfo:
        return self._info

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        """Answer in the order of the calls, whatever their priority."""
        return [self._submit(sequence, draw_set) for sequence in sequences]

    def _submit(self, sequence: TokenSequence, draw_set: int) -> Future[ReceivedTargets]:
        """Return a future of our own: unlike the executor's it can be cancelled while `score` runs."""
        future: Future[ReceivedTargets] = Future()
        scored = self._executor.submit(self._answer, sequence, draw_set)

        def hand_on(done: Future[ReceivedTargets]) -> None:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                if done.cancelled():
                    future.cancel()
                elif (error := done.exception()) is not None:
                    future.set_exception(error)
                else:
                    future.set_result(done.result())

        future.add_done_callback(lambda _: scored.cancel())
        scored.add_done_callback(hand_on)
        return future

    def is_stale(self, received: ReceivedTargets) -> bool:
        return False

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _answer(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets:
        sequence.validate(vocab_size=self._info.vocab_size, max_sequence_tokens=self._info.max_sequence_tokens)
        targets = self._score(sequence, draw_set)
        if targets.spec is not None:
            drawn = replace(targets.spec, codec_version=self.spec.codec_version).canonical()
            if drawn != self.spec.canonical():
                raise ValueError(f"expected targets drawn by {self.spec.canonical()}, got {drawn}")
        return ReceivedTargets(
            payload=codec.encode(targets, version=self.spec.codec_version, id_model=self._id_model),
            fingerprint=self._digest,
            teacher_version=self._info.teacher_version,
            weights_digest=bytes.fromhex(self._info.weights_digest)[:8],
        )
