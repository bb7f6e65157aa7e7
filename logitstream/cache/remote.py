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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec

from logitstream import metrics
from logitstream.cache.manifest import ID_MODEL, MANIFEST, parse_manifest, read_manifest, remove_leftovers
from logitstream.errors import CacheError

ATTEMPTS = 8
LIST_ATTEMPTS = 2
"""Attempts at listing, which somebody waits for."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
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
    return bool(_retried(root, lambda: fs.exists(f"{root}/{MANIFEST}"), LIST_ATTEMPTS))


def staging_folder(url: str) -> Path:
    """Return where a remote cache is staged by default: in LOGITSTREAM_STAGING, or ~/.cache/logitstream/staging."""
    root = Path(os.environ.get("LOGITSTREAM_STAGING", Path.home() / ".cache" / "logitstream" / "staging"))
    return root / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


@contextmanager
def downloaded(directory: str) -> Iterator[Path]:
    """Yield a folder with all files of a cache as they are in the store now; it is removed afterwards."""
    if not is_remote(directory):
        yield local_path(directory)
        return
    parent = staging_folder(directory).parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent) as folder:
        mirror = Mirror(directory, staging=folder, staging_bytes=1 << 62)
        mirror.pull_head()
        for path in mirror.shards():
            mirror.fetch(path)
        mirror.close()
        yield Path(folder)


class Mirror:
    """A remote directory and its staging folder; its methods may be called from any thread.

    Raises OSError once all attempts have failed.
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
        self._staging_bytes = staging_bytes
        self._listed = 0.0
        self.url, self._storage_options = url, storage_options or {}
        self._connect()

    def _connect(self) -> None:
        """Start the threads and connections of this process."""
        self._pid = os.getpid()
        self._fs, self._root = fsspec.core.url_to_fs(self.url, **self._storage_options)
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="cache-mirror")
        self._lock = threading.Lock()
        self._moving: dict[tuple[str, str], Future[None]] = {}

    def pull_head(self) -> None:
        """List the store and fetch its manifest and id model; CacheError if another cache is staged here."""
        self.list()
        if MANIFEST in self.sizes and (self.staging / MANIFEST).exists():
            content = self._try(lambda: self._fs.cat_file(f"{self._root}/{MANIFEST}"))
            found = mine = parse_manifest(content, self.staging / MANIFEST).fingerprint
            with suppress(CacheError):  # a staged one that is damaged is replaced
                mine = read_manifest(self.staging).fingerprint
            if mine != found:
                raise CacheError(
                    f"{self.staging} holds the staged shards of another cache than {self._root} (there against "
                    f"here): {mine.differences(found)}: remove it or choose another staging folder"
                )
        for name in (ID_MODEL, MANIFEST):
            if name in self.sizes:
                self._download(name)

    def list(self) -> None:
        """Look up what is there now, and fetch the indexes of new shards."""
        self._listed = time.monotonic()
        self.sizes = self._try(self._list, attempts=LIST_ATTEMPTS)
        for shard in self.shards():
            index = shard.with_suffix(".index").name
            if index in self.sizes and not self._is_staged(index):
                self._download(index)

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

    def fetch(self, path: Path, *ahead: Path) -> None:
        """Wait until a shard is in the staging folder, and begin to fetch the ones that are read after it."""
        futures = [self._move("down", one, self._fetch, self._is_staged(one.name)) for one in (path, *ahead)]
        futures[0].result()

    def _fetch(self, name: str) -> None:
        if not self._is_staged(name):
            self._make_room(self.sizes.get(name, 0))
            self._download(name)

    def fetch_again(self, path: Path) -> bool:
        """Replace a damaged staged shard by the store's, once; return False if the store does not have it."""
        if path.name not in self.sizes:  # not uploaded yet: the only copy
            return False
        self._move("again", path, self._download, True).result()
        return True

    def _move(self, how: str, path: Path, work: Callable[[str], None], is_done: bool) -> Future[None]:
        """Have a file moved by a thread, unless that is under way or has been done."""
        if self._pid != os.getpid():  # a loader's forked worker: threads and connections stayed with its parent
            self._connect()
        with self._lock:
            found = self._moving.get((how, path.name))
            if found is None or (found.done() and not is_done):
                found = self._moving[how, path.name] = self._pool.submit(work, path.name)
            return found

    def _is_staged(self, name: str) -> bool:
        """Return whether a file is here, as long as in the store."""
        try:
            size = (self.staging / name).stat().st_size
        except FileNotFoundError:
            return False
        return self.sizes.get(name, size) == size

    def push_later(self, path: Path) -> None:
        """Upload a sealed shard in the background."""
        self._move("up", path, self._push, False)

    def push_missing(self) -> None:
        """Upload the manifest of a new cache, and the shards that an earlier run has not uploaded."""
        for name in (ID_MODEL, MANIFEST):
            if name not in self.sizes and (self.staging / name).exists():
                self._upload(name)
        for path in sorted(self.staging.glob("*.arrow")):
            if path.name not in self.sizes:
                self.push_later(path)

    def _push(self, name: str) -> None:
        try:
            self._upload(f"{name.removesuffix('.arrow')}.index")
            self._upload(name)
        except Exception as error:
            metrics.CACHE_WRITE_ERRORS.inc()
            logger.warning("%s stays in the staging folder until the cache is opened again: %s", name, error)
            return
        self._make_room(0)

    def close(self) -> None:
        """Wait for uploads."""
        with self._lock:
            moving = [future for (how, _), future in self._moving.items() if how == "up"]
        unfinished = wait_for(moving, timeout=CLOSE_SECONDS).not_done
        if unfinished:
            logger.warning("%d shards of %s are not uploaded yet: open the cache again", len(unfinished), self._root)
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)

    def _make_room(self, more: int) -> None:
        """Drop the shards that were staged longest ago and are in the store, to keep to the bound."""
        with self._lock:
            staged = [(path.stat().st_mtime, path, path.stat().st_size) for path in self.staging.glob("*.arrow")]
            total = sum(size for *_, size in staged) + more
            for _, path, size in sorted(staged):
                if total > self._staging_bytes and self.sizes.get(path.name) == size:
                    path.unlink(missing_ok=True)
                    total -= size

    def _download(self, name: str) -> None:
        partial = self.staging / f".{name}.{uuid.uuid4().hex}"
        try:
            self._try(lambda: self._get(name, partial))
            partial.replace(self.staging / name)
        finally:
            partial.unlink(missing_ok=True)

    def _get(self, name: str, partial: Path) -> None:
        self._fs.get_file(f"{self._root}/{name}", str(partial))
        if partial.stat().st_size != self.sizes.get(name):
            raise OSError(f"{name} came with {partial.stat().st_size} bytes, expected {self.sizes.get(name)}")

    def _upload(self, name: str) -> None:
        path = self.staging / name
        self._try(lambda: self._fs.put_file(str(path), f"{self._root}/{name}"))
        self.sizes[name] = path.stat().st_size

    def _try(self, operation: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        return _retried(self._root, operation, attempts)


def _retried(root: str, operation: Callable[[], T], attempts: int) -> T:
    """Try an operation on a store several times, with growing pauses; then raise OSError."""
    pause = FIRST_PAUSE_SECONDS
    for left in reversed(range(attempts)):
        try:
            return operation()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if not left:
                raise OSError(f"{root}: {error}") from error
            logger.info("%s: %s; trying again", root, error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise AssertionError("the last attempt returns or raises")
