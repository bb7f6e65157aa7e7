"""A model's weights on disk: the digest that names them, and when they were written."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from logitstream.files import naming

INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
WHOLE_FILE_BYTES = 4 << 30
"""Files up to this size are hashed whole; of larger ones the size and evenly spaced pieces."""
NUM_PIECES = 4096
PIECE_BYTES = 64 << 10
VOLATILE_SETTINGS = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"})
"""Settings of a config.json that change no logit, or that students learn separately (the served dtype)."""
PERFORMANCE_OPTIONS = """
    block_size cpu_offload_gb disable_log_stats distributed_executor_backend download_dir enable_chunked_prefill
    enforce_eager gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens max_num_seqs
    max_parallel_loading_workers pipeline_parallel_size skip_tokenizer_init swap_space tensor_parallel_size
    use_tqdm_on_load
"""
"""vLLM's options that change only speed and memory; any other may change what is served."""

Stamp = tuple[int, int]
"""When the last of a folder's weight files was written, in ns since the epoch, and the bytes of all of them."""


def weights_folder(model: str, revision: str) -> Path:
    """Return the folder with the safetensors: `model` itself, or the hub's snapshot, downloaded if missing.

    Raises ValueError for an adapter, whose base no digest names, and for a part of a model.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
        with naming("model", model):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        load = f"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
        raise ValueError(
            f"{folder} holds an adapter, not a whole model. Merge it and serve that: python -c "
            f"\"{load}.merge_and_unload().save_pretrained('merged')\", with the tokenizer's files beside it"
        )
    index = folder / INDEX
    shards = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ()
    if missing := sorted(name for name in set(shards) if not (folder / name).is_file()):
        raise ValueError(f"{index} names {len(missing)} files that are not there: {', '.join(missing[:4])}")
    return folder


def weights_digest(folder: Path) -> str:
    """Return the SHA-256, hex, of the safetensors files' names and contents and of the settings in config.json.

    Only the values of config.json count, without VOLATILE_SETTINGS at any depth. Of a file over WHOLE_FILE_BYTES only
    its size, first, last and NUM_PIECES - 1 evenly spaced pieces count, so that hundreds of GB take seconds. Raises
    FileNotFoundError if there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}: other formats can run code and are not loaded")
    h = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        for path, digest in zip(files, pool.map(_file_digest, files), strict=True):
            h.update(f"{path.name}\0".encode() + digest)
    config = folder / "config.json"
    if config.is_file():
        h.update(f"{config.name}\0{_canonical(json.loads(config.read_bytes(), object_hook=_lasting))}".encode())
    return h.hexdigest()


def digest_with_options(digest: str, options: Mapping[str, Any]) -> str:
    """Return the digest of weights served with these engine options; PERFORMANCE_OPTIONS do not change it."""
    relevant = {name: value for name, value in options.items() if name not in PERFORMANCE_OPTIONS.split()}
    return hashlib.sha256(f"{digest}\0{_canonical(relevant)}".encode()).hexdigest() if relevant else digest


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in VOLATILE_SETTINGS}


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


def weights_stamp(folder: Path) -> Stamp:
    """Return a stamp that grows when weights are written, even over others; (0, 0) if there are none."""
    paths = list(folder.glob("*.safetensors"))
    files = [path.stat() for path in (*paths, folder / "config.json") if paths and path.exists()]
    return max((file.st_mtime_ns for file in files), default=0), sum(file.st_size for file in files)


@contextlib.contextmanager
def loading_unchanged(folder: Path) -> Iterator[None]:
    """Raise ValueError at the end if the weights have been written to meanwhile: it may be half of two models."""
    stamp = weights_stamp(folder)
    yield
    if weights_stamp(folder) != stamp:
        raise ValueError(f"{folder} was written to while it was loaded: start again when its weights are whole")
