"""The teacher's first choices on held-out text, one id a row, to compare the student's with.

Agreement with a draw is not agreement with the teacher: the id drawn most often is the teacher's first choice in most
rows only, and in fewer of them the fewer samples there are. So some held-out text is asked for with top_k = 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from logitstream import codec
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import place_rows, split_batch
from logitstream.data.documents import Batch
from logitstream.errors import LogitstreamError
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

logger = logging.getLogger(__name__)

SPEC = TargetSpec(sampler="top_k", top_k=1, codec_version=1)
MAX_TOKENS = 8192
"""Held-out tokens that are asked for, enough to know a share to one or two points."""
WAIT_SECONDS = 30.0


class FirstChoices:
    """Asks for the first choices of some sequences, and puts them into the batches that hold these sequences.

    Late and refused answers are left out: the run does not depend on them.
    """

    def __init__(self, client: TeacherClient, sequences: Iterable[TokenSequence]) -> None:
        """client: draws by `SPEC`. sequences: taken in order, up to MAX_TOKENS."""
        self._client = client
        self._known: dict[bytes, SparseTargets] = {}
        asked: list[TokenSequence] = []
        num_tokens = 0
        for sequence in sequences:
            num_tokens += len(sequence)
            if num_tokens > MAX_TOKENS:
                break
            asked.append(sequence)
        self._waiting = list(zip(asked, client.submit(asked), strict=True))

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with the first choices that are known as its targets; unchanged if there are none."""
        if self._waiting:
            self._collect()
        if not self._known:
            return batch
        found = [(rows, self._known.get(one.digest())) for rows, one in split_batch(batch)]
        parts = [(rows, targets) for rows, targets in found if targets is not None]
        if not parts:
            return batch
        num_rows = batch["input_ids"].numel()
        return batch | {"targets": place_rows(parts, num_rows=num_rows, vocab_size=parts[0][1].vocab_size, spec=SPEC)}

    def _collect(self) -> None:
        """Wait for the answers, WAIT_SECONDS at most for all, and close the client: it is needed no more."""
        until = time.monotonic() + WAIT_SECONDS
        reasons: list[str] = []
        for sequence, future in self._waiting:
            try:
                payload = future.result(max(until - time.monotonic(), 0.0)).payload
                vocab_size = self._client.info.vocab_size
                targets = codec.decode(payload, spec=SPEC, vocab_size=vocab_size, num_rows=len(sequence))
                self._known[sequence.digest()] = targets
            except (LogitstreamError, TimeoutError) as error:
                future.cancel()
                reasons.append(str(error) or f"no answer within {WAIT_SECONDS:g} s")
        if reasons:
            numbers = (len(reasons), len(self._waiting))
            logger.warning("the teacher's first choices of %d of %d sequences are not known: %s", *numbers, reasons[0])
        self._waiting = []
        self._client.close()
