"""Where a model's weights lie, and the digest that names them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from logitstream.files import naming

INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
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


class WeightsChanged(ValueError):
    """Raised where weights are written to while they are loaded, which may then be half of two models."""


def weights_folder(model: str, revision: str, *, with_code: bool = False) -> Path:
    """The folder with the safetensors: `model` itself, or the hub's snapshot, downloaded where it is not there yet.

    with_code: its Python files too. Raises ValueError where the folder holds a part of a model alone.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *["*.py"] * with_code]
        with naming("model", model):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    refuse_adapter(folder)
    _refuse_missing_shards(folder)
    return folder


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError where the folder holds an adapter: it would be served on a base that no digest names."""
    adapter = next((name for name in ADAPTER_FILES if (folder / name).is_file()), "")
    if not adapter:
        return
    load = f"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    raise ValueError(
        f"{folder} holds an adapter ({adapter}) on {_base_of(folder)}, not a whole model. Merge it and serve that: "
        f"python -c \"{load}.merge_and_unload().save_pretrained('merged')\", with the tokenizer's files beside it; or "
        "move the adapter's files out, where the folder's own weights are meant"
    )


def _refuse_missing_shards(folder: Path) -> None:
    if missing := sorted(name for name in _named_shards(folder) if not (folder / name).is_file()):
        raise ValueError(f"{folder / INDEX} names {len(missing)} files that are not there: {', '.join(missing[:4])}")


def _base_of(folder: Path) -> str:
    try:
        return repr(json.loads((folder / ADAPTER_FILES[0]).read_bytes())["base_model_name_or_path"])[:200]
    except (OSError, ValueError, KeyError, TypeError):
        return "a model that is not named"


def _named_shards(folder: Path) -> set[str]:
    """The files that the index names, where there is one; raises ValueError or KeyError for one that is none."""
    index = folder / INDEX
    return set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()


def weights_digest(folder: Path, *, with_code: bool = False) -> str:
    """SHA-256, hex, over the names and contents of the safetensors files and what config.json makes of them.

    with_code: the folder's Python files count too, for an engine that runs them; ValueError where config.json takes
    code from another repository, which nothing here can name.

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
        values = json.loads(config.read_bytes())
        h.update(f"{config.name}\0{_canonical(_lasting(values))}".encode())
        if with_code and "--" in _canonical(values.get("auto_map", {})):
            raise ValueError(f"{config} takes code from another repository: copy it into the folder, and name it there")
    for path in sorted(folder.rglob("*.py")) if with_code else ():
        h.update(f"{path.relative_to(folder)}\0".encode() + _file_digest(path))
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
    try:
        return all(_is_whole(folder / name) for name in _named_shards(folder) or {"model.safetensors"})
    except (OSError, ValueError, KeyError):
        return False


def weights_stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """When and where each file that makes a model was written last, and its length: equal while nothing is written."""
    stats = {path.name: path.stat() for kind in ("*.safetensors", "*.json") for path in folder.glob(kind)}
    return {name: (stat.st_mtime_ns, stat.st_ino, stat.st_size) for name, stat in stats.items()}


def is_being_written(folder: Path) -> bool:
    """Whether a process of this machine has one of the safetensors files open for writing; false where nobody can tell.

    A file of the right length may be half the old one and half the new one while it is written over in place. A read
    lease is given only on a file that no one writes to; it is given back at once, and its signal would be ignored.
    """
    return any(_is_open_for_writing(path) for path in folder.glob("*.safetensors"))


def _is_open_for_writing(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:  # another error: another user's file, or a file system without leases
        return error.errno == errno.EAGAIN
    finally:
        os.close(file)
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
