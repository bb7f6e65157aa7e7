"""How many tokens a batch may hold: less after one that did not fit, more again after many that went well."""

from __future__ import annotations

import logging

from teacher_server.isolation import Trouble

CLEAN_BATCHES = 16
"""Batches in a row without trouble after which smaller ones may grow again, by a quarter."""

log = logging.getLogger(__name__)


class BatchBudget:
    """`tokens` of the next batch, at most `max_tokens`."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = max_tokens
        self._num_clean = 0

    def adapt(self, trouble: Trouble, *, num_sequences: int, num_tokens: int) -> None:
        """To what came of a batch; one of a single sequence cannot be smaller."""
        self._num_clean = 0 if trouble.num_failures else self._num_clean + 1
        tokens = self.tokens
        if trouble.num_out_of_memory and num_sequences > 1:
            tokens = max(1, min(tokens, num_tokens // 2))
        elif self._num_clean >= CLEAN_BATCHES:
            self._num_clean = 0
            tokens = min(self.max_tokens, tokens * 5 // 4 + 1)
        if tokens != self.tokens:
            self.tokens = tokens
            log.warning("batches hold at most %d tokens from now on", tokens)
