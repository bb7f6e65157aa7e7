"""What both sides compare to know that they share a tokenizer, and how a difference is told."""

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
"""Of a vocabulary as JSON; the largest known ones take a tenth."""
MODEL = "model"
"""The rule that is told as a digest: what the model goes by beside its tokens is too long to show."""
SHOWN_TOKENS = 5
SHOWN_CHARS = 160

Pairs = list[tuple[int, str]]


class HasVocabulary(Protocol):
    """A transformers tokenizer; one of the `tokenizers` kind also tells how it cuts text."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's (id, token) pairs by rising id, and its rules of cutting text by name; empty where unknown."""

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
        """SHA-256, hex, over the rules; empty where they are unknown."""
        return hashlib.sha256(json.dumps(self.rules, sort_keys=True).encode()).hexdigest() if self.rules else ""

    def num_shared(self, digest: str) -> int:
        """How many of the pairs, from the first, make up the vocabulary of this digest; 0: it is no beginning of ours.

        Those after them are tokens that were added to it, all with larger ids.
        """
        if digest == self.digest:
            return len(self.pairs)
        h = hashlib.sha256()
        for number, (token_id, token) in enumerate(self.pairs, start=1):
            h.update(_line(token_id, token))
            if h.copy().hexdigest() == digest:
                return number
        return 0

    def to_bytes(self) -> bytes:
        """Deflated JSON (zlib): `ids` and `tokens`, as long as each other, and `rules`."""
        ids, tokens = [one for one, _ in self.pairs], [one for _, one in self.pairs]
        return zlib.compress(json.dumps({"ids": ids, "tokens": tokens, "rules": self.rules}).encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """Undo `to_bytes` for what came over a network; ValueError where it is something else."""
        inflating = zlib.decompressobj()
        try:
            content = json.loads(inflating.decompress(data, MAX_DESCRIPTION_BYTES))
            ids, tokens, rules = content["ids"], content["tokens"], content["rules"]
            is_whole = len(ids) == len(tokens) and all(type(one) is int and 0 <= one < MAX_VOCAB_SIZE for one in ids)
            is_whole &= all(isinstance(one, str) for one in (*tokens, *rules, *rules.values()))
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no vocabulary: {error!r:.100}") from None
        if not is_whole:
            raise ValueError("no vocabulary: expected as many ids as tokens, and texts")
        return cls(sorted(zip(ids, tokens, strict=True)), rules)


def load_tokenizer(tokenizer: str, model: str) -> Any:
    """Load the tokenizer of the setting `tokenizer`, or the model's own where it is empty: a folder or a hub's name.

    Raises ValueError, which names the setting, where it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with naming("tokenizer" if tokenizer else "model", tokenizer or model):
        return AutoTokenizer.from_pretrained(tokenizer or model)


def tokenizer_digest(tokenizer: HasVocabulary) -> str:
    """SHA-256, hex, over the vocabulary's (id, token) pairs in the order of their ids."""
    return Vocabulary.of(tokenizer).digest


def vocabulary_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """In words: how many ids stand for other tokens, which the first are, which are on one side alone."""
    mine, theirs = dict(student.pairs), dict(teacher.pairs)
    other = [one for one in sorted(mine.keys() & theirs.keys()) if mine[one] != theirs[one]]
    lacking, own = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    last = max(theirs, default=-1)
    early = [one for one in own if one <= last]
    parts = []
    if other:
        shown = ", ".join(f"{one} is {mine[one]!r} here and {theirs[one]!r} there" for one in other[:SHOWN_TOKENS])
        parts.append(f"{len(other)} of {len(theirs)} ids stand for other tokens ({_first(shown, other)})")
    if lacking:
        parts.append(f"the student has no token for {len(lacking)} of the teacher's ids ({_tokens(lacking, theirs)})")
    if early:
        parts.append(
            f"{len(early)} of the student's own tokens lie below the teacher's last id {last} ({_tokens(early, mine)})"
        )
    if late := own[len(early) :]:
        parts.append(f"{len(late)} that it added after the teacher's last id ({_tokens(late, mine)}) would do no harm")
    return "; ".join(parts)


def rule_differences(student: Vocabulary, teacher: Vocabulary) -> str:
    """In words: which rules of cutting text differ; empty where none do or one side's are unknown."""
    if not student.rules or not teacher.rules:
        return ""
    names = sorted(student.rules.keys() | teacher.rules.keys())
    pairs = [(name, student.rules.get(name, ""), teacher.rules.get(name, "")) for name in names]
    return "; ".join(
        "other merges, scores or options of the model"
        if name == MODEL
        else f"{name} {_short(mine)} here and {_short(theirs)} there"
        for name, mine, theirs in pairs
        if mine != theirs
    )


def _line(token_id: int, token: str) -> bytes:
    return f"{token_id}\t{len(token)}\t{token}\n".encode("utf-8", "surrogatepass")


def _rules(tokenizer: Any) -> dict[str, str]:
    """Normalizer and pre-tokenizer as JSON, what else the model goes by (merges, scores) as its digest."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return {}
    parts = json.loads(backend.to_str())
    model = parts["model"]
    model["merges"] = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or []]
    if isinstance(model.get("vocab"), dict):  # else scores are in it
        del model["vocab"]
    digest = hashlib.sha256(_canonical(model).encode()).hexdigest()
    return {name: _canonical(parts.get(name)) for name in ("normalizer", "pre_tokenizer")} | {MODEL: digest}


def _canonical(value: Any) -> str:
    """JSON without what is empty or off, which other versions of `tokenizers` leave out or add."""
    return json.dumps(_without_defaults(value), sort_keys=True, ensure_ascii=False)


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        items = ((name, _without_defaults(one)) for name, one in value.items())
        return {name: one for name, one in items if one not in (None, False, "", [], {})}
    return [_without_defaults(one) for one in value] if isinstance(value, list) else value


def _tokens(ids: list[int], tokens: dict[int, str]) -> str:
    return _first(", ".join(f"{one} {tokens[one]!r}" for one in ids[:SHOWN_TOKENS]), ids)


def _first(shown: str, ids: list[int]) -> str:
    return f"{shown}, …" if len(ids) > SHOWN_TOKENS else shown


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
