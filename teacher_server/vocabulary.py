"""How many ids are served, where that is fewer than the model's head has rows."""

from __future__ import annotations

from logitstream.tokenizer import HasVocabulary


def check_vocab_size(vocab_size: int, tokenizer: HasVocabulary) -> None:
    """Raises ValueError where an id of the tokenizer would be cut off; 0 cuts nothing."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if 0 < vocab_size <= largest:
        raise ValueError(f"vocab_size must be above {largest}, the tokenizer's largest id, got {vocab_size}")


def served_vocab_size(vocab_size: int, *, num_rows: int) -> int:
    """All rows of the head for 0; ValueError where more are asked for than there are."""
    if not 0 <= vocab_size <= num_rows:
        raise ValueError(f"vocab_size must be at most {num_rows}, the rows of the teacher's head, got {vocab_size}")
    return vocab_size or num_rows
