"""The limits of a student's forward: ids in its embedding, positions that it has, documents that it sees alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

PROBE_TOKENS = 4
Before = Literal["documents", "padding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentLimits:
    """Rows of the embedding, and the most tokens that a document may have; 0 for no limit."""

    vocab_size: int
    num_positions: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> StudentLimits:
        """Return the limits of a transformers model; another module has none."""
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        num_positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        return cls(
            vocab_size=getattr(_embedding_of(model), "num_embeddings", 0),
            num_positions=num_positions if isinstance(num_positions, int) else 0,
        )

    def check_ids(self, input_ids: Any, where: str) -> None:
        """ValueError if an id has no row in the embedding; `where` names the place of the ids."""
        lowest, highest = (int(end) for end in torch.aminmax(torch.as_tensor(input_ids)))
        if lowest < 0 or highest >= (self.vocab_size or highest + 1):
            raise ValueError(
                f"{where}: token id {lowest if lowest < 0 else highest} is outside the student's embedding of "
                f"{self.vocab_size} ids: resize_token_embeddings, or take that token out of the text"
            )

    def check_length(self, num_tokens: int, where: str) -> None:
        """ValueError if a document has more tokens than the student has positions; `where` names its place."""
        if num_tokens > (self.num_positions or num_tokens):
            raise ValueError(
                f"{where}: {num_tokens} tokens, but the student has {self.num_positions} positions: shorten the "
                "sequences (sequence_tokens)"
            )

    def check(self, inputs: dict[str, Any]) -> None:
        """Check the ids and the lengths of the forward's arguments."""
        if torch.as_tensor(inputs["input_ids"]).numel():
            self.check_ids(inputs["input_ids"], "a batch")
            positions = inputs.get("position_ids")
            longest = inputs["input_ids"].shape[1] if positions is None else int(torch.as_tensor(positions).max()) + 1
            self.check_length(longest, "a document of a batch")


def takes_positions(model: Any) -> bool:
    """Tell whether the forward of a model, or of the model under its adapters, has an argument position_ids."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any("position_ids" in inspect.signature(one.forward).parameters for one in (model, base))


def stands_before(inputs: dict[str, Any]) -> Before | None:
    """Return the kind of tokens before a document that a forward with these arguments must hide from it."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return "documents" if "position_ids" in inputs else None
    return "padding" if bool((mask[:, 1:] > mask[:, :-1]).any()) else None


def hides(model: Any, before: Before, *, num_rows: int) -> bool:
    """Tell whether the second half of a row sees nothing of the first, which is another document or padding.

    This is tried out: the gradient of the second half's logits at the embeddings of the first must be 0. Attention
    kernels differ in this, some families take no mask, and recurrent ones carry their state on. An untrained one may
    carry too little to change logits of a low precision, but its gradient is not rounded away.
    """
    shape, half = (num_rows, 2 * PROBE_TOKENS), torch.arange(PROBE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    embedding = _embedding_of(model) or next(part for part in model.modules() if isinstance(part, nn.Embedding))
    inputs = {"input_ids": torch.randint(embedding.num_embeddings, shape, generator=generator)}
    if before == "documents":
        inputs["position_ids"] = half.repeat(2).expand(shape)
    else:
        inputs["attention_mask"] = torch.cat([torch.zeros_like(half), torch.ones_like(half)]).expand(shape)
    device = next(model.parameters()).device
    embedded: list[Tensor] = []

    def begin_here(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which may be changed in place, unlike a leaf

    hook = embedding.register_forward_hook(begin_here)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            arguments = {name: values.to(device) for name, values in inputs.items()}
            logits = model(use_cache=False, **arguments).logits[:, PROBE_TOKENS:].float()
            weights = torch.randn(logits.shape, generator=generator).to(device)
            gradients = torch.autograd.grad((logits * weights).sum(), embedded)
        return not any(bool(gradient[:, :PROBE_TOKENS].any()) for gradient in gradients)
    except TypeError:  # a forward without such an argument
        return False
    finally:
        hook.remove()
        model.train(was_training)


def refuse_to_see(model: Any, before: Before) -> NoReturn:
    """Raise ValueError for a student that does not hide what stands before a document."""
    what, instead = {
        "documents": ("across the documents of a packed row", "give it one document a row"),
        "padding": ("padding that stands before a text", "pad on the right"),
    }[before]
    raise ValueError(f"{type(model).__name__} sees {what}, the teacher does not: {instead}")


def _embedding_of(model: Any) -> Any:
    """Return the input embedding of a transformers model; None if the model does not say which it is."""
    return getattr(model, "get_input_embeddings", lambda: None)()
