"""Killed writers, torn writes, flipped bytes: nothing acknowledged is lost, nothing damaged is read."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitstream.cache import CacheReader, CacheWriter
from tests.integration import crashing_writer
from tests.integration.crashing_writer import FINGERPRINT, record

KILLS = 120
WRITERS = 2


class _Writers:
    """The forking process, and who writes what."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "cache"
        self._acks = directory
        self._seed = 0
        self._server = subprocess.Popen(
            [sys.executable, crashing_writer.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self) -> tuple[int, int]:
        """Seed and pid of a new writer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._seed += 1
        self._server.stdin.write(f"{self.directory} {self._seed} {self._acks / str(self._seed)}\n")
        self._server.stdin.flush()
        return self._seed, int(self._server.stdout.readline())

    def acknowledged(self, seed: int) -> int:
        """How many records that writer knew to be on disk."""
        path = self._acks / str(seed)
        content = path.read_bytes() if path.exists() else b""
        return struct.unpack_from("<q", content, len(content) // 8 * 8 - 8)[0] if len(content) >= 8 else 0

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[_Writers]:
    started = _Writers(tmp_path)
    yield started
    started.close()


def _wait_until_gone(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.0005)


def _tear(directory: Path, chance: random.Random) -> None:
    """Leave the remains of a write that the kill cut short: the beginning of a message at the end of an open shard."""
    for path in directory.glob("*.open"):
        content = path.read_bytes()
        begin = content.find(b"\xff\xff\xff\xff", 8)
        if begin > 0 and chance.random() < 0.5:
            with path.open("ab") as file:
                file.write(content[begin : begin + chance.randrange(1, 400)])


def test_no_acknowledged_record_is_lost_over_many_kills(writers: _Writers) -> None:
    chance = random.Random(0)
    running = [writers.start() for _ in range(WRITERS)]
    seeds = []
    for kill in range(KILLS):
        seed, pid = running.pop(0)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _wait_until_gone(pid)
        seeds.append(seed)
        if kill == KILLS - 1:
            for _, last in running:
                os.kill(last, signal.SIGKILL)
                _wait_until_gone(last)
            _tear(writers.directory, chance)
        else:
            running.append(writers.start())
    total = _check(writers, seeds + [seed for seed, _ in running])
    assert total > KILLS  # the writers did get somewhere before they were killed
    CacheWriter(writers.directory, FINGERPRINT).close()
    assert not list(writers.directory.glob("*.open"))
    assert _check(writers, seeds) > 0


def _check(writers: _Writers, seeds: list[int]) -> int:
    """Every acknowledged record is there, byte for byte, before and after recovery."""
    total = 0
    with CacheReader(writers.directory, FINGERPRINT) as reader:
        for seed in seeds:
            for number in range(writers.acknowledged(seed)):
                expected = record(seed, number)
                assert reader.get(expected.key) == expected.payload, f"writer {seed} record {number}"
                total += 1
        assert not reader.damaged
    return total


def test_a_flipped_or_missing_byte_anywhere_never_gives_a_wrong_target(tmp_path: Path) -> None:
    original = tmp_path / "original"
    records = [record(0, number) for number in range(60)]
    with CacheWriter(original, FINGERPRINT, shard_bytes=40_000, batch_bytes=5_000) as writer:
        for one in records[:50]:
            writer.put(*one[:5])
    still_open = CacheWriter(original, FINGERPRINT, writer_id="open")
    for one in records[50:]:
        still_open.put(*one[:5])
    still_open.flush()
    chance = random.Random(1)
    shards = [path.name for path in original.iterdir() if path.suffix in (".arrow", ".open", ".index")]
    for attempt in range(150):
        damaged = tmp_path / str(attempt)
        shutil.copytree(original, damaged)
        path = damaged / chance.choice(shards)
        content = bytearray(path.read_bytes())
        position = chance.randrange(len(content))
        if attempt % 3:
            content[position] ^= 1 << chance.randrange(8)
        else:
            del content[position:]
        path.write_bytes(content)
        _check_damaged(damaged, {one.key: one.payload for one in records})
        if attempt % 10 == 0:  # the next run completes and makes good what is missing
            _fetch_again(damaged, records)
        shutil.rmtree(damaged)
    still_open.close()


def _check_damaged(directory: Path, payloads: dict[bytes, bytes]) -> None:
    reader = CacheReader(directory, FINGERPRINT)
    found = {key: reader.get(key) for key in payloads}
    assert all(payload is None or payload == payloads[key] for key, payload in found.items())
    for one in reader.records():
        assert one.payload == payloads[one.key]


def _fetch_again(directory: Path, records: list[crashing_writer.Record]) -> None:
    reader = CacheReader(directory, FINGERPRINT)
    with CacheWriter(directory, FINGERPRINT) as writer:
        for one in records:
            if reader.get(one.key) is None:
                writer.put(*one[:5])
    reader.refresh()
    assert [reader.get(one.key) for one in records] == [one.payload for one in records]


WATCHED = """
import sys
from pathlib import Path
from logitstream.cache import CacheWriter
from tests.integration.crashing_writer import FINGERPRINT, record
directory, events = sys.argv[1], []
def watch(event, arguments):
    if event in ("os.rename", "os.link"):
        events.append("named " + Path(arguments[1]).suffix)
    elif event == "open" and str(arguments[0]) == directory:
        events.append("folder synced")
sys.addaudithook(watch)
writer = CacheWriter(directory, FINGERPRINT)
writer.put(*record(0, 0)[:5])
writer.flush()
events.append("acknowledged")
writer.close()
print(*events, sep="\\n")
"""


def test_the_folder_is_synced_after_its_files_got_their_names(tmp_path: Path) -> None:
    """A name that a loss of power takes back loses the whole shard; Python tells when a folder is opened."""
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    begun, sealed = ["named .open", "folder synced"], ["named .arrow", "folder synced"]
    assert done.stdout.splitlines() == ["named .json", "folder synced", *begun, "acknowledged", *sealed]
