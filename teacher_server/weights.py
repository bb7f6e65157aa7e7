"""A model's weights on disk: the digest that names them, and whether they are complete and at rest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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


class WeightsChanged(ValueError):
    """The weights were written to while they were loaded: what was loaded may be half of two models."""


def weights_folder(model: str, revision: str, *, with_code: bool = False) -> Path:
    """Return the folder with the safetensors: `model` itself, or the hub's snapshot, downloaded if missing.

    with_code: download Python files too. Raises ValueError if the folder holds only part of a model.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *["*.py"] * with_code]
        with naming("model", model):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    refuse_adapter(folder)
    if missing := sorted(name for name in _named_shards(folder) if not (folder / name).is_file()):
        raise ValueError(f"{folder / INDEX} names {len(missing)} files that are not there: {', '.join(missing[:4])}")
    return folder


def refuse_adapter(folder: Path) -> None:
    """Raise ValueError if the folder holds an adapter: it would be served on a base that no digest names."""
    adapter = next((name for name in ADAPTER_FILES if (folder / name).is_file()), "")
    if not adapter:
        return
    try:
        base = repr(json.loads((folder / ADAPTER_FILES[0]).read_bytes())["base_model_name_or_path"])[:200]
    except (OSError, ValueError, KeyError, TypeError):
        base = "a model that is not named"
    load = f"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    raise ValueError(
        f"{folder} holds an adapter ({adapter}) on {base}, not a whole model. Merge it and serve that: "
        f"python -c \"{load}.merge_and_unload().save_pretrained('merged')\", with the tokenizer's files beside it; or "
        "move the adapter's files out, if the folder's own weights are meant"
    )


def weights_digest(folder: Path, *, with_code: bool = False) -> str:
    """Return the SHA-256, hex, of the safetensors files' names and contents and of the settings in config.json.

    Only the values of config.json count, without VOLATILE_SETTINGS at any depth. Of a file over WHOLE_FILE_BYTES only
    its size, first, last and NUM_PIECES - 1 evenly spaced pieces count, so that hundreds of GB take seconds.
    with_code: the folder's Python files count too, for an engine that runs them; ValueError if config.json takes code
    from another repository. Raises FileNotFoundError if there is no safetensors file.
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
    """Return the digest of weights served with these engine options; PERFORMANCE_OPTIONS do not change it."""
    relevant = {name: value for name, value in options.items() if name not in PERFORMANCE_OPTIONS.split()}
    return hashlib.sha256(f"{digest}\0{_canonical(relevant)}".encode()).hexdigest() if relevant else digest


def _lasting(value: Any) -> Any:
    """Return a JSON value without VOLATILE_SETTINGS."""
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


def _named_shards(folder: Path) -> set[str]:
    """Return the files that the index names, if there is one; raise ValueError or KeyError if it is no index."""
    index = folder / INDEX
    return set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()


def is_complete(folder: Path) -> bool:
    """Return True if a checkpoint is all there: a config, and every safetensors file as long as its header says.

    Raises ValueError for a file that is no safetensors file and will not become one.
    """
    if not (folder / "config.json").is_file():
        return False
    try:
        for name in _named_shards(folder) or {"model.safetensors"}:
            with safe_open(folder / name, framework="numpy"):
                pass
    except SafetensorError as error:
        if "invalid JSON" in str(error):
            raise ValueError(f"{folder}: {error}") from error
        return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def weights_stamp(folder: Path) -> Stamp:
    """Return a stamp that grows when weights are written, even over others, but not when other files are deleted."""
    files = [path.stat() for path in folder.glob("*.safetensors")]
    return max((file.st_mtime_ns for file in files), default=0), sum(file.st_size for file in files)


@contextlib.contextmanager
def loading_unchanged(folder: Path) -> Iterator[None]:
    """Raise WeightsChanged at the end if the weights have been written to meanwhile."""
    stamp = weights_stamp(folder)
    yield
    if weights_stamp(folder) != stamp or is_being_written(folder):
        raise WeightsChanged(f"{folder} is written to while it is loaded: start again when its weights are whole")


def is_being_written(folder: Path) -> bool:
    """Return True if a process of this machine has a safetensors file open for writing; False if that is unknown.

    A file that is overwritten in place has the right length while it is half old and half new.
    """
    return any(_has_writer(path) for path in folder.glob("*.safetensors"))


def _has_writer(path: Path) -> bool:
    """Ask for a read lease, which the kernel refuses while anyone has the file open for writing."""
    try:
        with path.open("rb") as file:
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # a signal that is ignored, if the lease is broken
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, or a file system without leases
        return False
    return False
