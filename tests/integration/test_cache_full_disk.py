"""A full disk, a failing write or the budget end the writing with one warning; what was acknowledged stays."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from tests.integration.crashing_writer import FINGERPRINT, record

LIMITED = """
import resource, signal, sys
from logitstream.cache import CacheWriter
from tests.integration.crashing_writer import FINGERPRINT, record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writer = CacheWriter(sys.argv[1], FINGERPRINT, batch_bytes=5_000)
acknowledged = 0
for number in range(200):
    writer.put(*record(0, number)[:5])
    acknowledged = number + 1 if writer.flush() else acknowledged
writer.close()
print(acknowledged)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here; the test with a file size limit covers it")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def write_all(writer: CacheWriter, count: int) -> int:
    """How many of so many records were acknowledged."""
    acknowledged = 0
    for number in range(count):
        writer.put(*record(0, number)[:5])
        acknowledged = number + 1 if writer.flush() else acknowledged
    writer.close()
    return acknowledged


def check_acknowledged(directory: Path, acknowledged: int, count: int) -> None:
    assert 0 < acknowledged < count
    reader = CacheReader(directory, FINGERPRINT)
    assert len(reader) >= acknowledged
    for number in range(acknowledged):
        assert reader.get(record(0, number).key) == record(0, number).payload
    assert not reader.damaged


def test_a_full_disk_ends_the_writing_and_nothing_else(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = metrics.CACHE_WRITE_ERRORS._value.get()
    writer = CacheWriter(small_disk / "cache", FINGERPRINT, shard_bytes=100_000, batch_bytes=5_000)
    acknowledged = write_all(writer, 1200)
    assert "No space left on device" in writer.disabled
    assert [r.levelno for r in caplog.records if "nothing more is written" in r.message] == [logging.WARNING]
    assert metrics.CACHE_WRITE_ERRORS._value.get() == before + 1
    check_acknowledged(small_disk / "cache", acknowledged, 1200)


def test_a_cache_on_a_disk_that_is_full_from_the_start_does_not_stop_the_run(small_disk: Path) -> None:
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with CacheWriter(small_disk / "cache", FINGERPRINT) as writer:
        assert "No space left" in writer.disabled
        assert not writer.put(*record(0, 0)[:5])


def test_a_failing_write_ends_the_writing_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.count("nothing more is written") == 1
    assert "File too large" in done.stderr
    check_acknowledged(tmp_path, int(done.stdout), 200)


def test_the_budget_is_kept_and_prune_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, max_bytes=150_000, shard_bytes=40_000, batch_bytes=5_000)
    acknowledged = write_all(writer, 300)
    (warning,) = [r.message for r in caplog.records if "nothing more is written" in r.message]
    assert "cache.max_bytes = 150000 is reached" in warning
    assert "prune" in warning
    assert 125_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 150_000
    check_acknowledged(tmp_path, acknowledged, 300)


def test_a_directory_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with CacheWriter(tmp_path / "file" / "cache", FINGERPRINT) as writer:
        assert writer.disabled
        assert not writer.put(*record(0, 0)[:5])
        assert not writer.flush()
