"""Disks that stop answering: a frozen file system, and a named pipe in the place of a file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class FreezingDisk:
    """A small file system, mounted; while it is frozen, writes to it wait for ever, and no signal ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", str(self.folder)], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", str(self.folder)], check=False, capture_output=True)


@contextmanager
def freezing_disk(tmp_path: Path, *, megabytes: int = 24) -> Iterator[FreezingDisk]:
    """Skips the test where file systems cannot be made and mounted."""
    image, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    for command in (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system cannot be made and mounted here; the tests with a pipe cover it")
    disk = FreezingDisk(folder)
    try:
        yield disk
    finally:
        disk.thaw()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def hanging_file(path: Path) -> Iterator[None]:
    """Whoever opens the file waits; afterwards it is what it was, and those who wait get on."""
    kept = path.with_name(f".{path.name}.kept")
    path.rename(kept)
    os.mkfifo(path)
    pipe = path.with_name(f".{path.name}.pipe")
    os.link(path, pipe)
    try:
        yield
    finally:
        kept.rename(path)
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # opening both ends ends the waiting
        pipe.unlink()
