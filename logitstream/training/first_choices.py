"""The teacher's first choices on held-out text, to compare the student's with.

The id drawn most often is the teacher's first choice in most rows only, so some text is asked for with top_k = 1.
"""

from __future__ import annotations

import itertools
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
    """Asks a client that draws by SPEC, up to MAX_TOKENS; what comes late or is refused is left out."""

    def __init__(self, client: TeacherClient, sequences: Iterable[TokenSequence]) -> None:
        self._client = client
        self._known: dict[bytes, SparseTargets] = {}
        sequences = list(sequences)
        ends = itertools.accumulate(map(len, sequences))
        asked = [one for one, end in zip(sequences, ends, strict=True) if end <= MAX_TOKENS]
        self._waiting = list(zip(asked, client.submit(asked), strict=True))

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with the first choices that are known as its targets; unchanged if there are none."""
        self._collect()
        found = [(rows, self._known[one.digest()]) for rows, one in split_batch(batch) if one.digest() in self._known]
        if not found:
            return batch
        num_rows, vocab_size = batch["input_ids"].numel(), found[0][1].vocab_size
        return batch | {"targets": place_rows(found, num_rows=num_rows, vocab_size=vocab_size, spec=SPEC)}

    def _collect(self) -> None:
        until, missing = time.monotonic() + WAIT_SECONDS, ""
        while self._waiting:
            sequence, future = self._waiting.pop()
            try:
                payload, vocab_size = future.result(until - time.monotonic()).payload, self._client.info.vocab_size
                targets = codec.decode(payload, spec=SPEC, vocab_size=vocab_size, num_rows=len(sequence))
                self._known[sequence.digest()] = targets
            except (LogitstreamError, TimeoutError) as error:
                future.cancel()
                missing = repr(error)
        if missing:
            logger.warning("the teacher's first choices of some sequences are not known: %s", missing)
