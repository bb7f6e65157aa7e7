"""The checkpoint of a watched folder that is served, and when."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from teacher_server.backend import TeacherBackend
from teacher_server.checkpoints import Checkpoints, watch_checkpoints
from teacher_server.weights import loading_unchanged
from tests.fakes import FakeBackend

EVERY_SECONDS = 0.01


def save(folder: Path, value: float, *, written_at: int = 0) -> Path:
    """A checkpoint whose one weight is `value`; written_at: in s, or now."""
    folder.mkdir(exist_ok=True)
    (folder / "optimizer.pt").write_bytes(b"x")
    for name, content in (("config.json", b"{}"), ("model.safetensors", struct.pack("<f", value))):
        (folder / name).write_bytes(content)
        if written_at:
            os.utime(folder / name, (written_at, written_at))
    return folder


def value_of(folder: Path) -> float:
    return float(struct.unpack("<f", (folder / "model.safetensors").read_bytes()[-4:])[0])


class Watched:
    """A record of what a watcher loaded, as the values of the weights, and what it served."""

    def __init__(self, while_loading: Callable[[Path], None]) -> None:
        self.loaded: list[float] = []
        self.served: list[TeacherBackend] = []
        self.while_loading = while_loading
        self.has_looked = asyncio.Event()

    def load(self, folder: Path) -> TeacherBackend:
        with loading_unchanged(folder):  # as the real backend does
            self.loaded.append(value_of(folder))
            self.while_loading(folder)
        return FakeBackend()

    async def serve(self, backend: TeacherBackend) -> None:
        self.served.append(backend)

    async def until_loaded(self, *values: float) -> None:
        """Wait for these loads and a few looks more, in which a wrong one would follow."""
        async with asyncio.timeout(20):
            while len(self.loaded) < len(values):
                await asyncio.sleep(EVERY_SECONDS)
        await asyncio.sleep(10 * EVERY_SECONDS)
        assert self.loaded == list(values)


@contextlib.asynccontextmanager
async def watching(
    folder: Path, *, while_loading: Callable[[Path], None] = lambda _folder: None
) -> AsyncIterator[Watched]:
    watched = Watched(while_loading)
    task = asyncio.ensure_future(
        watch_checkpoints(
            folder,
            every_seconds=EVERY_SECONDS,
            load=watched.load,
            replace=watched.serve,
            has_looked=watched.has_looked,
        )
    )
    try:
        yield watched
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_older_checkpoint_is_not_the_newest_because_files_beside_its_weights_are_deleted(
    tmp_path: Path,
) -> None:
    old = save(tmp_path / "checkpoint-1", 1.0, written_at=1000)
    save(tmp_path / "checkpoint-2", 2.0, written_at=2000)
    (old / "optimizer.pt").unlink()  # a rotation begins
    async with watching(tmp_path) as watched:
        await watched.until_loaded(2.0)


async def test_deleting_the_newest_checkpoint_does_not_bring_back_the_one_before(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1", 1.0)
    async with watching(tmp_path) as watched:
        await watched.until_loaded(1.0)
        newest = save(tmp_path / "checkpoint-2", 2.0)
        await watched.until_loaded(1.0, 2.0)
        shutil.rmtree(newest)
        await watched.until_loaded(1.0, 2.0)
        save(tmp_path / "checkpoint-3", 3.0)
        await watched.until_loaded(1.0, 2.0, 3.0)


async def test_a_checkpoint_written_over_the_one_before_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "latest", 1.0)
    async with watching(tmp_path) as watched:
        await watched.until_loaded(1.0)
        save(tmp_path / "latest", 2.0)
        await watched.until_loaded(1.0, 2.0)
        assert len(watched.served) == 2


async def test_weights_that_are_replaced_while_they_are_loaded_are_loaded_again(tmp_path: Path) -> None:
    save(tmp_path / "latest", 1.0, written_at=1000)
    pending = [2.0]

    def while_loading(folder: Path) -> None:
        if pending:
            save(folder, pending.pop())

    async with watching(tmp_path, while_loading=while_loading) as watched:
        await watched.until_loaded(1.0, 2.0)
        assert len(watched.served) == 1


async def test_where_the_newest_cannot_be_loaded_the_one_before_is_served(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1", 1.0, written_at=1000)
    save(tmp_path / "checkpoint-2", 2.0, written_at=2000)

    def while_loading(folder: Path) -> None:
        if folder.name == "checkpoint-2":
            raise MemoryError

    async with watching(tmp_path, while_loading=while_loading) as watched:
        await watched.has_looked.wait()
        assert len(watched.served) == 1  # by then: a server that starts again begins with it
        await watched.until_loaded(2.0, 1.0)
        assert len(watched.served) == 1


async def test_a_folder_that_cannot_be_read_is_reported_and_read_when_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "checkpoint-1", 1.0)
    looks, list_folder = 0, Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        nonlocal looks
        looks += 1
        if 1 < looks <= 10:
            raise PermissionError(13, "Permission denied", str(folder))
        return list_folder(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    async with watching(tmp_path) as watched:
        await watched.until_loaded(1.0)
        save(tmp_path / "checkpoint-2", 2.0)
        await watched.until_loaded(1.0, 2.0)
    assert looks > 10
    assert "Permission denied" in caplog.text


def test_a_checkpoint_settles_by_the_clock_of_its_files_or_by_what_is_seen_of_them(tmp_path: Path) -> None:
    now = int(time.time())
    checkpoints = Checkpoints(tmp_path, settled_seconds=60.0)
    folder = save(tmp_path / "latest", 1.0)
    assert checkpoints.newest() is None
    assert checkpoints.is_waiting
    save(folder, 1.0, written_at=now + 1000)  # another machine's clock
    assert checkpoints.newest() is None
    save(folder, 1.0, written_at=now - 61)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1] == folder
    checkpoints.refused.add(newest)
    assert checkpoints.newest() is None
    assert not checkpoints.is_waiting
    save(folder, 1.0, written_at=now + 1000)
    assert Checkpoints(tmp_path, settled_seconds=0.0).newest() is not None
