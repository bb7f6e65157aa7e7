"""The seam between the target stream and teachers."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from logitstream.types import ReceivedTargets, TeacherInfo, TokenSequence


class TeacherClient(Protocol):
    """Sequences in, encoded targets out; safe to call from several threads. The TargetSpec is fixed at construction."""

    @property
    def info(self) -> TeacherInfo:
        """What the teacher serves, as of the handshake or the newest version seen."""
        ...

    def submit(self, sequence: TokenSequence, *, draw_set: int = 0, priority: int = 0) -> Future[ReceivedTargets]:
        """Ask for one sequence's targets; never blocks on the network.

        Cancelling the future cancels the request. It fails with the RequestError that the teacher answered,
        TeacherUnavailable after the deadline, StaleTeacher or FingerprintMismatch.
        """
        ...

    def close(self) -> None:
        """Cancel what is in flight and close connections; idempotent."""
        ...
