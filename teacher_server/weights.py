"""Where a model's weights lie, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WHOLE_FILE_BYTES = 4 << 30
"""Files up to this size are hashed whole; of larger ones the header and evenly spaced pieces."""
NUM_PIECES = 4096
PIECE_BYTES = 64 << 10


def weights_folder(model: str, revision: str) -> Path:
    """The folder with the safetensors: `model` itself, or the hub's snapshot, downloaded where it is not there yet."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def weights_digest(folder: Path) -> str:
    """SHA-256, hex, over the names and contents of the safetensors files.

    A file over WHOLE_FILE_BYTES counts with its size, its first and last pieces and NUM_PIECES evenly spaced ones, so
    that a model of hundreds of GB is named within seconds. Raises FileNotFoundError where there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}: other formats can run code and are not loaded")
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        digests = list(pool.map(_file_digest, files))
    h = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        h.update(f"{path.name}\0".encode() + digest)
    return h.hexdigest()


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
