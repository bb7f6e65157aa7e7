"""What both sides compare to know that they share a tokenizer."""

from __future__ import annotations

import hashlib
from typing import Protocol


class HasVocabulary(Protocol):
    def get_vocab(self) -> dict[str, int]: ...


def tokenizer_digest(tokenizer: HasVocabulary) -> str:
    """SHA-256, hex, over the vocabulary's (id, token) pairs in the order of their ids."""
    h = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        h.update(f"{token_id}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass"))
    return h.hexdigest()
