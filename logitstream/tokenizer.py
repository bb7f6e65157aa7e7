"""The description of a tokenizer by which student and teacher know that they share it, and differences in words."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from logitstream.files import naming
from logitstream.types import MAX_VOCAB_SIZE

UNCHECKED_TOKENIZER = "unchecked"
"""In place of a student's tokenizer: the caller vouches that ids mean the same to student and teacher."""
MAX_DESCRIPTION_BYTES = 128 << 20
"""The most bytes of a vocabulary as JSON; the largest known ones take a tenth."""
SHOWN_TOKENS = 5


class HasVocabulary(Protocol):
    """A transformers tokenizer; one of the `tokenizers` library also tells how it cuts text."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's (id, token) pairs by rising id, and its rules of cutting text by name; no rules if unknown."""

    pairs: list[tuple[int, str]] = field(repr=False)
    rules: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: HasVocabulary | Vocabulary) -> Vocabulary:
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        pairs = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        return cls(pairs, _rules(tokenizer))

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, over the (id, token) pairs in the order of their ids."""
        return hashlib.sha256(b"".join(_line(*pair) for pair in self.pairs)).hexdigest()

    @cached_property
    def rules_digest(self) -> str:
        """SHA-256, hex, over the rules; empty if they are unknown."""
        return hashlib.sha256(json.dumps(self.rules, sort_keys=True).encode()).hexdigest() if self.rules else ""

    def num_shared(self, digest: str) -> int:
        """Return how many of the first pairs make up the vocabulary of this digest; 0 if ours does not begin with it.

        The pairs after them are tokens that were added to it, all with larger ids.
        """
        if digest == self.digest:
            return len(self.pairs)
        h = hashlib.sha256()
        for number, pair in enumerate(self.pairs, start=1):
            h.update(_line(*pair))
            if h.copy().hexdigest() == digest:
                return number
        return 0

    def to_bytes(self) -> bytes:
        """Return deflated JSON (zlib): `ids` and `tokens`, as long as each other, and `rules`."""
        ids, tokens = [one for one, _ in self.pairs], [one for _, one in self.pairs]
        return zlib.compress(json.dumps({"ids": ids, "tokens": tokens, "rules": self.rules}).encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """Undo `to_bytes` for bytes from a network; ValueError for anything else."""
        try:
            content = json.loads(zlib.decompressobj().decompress(data, MAX_DESCRIPTION_BYTES))
            pairs, rules = sorted(zip(content["ids"], content["tokens"], strict=True)), content["rules"]
            is_fine = all(
                type(one) is int and 0 <= one < MAX_VOCAB_SIZE and isinstance(token, str) for one, token in pairs
            )
            is_fine &= all(isinstance(name, str) and isinstance(rule, str) for name, rule in rules.items())
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no vocabulary: {error!r:.100}") from None
        if not is_fine:
            raise ValueError("no vocabulary: expected whole numbers and texts")
        return cls(pairs, rules)


def load_tokenizer(tokenizer: str, model: str) -> Any:
    """Load the tokenizer of the setting `tokenizer`, a folder or a hub's name, or the model's own if it is empty.

    ValueError, which names the setting, if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with naming("tokenizer" if tokenizer else "model", tokenizer or model):
        return AutoTokenizer.from_pretrained(tokenizer or model)


def vocabulary_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """Say how many ids up to the teacher's last stand for other tokens or for none, and which the first are."""
    mine, theirs = dict(student.pairs), dict(teacher.pairs)
    last = max(theirs, default=-1)
    other = [one for one in sorted(mine.keys() | theirs.keys()) if one <= last and mine.get(one) != theirs.get(one)]
    told = [f"{one} is {mine.get(one)!r} here and {theirs.get(one)!r} there" for one in other[:SHOWN_TOKENS]]
    told += ["…"] * (len(other) > SHOWN_TOKENS)
    return f"{len(other)} of {len(theirs)} ids stand for other tokens ({', '.join(told)})"


def rule_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """Name the rules of cutting text that differ; nothing if none do or one side's are unknown."""
    if not student.rules or not teacher.rules:
        return ""
    return ", ".join(sorted({name for name, _ in student.rules.items() ^ teacher.rules.items()}))


def _line(token_id: int, token: str) -> bytes:
    return f"{token_id}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass")


def _rules(tokenizer: Any) -> dict[str, str]:
    """Return a digest each of normalizer, pre-tokenizer and the model without its vocabulary (merges, scores)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return {}
    parts = json.loads(backend.to_str())
    model = parts["model"]
    model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or []]
    if isinstance(model.get("vocab"), dict):  # otherwise it holds scores
        del model["vocab"]
    texts = {
        name: json.dumps(_without_defaults(parts.get(name)), sort_keys=True, ensure_ascii=False)
        for name in ("normalizer", "pre_tokenizer", "model")
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _without_defaults(value: Any) -> Any:
    """Leave out empty values and options that are off, as other versions of `tokenizers` do."""
    if isinstance(value, dict):
        items = ((name, _without_defaults(one)) for name, one in value.items())
        return {name: one for name, one in items if one not in (None, False, "", [], {})}
    return [_without_defaults(one) for one in value] if isinstance(value, list) else value
