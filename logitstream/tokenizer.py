"""The description of a tokenizer by which student and teacher know that they share it, and differences in words."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from logitstream.files import naming
from logitstream.types import MAX_VOCAB_SIZE

UNCHECKED_TOKENIZER = "unchecked"
"""In place of a student's tokenizer: the caller vouches that ids mean the same to student and teacher."""
MAX_DESCRIPTION_BYTES = 128 << 20
"""The most bytes of a vocabulary as JSON; the largest known ones take a tenth."""
MODEL = "model"
"""The rule with a digest for its value: the model's merges and scores are too long to show."""
SHOWN_TOKENS = 5
SHOWN_CHARS = 160

Pairs = list[tuple[int, str]]


class HasVocabulary(Protocol):
    """A transformers tokenizer; one of the `tokenizers` library also tells how it cuts text."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's (id, token) pairs by rising id, and its rules of cutting text by name; no rules if unknown."""

    pairs: Pairs = field(repr=False)
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
            ids, tokens, rules = content["ids"], content["tokens"], content["rules"]
            is_whole = len(ids) == len(tokens) and all(type(one) is int and 0 <= one < MAX_VOCAB_SIZE for one in ids)
            is_whole &= all(isinstance(one, str) for one in (*tokens, *rules, *rules.values()))
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no vocabulary: {error!r:.100}") from None
        if not is_whole:
            raise ValueError("no vocabulary: expected as many ids as tokens, and texts")
        return cls(sorted(zip(ids, tokens, strict=True)), rules)


def load_tokenizer(tokenizer: str, model: str) -> Any:
    """Load the tokenizer of the setting `tokenizer`, a folder or a hub's name, or the model's own if it is empty.

    ValueError, which names the setting, if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with naming("tokenizer" if tokenizer else "model", tokenizer or model):
        return AutoTokenizer.from_pretrained(tokenizer or model)


def vocabulary_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """Say how many ids stand for other tokens, which the first are, and which only one side has."""
    mine, theirs = dict(student.pairs), dict(teacher.pairs)
    last = max(theirs, default=-1)
    other = [one for one in sorted(mine.keys() & theirs.keys()) if mine[one] != theirs[one]]
    lacking = [f"{one} {theirs[one]!r}" for one in sorted(theirs.keys() - mine.keys())]
    own = sorted(mine.keys() - theirs.keys())
    early, late = ([f"{one} {mine[one]!r}" for one in own if (one > last) == is_late] for is_late in (False, True))
    swapped = [f"{one} is {mine[one]!r} here and {theirs[one]!r} there" for one in other]
    parts = (
        (swapped, f"of {len(theirs)} ids stand for other tokens"),
        (lacking, "of the teacher's ids have no token of the student"),
        (early, f"of the student's own tokens lie below the teacher's last id {last}"),
        (late, "that it added after the teacher's last id would do no harm"),
    )
    return "; ".join(f"{len(told)} {text} ({_first(told)})" for told, text in parts if told)


def rule_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """Say which rules of cutting text differ; nothing if none do or one side's are unknown."""
    if not student.rules or not teacher.rules:
        return ""
    parts = []
    for name in sorted(student.rules.keys() | teacher.rules.keys()):
        mine, theirs = student.rules.get(name, ""), teacher.rules.get(name, "")
        if mine != theirs and name == MODEL:
            parts.append("other merges, scores or options of the model")
        elif mine != theirs:
            parts.append(f"{name} {_short(mine)} here and {_short(theirs)} there")
    return "; ".join(parts)


def _line(token_id: int, token: str) -> bytes:
    return f"{token_id}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass")


def _rules(tokenizer: Any) -> dict[str, str]:
    """Return normalizer and pre-tokenizer as JSON, and the digest of the rest of the model (merges, scores)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return {}
    parts = json.loads(backend.to_str())
    model = parts["model"]
    model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or []]
    if isinstance(model.get("vocab"), dict):  # otherwise it holds scores
        del model["vocab"]
    digest = hashlib.sha256(_canonical(model).encode()).hexdigest()
    return {name: _canonical(parts.get(name)) for name in ("normalizer", "pre_tokenizer")} | {MODEL: digest}


def _canonical(value: Any) -> str:
    """Return JSON without empty values and options that are off, which other versions of `tokenizers` leave out."""
    return json.dumps(_without_defaults(value), sort_keys=True, ensure_ascii=False)


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        items = ((name, _without_defaults(one)) for name, one in value.items())
        return {name: one for name, one in items if one not in (None, False, "", [], {})}
    return [_without_defaults(one) for one in value] if isinstance(value, list) else value


def _first(told: Sequence[str]) -> str:
    return ", ".join([*told[:SHOWN_TOKENS], *(["…"] if len(told) > SHOWN_TOKENS else [])])


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
