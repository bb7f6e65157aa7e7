"""A cache in S3 (moto's server), over a line that breaks: shards go up, come down, and nothing wrong is read."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader

from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.remote import Mirror
from logitstream.data.corpus import CacheDataset, collate
from logitstream.errors import CacheError, FingerprintMismatch
from tests.integration.crashing_writer import FINGERPRINT, record

RECORDS = [record(0, number) for number in range(60)]
folders = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Line:
    """A TCP line to a port that can be cut: at once, or in the middle of what is being sent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.down = False
        self.cut_after_bytes = 0
        self.num_cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.down:
                self.num_cut += 1
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(1 << 12):
                if self.cut_after_bytes and len(chunk) >= self.cut_after_bytes:
                    self.cut_after_bytes = 0
                    self.num_cut += 1
                    break
                sink.sendall(chunk)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        assert server.poll() is None
        time.sleep(0.05)
    yield port
    server.terminate()
    server.wait()


@pytest.fixture
def line(s3_port: int) -> Iterator[Line]:
    made = Line(s3_port)
    yield made
    made.close()


@pytest.fixture
def store(line: Line, tmp_path: Path) -> Any:
    """A new, empty place in the store: its URL, options and a staging folder each."""
    options = {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{line.port}", "region_name": "eu-west-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 5},
    }
    name = f"bucket{next(folders)}"
    fsspec.filesystem("s3", **options).mkdir(name)
    return f"s3://{name}/cache", options, tmp_path


def fill(store: Any, staging: str, *, start: int = 0, stop: int = 60) -> None:
    url, options, folder = store
    with CacheWriter(
        url, FINGERPRINT, staging=folder / staging, storage_options=options, shard_bytes=40_000, batch_bytes=5_000
    ) as writer:
        for one in RECORDS[start:stop]:
            assert writer.put(*one[:5])


def open_reader(store: Any, staging: str) -> CacheReader:
    url, options, folder = store
    return CacheReader(url, FINGERPRINT, staging=folder / staging, storage_options=options)


def test_shards_go_up_and_are_read_elsewhere(store: Any) -> None:
    fill(store, "writer", stop=30)
    fill(store, "other writer", start=30)
    with open_reader(store, "reader") as reader:
        assert len(reader) == 60
        assert not list((store[2] / "reader").glob("*.arrow"))  # nothing is fetched before it is read
        assert [reader.get(one.key) for one in RECORDS] == [one.payload for one in RECORDS]
    with open_reader(store, "in order") as reader:
        assert {one.key: one.payload for one in reader.records()} == {one.key: one.payload for one in RECORDS}


def test_an_upload_over_a_broken_line_is_tried_again(store: Any, line: Line) -> None:
    url, options, folder = store
    writer = CacheWriter(
        url, FINGERPRINT, staging=folder / "w", storage_options=options, shard_bytes=40_000, batch_bytes=5_000
    )
    for number, one in enumerate(RECORDS):
        if number % 15 == 5:
            line.cut_after_bytes = 2000  # the next large piece does not get through
        assert writer.put(*one[:5])
        if number == 30:
            line.down = True
            threading.Timer(0.5, lambda: setattr(line, "down", False)).start()
    writer.close()
    assert line.num_cut > 0
    with open_reader(store, "reader") as reader:
        assert [reader.get(one.key) for one in RECORDS] == [one.payload for one in RECORDS]
        assert not reader.damaged


def test_a_download_that_breaks_off_is_tried_again(store: Any, line: Line) -> None:
    fill(store, "writer")
    with open_reader(store, "reader") as reader:
        line.cut_after_bytes = 2000
        assert [reader.get(one.key) for one in RECORDS] == [one.payload for one in RECORDS]
    assert line.num_cut == 1


def test_what_was_not_uploaded_goes_up_with_the_next_run(store: Any) -> None:
    url, options, folder = store
    fill(store, "writer", stop=30)
    with CacheWriter(folder / "writer", FINGERPRINT) as local:  # a run that could not reach the store
        for one in RECORDS[30:]:
            local.put(*one[:5])
    with open_reader(store, "before") as reader:
        assert len(reader) == 30
    CacheWriter(url, FINGERPRINT, staging=folder / "writer", storage_options=options).close()
    with open_reader(store, "after") as reader:
        assert len(reader) == 60


def test_a_store_out_of_reach_leaves_the_run_alone(store: Any, line: Line, caplog: pytest.LogCaptureFixture) -> None:
    url, options, folder = store
    line.down = True
    with CacheWriter(url, FINGERPRINT, staging=folder / "w", storage_options=options) as writer:
        assert writer.disabled
        assert not writer.put(*RECORDS[0][:5])
    assert [r.levelno for r in caplog.records if "nothing more is written" in r.message] == [logging.WARNING]
    with pytest.raises(CacheError, match="cannot be reached"):
        open_reader(store, "r")


def test_another_fingerprint_is_refused(store: Any) -> None:
    fill(store, "writer", stop=5)
    url, options, folder = store
    other = replace(FINGERPRINT, vocab_size=7)
    with pytest.raises(FingerprintMismatch, match="vocab_size: 7 against 1000"):
        CacheWriter(url, other, staging=folder / "new", storage_options=options)


def test_a_reader_is_opened_again_in_a_loader_process(store: Any) -> None:
    fill(store, "writer", stop=5)
    with open_reader(store, "reader") as reader, pickle.loads(pickle.dumps(reader)) as again:
        assert again.get(RECORDS[0].key) == RECORDS[0].payload


def test_a_forked_loader_reads_shards_that_its_parent_has_not_fetched(store: Any) -> None:
    fill(store, "writer")
    with open_reader(store, "reader") as reader:
        dataset = CacheDataset(reader)
        loader = DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
        batches = list(loader)
        assert sum(len(batch["input_ids"]) for batch in batches) == 60
        assert all(batch["loss_mask"].any(dim=1).all() for batch in batches)  # none came as damaged


def test_staged_shards_make_room_for_others(store: Any) -> None:
    fill(store, "writer")
    url, options, folder = store
    mirror = Mirror(url, staging=folder / "small", storage_options=options, staging_bytes=90_000)
    mirror.pull_head()
    shards = sorted(mirror.shards())
    assert len(shards) > 2
    for path in shards:
        mirror.fetch(path)
        assert path.exists()
        assert sum(p.stat().st_size for p in (folder / "small").glob("*.arrow")) <= 90_000
    mirror.close()
