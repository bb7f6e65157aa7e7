"""Caches in object stores: sealed shards go up in the background and come down when they are first read.

All writing and reading happens in a local staging folder; fsspec moves whole files. An object store has no atomic
rename, so a shard's index goes up before it: a shard that is listed is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from logitstream import metrics
from logitstream.cache.manifest import ID_MODEL, MANIFEST, file_bytes, remove_leftovers

ATTEMPTS = 8
LIST_ATTEMPTS = 2
"""Attempts at listing, which somebody waits for."""
FIRST_PAUSE_SECONDS = 0.1
CLOSE_SECONDS = 600.0
"""How long `close` waits for uploads; the rest goes up when the cache is next opened for writing."""
STAGING_BYTES = 16 << 30
LIST_SECONDS = 10.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


def is_remote(directory: str | Path) -> bool:
    return "://" in str(directory) and not str(directory).startswith("file://")


def local_path(directory: str | Path) -> Path:
    """Return the path of a local directory, given as a path or as file://…"""
    return Path(str(directory).removeprefix("file://"))


def has_manifest(directory: str | Path) -> bool:
    """Return whether there is a cache. Raises OSError if that cannot be found out."""
    if not is_remote(directory):
        return (local_path(directory) / MANIFEST).exists()
    fs, root = fsspec.core.url_to_fs(str(directory))
    fs.invalidate_cache()
    return bool(_retried(lambda: fs.exists(f"{root}/{MANIFEST}"), LIST_ATTEMPTS))


def staging_folder(url: str) -> Path:
    """Return where a remote cache is staged by default: in LOGITSTREAM_STAGING, or ~/.cache/logitstream/staging."""
    root = Path(os.environ.get("LOGITSTREAM_STAGING", Path.home() / ".cache" / "logitstream" / "staging"))
    return root / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class Mirror:
    """A folder in a store and its staging folder here; its methods may be called from any thread.

    Raises OSError once all attempts have failed. More attributes than 12 because a forked process begins some anew.
    """

    def __init__(
        self,
        url: str,
        *,
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self.staging = Path(staging) if staging is not None else staging_folder(url)
        self.staging.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.staging)
        self.sizes: dict[str, int] = {}
        self._staging_bytes, self._listed = staging_bytes, 0.0
        self._replaced: set[Path] = set()
        self._uploads: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="cache-mirror")
        self._url, self._options, self._pid = url, storage_options or {}, -1
        self._reconnect_if_forked()

    def _reconnect_if_forked(self) -> None:
        """Begin connections of this process: a loader's worker cannot use its parent's."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
            self._fs, self._root = fsspec.core.url_to_fs(self._url, **self._options)

    def pull_head(self) -> None:
        """List the store and fetch its manifest and id model."""
        self.list()
        for name in (ID_MODEL, MANIFEST):
            if name in self.sizes:
                self._download(name)

    def list(self) -> None:
        """Look up what is there now, and fetch the indexes of new shards."""
        self._reconnect_if_forked()
        self._listed = time.monotonic()
        self.sizes = _retried(self._list, LIST_ATTEMPTS)
        for name in self.sizes:
            if name.endswith(".index") and not self._is_staged(name):
                self._download(name)

    def list_again(self) -> None:
        """List the store unless that was done a moment ago; ignore a store that is out of reach."""
        if time.monotonic() - self._listed >= LIST_SECONDS:
            try:
                self.list()
            except OSError as error:
                logger.warning("new shards cannot be looked for: %s", error)

    def _list(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries if entry["type"] == "file"}

    def shards(self) -> dict[Path, int]:
        """Return the paths in the staging folder of the store's shards, and their sizes."""
        return {self.staging / name: size for name, size in self.sizes.items() if name.endswith(".arrow")}

    def fetch(self, path: Path, *, again: bool = False) -> bool:
        """Bring a shard of the store to the staging folder if it is not there, or once again because it is damaged.

        Returns False if the store does not have it: it is not uploaded yet.
        """
        self._reconnect_if_forked()
        with self._lock:
            if path.name in self.sizes and (not self._is_staged(path.name) or (again and path not in self._replaced)):
                self._make_room(self.sizes[path.name])
                self._download(path.name)
                self._replaced.update([path] if again else [])
        return path.name in self.sizes

    def push_missing(self) -> None:
        """Upload the manifest of a new cache, and the shards that an earlier run has not uploaded."""
        for name in (ID_MODEL, MANIFEST):
            if name not in self.sizes and (self.staging / name).exists():
                self._upload(name)
        for path in sorted(self.staging.glob("*.arrow")):
            if path.name not in self.sizes:
                self.push_later(path)

    def push_later(self, path: Path) -> None:
        """Upload a sealed shard in the background."""
        self._uploads.append(self._pool.submit(self._push, path))

    def _push(self, path: Path) -> None:
        try:
            self._upload(path.with_suffix(".index").name)
            self._upload(path.name)
            self._make_room(0)
        except Exception as error:
            metrics.CACHE_WRITE_ERRORS.inc()
            logger.warning("%s stays in the staging folder until the cache is opened again: %s", path.name, error)

    def close(self) -> None:
        """Wait for what is under way."""
        unfinished = wait(self._uploads, timeout=CLOSE_SECONDS).not_done
        if unfinished:
            logger.warning("%d shards of %s are not uploaded yet: open the cache again", len(unfinished), self._root)
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)

    def _is_staged(self, name: str) -> bool:
        """Return whether a file is here, as long as in the store."""
        path = self.staging / name
        return path.exists() and file_bytes(path) == self.sizes[name]

    def _make_room(self, more: int) -> None:
        """Drop the shards that were staged longest ago and are in the store, to keep to the bound."""
        staged = sorted(self.staging.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
        total = more + sum(map(file_bytes, staged))
        for path in staged:
            size = file_bytes(path)
            if total > self._staging_bytes and self.sizes.get(path.name) == size:
                path.unlink(missing_ok=True)
                total -= size

    def _download(self, name: str) -> None:
        partial = self.staging / f".{name}.{uuid.uuid4().hex}"
        try:
            _retried(lambda: self._get(name, partial))
            partial.replace(self.staging / name)
        finally:
            partial.unlink(missing_ok=True)

    def _get(self, name: str, partial: Path) -> None:
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        if (size := partial.stat().st_size) != self.sizes.get(name):
            raise OSError(f"{name} came with {size} bytes, expected {self.sizes.get(name)}")

    def _upload(self, name: str) -> None:
        path = self.staging / name
        _retried(lambda: self._fs.put_file(str(path), f"{self._root}/{name}"))
        self.sizes[name] = path.stat().st_size


def _retried(operation: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """Try an operation on a store several times, with growing pauses; then raise OSError."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return operation()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            logger.info("%s; attempt %d of %d", error, attempt + 1, attempts)
            failure = error
    raise OSError(str(failure)) from failure
