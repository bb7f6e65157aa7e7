"""Models that may not fit: loaded straight to their device, and refused where one device cannot serve them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ADVICE = "serve it with --backend vllm, divided over GPUs by the engine option tensor_parallel_size (docs/vllm.md)"
ROOM = 0.95
"""Share of a GPU's free memory that weights may take: the pass needs some too."""


def load_weights(folder: Path, *, dtype: str, device: str) -> Any:
    """Load a model's weights to the device without a copy of them in the host's memory.

    Raises ValueError for what does not fit on it, and for quantised weights that this environment cannot compute with.
    """
    target = torch.device(device)
    kind = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if target.type == "cuda":
        needed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        free = torch.cuda.mem_get_info(target)[0]
        if needed > ROOM * free:
            raise ValueError(
                f"{folder} has {needed / 2**30:.1f} GiB of weights, {device} has {free / 2**30:.1f} GiB free: {ADVICE}"
            )
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if target.type != "cpu":
        options["device_map"] = {"": target}
    if kind is None:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    method = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind.quant_method
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # a library that is missing, a device that it does not know: each has its own
        raise ValueError(
            f"{folder} holds weights quantised by {method}, which cannot be loaded here ({error}): {ADVICE}"
        ) from error


def check_one_device(model: Any) -> None:
    """Raise ValueError for a model spread over devices: its layers' hooks move tensors and wait at every layer."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise ValueError(f"{type(model).__name__} is spread over {', '.join(sorted(places))}: {ADVICE}")
