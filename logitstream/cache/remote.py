"""Caches in object stores: sealed shards go up in the background and come down when they are read.

All writing and reading happens in a local staging folder; fsspec moves whole files. An object store has no atomic
rename, so a shard's sidecars go up before it: a shard that is listed is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec

from logitstream import metrics
from logitstream.cache.manifest import (
    ID_MODEL,
    MANIFEST,
    manifest_fingerprint,
    parse,
    read_entry,
    read_id_model,
    read_manifest,
    remove_leftovers,
)
from logitstream.errors import CacheError

ATTEMPTS = 8
LIST_ATTEMPTS = 2
"""Of listing, which somebody waits for."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
CLOSE_SECONDS = 600.0
"""How long `close` waits for uploads; what is left goes up when the cache is next opened for writing."""
PREFETCHED_SHARDS = 2
STAGING_BYTES = 16 << 30
LIST_SECONDS = 10.0
SIDECARS = (".index", ".json")
FRESH_PREFIX = "fresh-"
DAY_SECONDS = 86_400.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


def is_remote(directory: str | Path) -> bool:
    return "://" in str(directory) and not str(directory).startswith("file://")


def local_path(directory: str | Path) -> Path:
    """A local directory, given as a path or as file://…"""
    return Path(str(directory).removeprefix("file://"))


def has_manifest(directory: str | Path) -> bool:
    """Whether there is a cache. Raises OSError where that cannot be found out."""
    if not is_remote(directory):
        return (local_path(directory) / MANIFEST).exists()
    fs, root = fsspec.core.url_to_fs(str(directory))
    fs.invalidate_cache()
    return bool(_retried(root, lambda: fs.exists(f"{root}/{MANIFEST}"), LIST_ATTEMPTS))


@contextmanager
def fetched(directory: str, *, fresh: bool = False) -> Iterator[Path]:
    """A local folder with all files of a cache, for tools that read it as a whole.

    fresh: what is staged already is not used, and nothing stays; else staged shards are those of the store.
    """
    if not is_remote(directory):
        yield local_path(directory)
        return
    staging = staging_folder(directory)
    with ExitStack() as resources:
        if fresh:
            staging = Path(resources.enter_context(_new_folder(staging.parent)))
        mirror = Mirror(directory, staging=staging, staging_bytes=1 << 62)
        resources.callback(mirror.close)
        mirror.pull_head()
        for path in mirror.shards():
            mirror.fetch(path)
            if not fresh and _is_damaged(path):
                mirror.fetch_again(path)
        yield staging


def _new_folder(parent: Path) -> TemporaryDirectory[str]:
    """One that goes with its context; what killed processes left of theirs a day ago goes now."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{FRESH_PREFIX}*"):
        if time.time() - old.stat().st_mtime > DAY_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return TemporaryDirectory(dir=parent, prefix=FRESH_PREFIX)


def _is_damaged(shard: Path) -> bool:
    """Whether its bytes are not those that its entry names."""
    try:
        entry = read_entry(shard)
    except CacheError:
        return False
    with shard.open("rb") as file:
        return bool(hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"])


def staging_folder(url: str) -> Path:
    """Where a remote cache is staged by default: below LOGITSTREAM_STAGING, or ~/.cache/logitstream/staging."""
    root = Path(os.environ.get("LOGITSTREAM_STAGING", Path.home() / ".cache" / "logitstream" / "staging"))
    return root / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class Mirror:
    """A remote directory and its staging folder; safe from several threads. Raises OSError once retries are used up."""

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
        self._remote = (url, storage_options or {})
        self._staging_bytes = staging_bytes
        self.sizes: dict[str, int] = {}
        self._listed = 0.0
        self._connect()

    def _connect(self) -> None:
        """Threads and connections of this process."""
        url, storage_options = self._remote
        self._pid = os.getpid()
        self._fs, self._root = fsspec.core.url_to_fs(url, **storage_options)
        self._pool = ThreadPoolExecutor(PREFETCHED_SHARDS + 1, thread_name_prefix="cache-mirror")
        self._lock = threading.Lock()
        self._fetching: dict[str, Future[None]] = {}
        self._fetched_again: dict[str, Future[None]] = {}
        self._uploads: set[Future[None]] = set()

    def pull_head(self) -> None:
        """The manifest and the id model, where the remote has them; CacheError where another cache is staged there."""
        self.list()
        for name in (ID_MODEL, MANIFEST):
            if name in self.sizes and not (self.staging / name).exists():
                self._download(name)
        if MANIFEST in self.sizes:
            theirs = self._try(lambda: self._fs.cat_file(f"{self._root}/{MANIFEST}"))
            found = manifest_fingerprint(parse(theirs, self.staging / MANIFEST), self.staging / MANIFEST)
            try:
                mine = manifest_fingerprint(read_manifest(self.staging), self.staging)
            except CacheError:  # the staged one is damaged
                self._download(MANIFEST)
                mine = found
            if mine != found:
                raise CacheError(
                    f"{self.staging} holds the staged shards of another cache than {self._root} (there against "
                    f"here): {mine.differences(found)}: remove it or choose another staging folder"
                )
            if ID_MODEL in self.sizes:
                try:
                    read_id_model(self.staging, mine)
                except CacheError:
                    self._download(ID_MODEL)

    def push_head(self) -> None:
        for name in (ID_MODEL, MANIFEST):
            if name not in self.sizes and (self.staging / name).exists():
                self._upload(name)

    def list(self) -> None:
        """Look up what is there now, and fetch the sidecars of new shards."""
        self._listed = time.monotonic()
        self.sizes = self._try(self._list, attempts=LIST_ATTEMPTS)
        for name in self.sizes:
            if name.endswith(".arrow"):
                for suffix in SIDECARS:
                    sidecar = name.removesuffix(".arrow") + suffix
                    if sidecar in self.sizes and not self._is_staged(sidecar):
                        self._download(sidecar)

    def list_again(self) -> None:
        """As `list`, but not too often; what was known stays known while the remote cannot be reached."""
        if time.monotonic() - self._listed < LIST_SECONDS:
            return
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
        """Sealed shards of the remote as their paths in the staging folder, and their sizes."""
        return {self.staging / name: size for name, size in self.sizes.items() if name.endswith(".arrow")}

    def fetch(self, path: Path, *, ahead: Path | None = None) -> None:
        """Make a shard be in the staging folder; begin with the one that is read after it."""
        if self._pid != os.getpid():  # a loader's worker, forked off: threads and connections stayed with its parent
            self._connect()
        if ahead is not None:
            self._fetch(ahead)
        self._fetch(path).result()

    def _fetch(self, path: Path) -> Future[None]:
        with self._lock:
            found = self._fetching.get(path.name)
            if found is None or (found.done() and (found.exception() is not None or not self._is_staged(path.name))):
                found = self._fetching[path.name] = self._pool.submit(self._fetch_now, path)
            return found

    def _fetch_now(self, path: Path) -> None:
        if not self._is_staged(path.name):
            self._make_room(self.sizes.get(path.name, 0))
            self._download(path.name)

    def _is_staged(self, name: str) -> bool:
        """Whether a file is here, as long as in the remote."""
        try:
            size = (self.staging / name).stat().st_size
        except FileNotFoundError:
            return False
        return self.sizes.get(name, size) == size

    def fetch_again(self, path: Path) -> bool:
        """Put the store's shard in the place of a staged one that is damaged, once; whether it may have changed."""
        if self._pid != os.getpid():
            self._connect()
        with self._lock:
            if path.name not in self.sizes:  # not uploaded yet: the only copy
                return False
            future = self._fetched_again.get(path.name)
            if future is None:
                logger.warning("%s is damaged: it is fetched again", path)
                future = self._fetched_again[path.name] = self._pool.submit(self._download, path.name)
        future.result()
        return True

    def push_later(self, path: Path) -> None:
        """Upload a sealed shard in the background."""
        future = self._pool.submit(self._push, path)
        with self._lock:
            self._uploads.add(future)

    def push_missing(self) -> None:
        """Upload what an earlier run has sealed and not uploaded."""
        for path in sorted(self.staging.glob("*.arrow")):
            if path.name not in self.sizes:
                self.push_later(path)

    def _push(self, path: Path) -> None:
        try:
            for suffix in (*SIDECARS, ".arrow"):
                self._upload(path.with_suffix(suffix).name)
        except Exception as error:
            metrics.CACHE_WRITE_ERRORS.inc()
            logger.warning("%s stays in the staging folder until the cache is opened again: %s", path, error)
            return
        self._make_room(0)

    def close(self) -> None:
        """Wait for uploads."""
        with self._lock:
            uploads = list(self._uploads)
        unfinished = wait_for(uploads, timeout=CLOSE_SECONDS).not_done
        if unfinished:
            logger.warning("%d shards of %s are not uploaded yet: open the cache again", len(unfinished), self._root)
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)

    def _make_room(self, more: int) -> None:
        """Drop the shards that were staged longest ago and lie in the remote, to keep to the bound."""
        with self._lock:
            staged = [(path.stat().st_mtime, path, path.stat().st_size) for path in self.staging.glob("*.arrow")]
            total = sum(size for *_, size in staged) + more
            for _, path, size in sorted(staged):
                if total <= self._staging_bytes:
                    break
                if self.sizes.get(path.name) == size:
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
    """Object stores fail now and then: pause and try again, a bounded number of times; then OSError."""
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
