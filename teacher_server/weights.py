"""Where a model's weights lie, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WHOLE_FILE_BYTES = 4 << 30
"""Files up to this size are hashed whole; of larger ones the header and evenly spaced pieces."""
NUM_PIECES = 4096
PIECE_BYTES = 64 << 10
VOLATILE_SETTINGS = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"})
"""Of a config.json: they change no logit, or are told elsewhere (the dtype that is served)."""
PERFORMANCE_OPTIONS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "skip_tokenizer_init",
        "swap_space",
        "tensor_parallel_size",
        "use_tqdm_on_load",
    }
)
"""vLLM's options that change speed and memory alone; any other may change what is served."""


def weights_folder(model: str, revision: str) -> Path:
    """The folder with the safetensors: `model` itself, or the hub's snapshot, downloaded where it is not there yet."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def weights_digest(folder: Path) -> str:
    """SHA-256, hex, over the names and contents of the safetensors files and what config.json makes of them.

    Of config.json its values count, not how they are written, without VOLATILE_SETTINGS at any depth. A weights file
    over WHOLE_FILE_BYTES counts with its size, its first and last pieces and NUM_PIECES evenly spaced ones, so that a
    model of hundreds of GB is named within seconds. Raises FileNotFoundError where there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}: other formats can run code and are not loaded")
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        digests = list(pool.map(_file_digest, files))
    h = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        h.update(f"{path.name}\0".encode() + digest)
    config = folder / "config.json"
    if config.is_file():
        h.update(f"{config.name}\0{_canonical(_lasting(json.loads(config.read_bytes())))}".encode())
    return h.hexdigest()


def digest_with_options(digest: str, options: Mapping[str, Any]) -> str:
    """The digest of weights that an engine serves with these options: the same where only its speed is concerned."""
    relevant = {name: value for name, value in options.items() if name not in PERFORMANCE_OPTIONS}
    return hashlib.sha256(f"{digest}\0{_canonical(relevant)}".encode()).hexdigest() if relevant else digest


def _lasting(value: Any) -> Any:
    """A JSON value without VOLATILE_SETTINGS."""
    if isinstance(value, dict):
        return {name: _lasting(inner) for name, inner in value.items() if name not in VOLATILE_SETTINGS}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        h = hashlib.sha256(f"sampled {size}".encode())
        for piece in range(NUM_PIECES + 1):
            file.seek(piece * (size - PIECE_BYTES) // NUM_PIECES)
            h.update(file.read(PIECE_BYTES))
        return h.digest()


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint is all there: a config, and every safetensors file as long as its header says."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        return all(_is_whole(folder / name) for name in names)
    except (OSError, ValueError, KeyError):
        return False


def _is_whole(path: Path) -> bool:
    """safetensors: 8 bytes with the header's length, a JSON header, the data up to the largest `data_offsets`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > size:
            return False
        header = json.loads(file.read(header_bytes))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and size == 8 + header_bytes + max(ends)
