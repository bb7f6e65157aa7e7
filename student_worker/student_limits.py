"""What a student's forward can take: ids in its embedding, positions that it has, documents that it sees alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""A config's names for how many positions a model has."""
PROBE_TOKENS = 4
SEEN_RATIO = 0.1
"""A change in one document may move another's logits by rounding (experts see other batches), far below this share of
what it moves where the row is one document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentLimits:
    """vocab_size: rows of the embedding; num_positions: tokens that a document may have, 0 where nothing bounds it."""

    vocab_size: int
    num_positions: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> StudentLimits:
        """The limits of a transformers model; of another module, none."""
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = (getattr(config, name, None) for name in POSITIONS)
        num_positions = next((number for number in found if isinstance(number, int) and number > 0), 0)
        return cls(vocab_size=getattr(embedding, "num_embeddings", 0), num_positions=num_positions)

    def check_id(self, highest: int, lowest: int, where: str) -> None:
        """ValueError where an id has no row in the embedding; where: what held it."""
        if self.vocab_size and not 0 <= lowest <= highest < self.vocab_size:
            bad = highest if highest >= self.vocab_size else lowest
            raise ValueError(
                f"{where}: token id {bad} is outside the student's embedding of {self.vocab_size} ids: give the "
                "student the tokenizer's ids (resize_token_embeddings) or take that token out of the text"
            )

    def check_length(self, num_tokens: int, where: str) -> None:
        """ValueError where a document has more tokens than the student has positions; where: what holds it."""
        if self.num_positions and num_tokens > self.num_positions:
            raise ValueError(
                f"{where}: {num_tokens} tokens, but the student has {self.num_positions} positions: shorten the "
                "sequences (sequence_tokens), or raise max_position_embeddings in the student's config"
            )

    def check(self, inputs: dict[str, Any]) -> None:
        """As the two above, of what the forward is about to get."""
        input_ids: Tensor = torch.as_tensor(inputs["input_ids"])
        if not input_ids.numel():
            return
        lowest, highest = (int(end) for end in torch.aminmax(input_ids))
        if not 0 <= lowest <= highest < (self.vocab_size or highest + 1):
            bad = ((input_ids < 0) | (input_ids >= self.vocab_size)).any(1)
            self.check_id(highest, lowest, f"row {int(bad.nonzero()[0])} of a batch")
        positions = inputs.get("position_ids")
        if positions is None:
            self.check_length(input_ids.shape[1], "a batch's rows")
        else:
            self.check_length(int(torch.as_tensor(positions).max()) + 1, "a document of a batch")


def takes_positions(model: Any) -> bool:
    """Whether the forward of a model, or of what adapters were put on, names position_ids."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any("position_ids" in inspect.signature(one.forward).parameters for one in (model, base))


@torch.no_grad()
def sees_documents_alone(model: Any, *, num_rows: int) -> bool:
    """Whether position_ids that start again keep a row's second document from seeing the first.

    Tried out: does another first document move the second one's logits? Attention kernels differ in this, and recurrent
    models carry their state on.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = StudentLimits.of(model).vocab_size or model.config.vocab_size
    device = next(model.parameters()).device
    shape = (num_rows, 2 * PROBE_TOKENS)
    one = torch.randint(vocab_size, shape, generator=generator).to(device)
    other = one.clone()
    other[:, :PROBE_TOKENS] = (one[:, :PROBE_TOKENS] + vocab_size // 2) % vocab_size
    positions = torch.arange(PROBE_TOKENS, device=device).repeat(2).expand(shape)

    def moved(**packing: Tensor) -> float:
        first, second = (model(input_ids=ids, use_cache=False, **packing).logits for ids in (one, other))
        return float((first[:, PROBE_TOKENS:] - second[:, PROBE_TOKENS:]).abs().max())

    was_training = model.training
    model.eval()
    try:
        return moved(position_ids=positions) <= SEEN_RATIO * moved()
    except TypeError:  # a forward without position_ids
        return False
    finally:
        model.train(was_training)
