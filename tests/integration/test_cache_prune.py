"""Pruning to a size drops whole shards, oldest first, never more than must go, also where the disk is full."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.__main__ import main
from logitstream.cache import CacheReader, CacheWriter, Record
from logitstream.cache.tools.rewrite import merge, prune
from logitstream.cache.tools.verify import verify
from tests.hanging_disk import freezing_disk
from tests.integration.crashing_writer import FINGERPRINT, record


def numbered(sizes: list[int], *, seed: int = 0, mask_every: int = 5) -> list[Record]:
    """Records with payloads of these sizes, whose draw set is their number."""
    rng = np.random.default_rng(seed)
    made = []
    for number, size in enumerate(sizes):
        ids = rng.integers(0, 1000, int(rng.integers(0, 30)), dtype=np.int32)
        mask = rng.random(len(ids)) < 0.5 if mask_every and number % mask_every == 0 else None
        made.append(Record(rng.bytes(16), ids, mask, rng.bytes(size), number))
    return made


def write(directory: Path, records: list[Record], **options: int) -> None:
    with CacheWriter(directory, FINGERPRINT, **options) as writer:  # type: ignore[arg-type]
        for one in records:
            assert writer.put(*one[:5])


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def kept_numbers(directory: Path) -> list[int]:
    """The draw sets, each record's number, of what is left and whole."""
    assert not verify(directory)[0]
    return sorted(found.draw_set for found in CacheReader(directory, FINGERPRINT).records())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000) | st.sampled_from([0, 70_000]), min_size=1, max_size=60),
    batch_bytes=st.sampled_from([1, 3_000, 262_144]),
    shard_bytes=st.sampled_from([20_000, 10_000_000]),
    share=st.floats(0, 1.1),
)
def test_after_pruning_to_a_size_it_holds_and_the_shard_dropped_last_would_not_fit(
    sizes: list[int], batch_bytes: int, shard_bytes: int, share: float
) -> None:
    records = numbered(sizes)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory, records, batch_bytes=min(batch_bytes, shard_bytes), shard_bytes=shard_bytes)
        before = size_of(directory)
        smallest = (directory / "manifest.json").stat().st_size
        bound = smallest + int(share * (before - smallest))
        shards = {
            path: path.stat().st_size + path.with_suffix(".index").stat().st_size for path in directory.glob("*.arrow")
        }
        planned = prune(directory, max_bytes=bound, dry_run=True)
        assert size_of(directory) == before
        assert kept_numbers(directory) == list(range(len(records)))
        done = prune(directory, max_bytes=bound)
        after, kept = size_of(directory), kept_numbers(directory)
        assert after <= bound
        assert kept == list(range(len(records) - len(kept), len(records)))  # the oldest went
        assert (done.num_bytes, done.records) == (before - after, len(records) - len(kept))
        assert (planned.num_bytes, planned.records) == (done.num_bytes, done.records)
        gone = [size for path, size in shards.items() if not path.exists()]
        assert not gone if before <= bound else after + max(gone) > bound


def test_a_merged_cache_keeps_the_order_of_writing(tmp_path: Path) -> None:
    records = numbered([2000] * 90)
    for part in range(3):
        write(tmp_path / str(part), records[30 * part : 30 * part + 30])
        time.sleep(0.002)
    merge([tmp_path / name for name in "201"], tmp_path / "merged")
    assert [found.draw_set for found in CacheReader(tmp_path / "merged").records()] == list(range(90))
    assert len(list((tmp_path / "merged").glob("*.arrow"))) == 1


def test_a_dry_run_says_what_would_go_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, numbered([1000] * 50), shard_bytes=5_000, batch_bytes=1_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    total = size_of(tmp_path)
    assert main(["cache", "prune", str(tmp_path), "--max_bytes", str(total // 2), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r": \d+ of 50 records \(\S+%\) would be dropped, \d+ bytes freed, \d+ remain", said)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["cache", "prune", str(tmp_path), "--max_bytes", str(total // 2)]) == 0
    gone = 50 - len(kept_numbers(tmp_path))
    assert f": {gone} of 50 records ({gone / 50:.1%}) would be dropped, " in said
    assert f": {gone} of 50 records ({gone / 50:.1%}) dropped, {total - size_of(tmp_path)} bytes freed" in (
        capsys.readouterr().out
    )


def test_a_bound_below_what_no_record_is_part_of_drops_everything_and_says_that_it_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, numbered([1000] * 5))
    assert main(["cache", "prune", str(tmp_path), "--max_bytes", "10"]) == 1
    assert "bytes remain, more than 10" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_others_put_there_and_what_cannot_be_read_is_left_alone_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, numbered([1000] * 20), shard_bytes=5_000, batch_bytes=1_000)
    first, second, third, *_ = sorted(tmp_path.glob("*.arrow"))
    first.rename(tmp_path / "kept")
    first.symlink_to("/nowhere")
    second.unlink()
    second.mkdir()
    os.truncate(third, 1000)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "other.arrow").write_text("somebody's")
    assert main(["cache", "prune", str(tmp_path), "--damaged"]) == 1
    output = capsys.readouterr().out
    for named in (first.name, second.name, "other.arrow"):
        assert [line for line in output.splitlines() if line.startswith("left: ") and named in line]
    assert first.is_symlink()
    assert second.is_dir()
    assert not third.exists()
    assert (tmp_path / "dataset_info.json").read_text() == "{}"
    assert (tmp_path / "other.arrow").read_text() == "somebody's"


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    if request.param == "ext4":
        with freezing_disk(tmp_path, megabytes=4) as disk:
            yield disk.folder
        return
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(disk: Path) -> None:
    """Not a byte is left."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(1024)):
            pass
    with pytest.raises(OSError, match="No space left"):
        (disk / "one-more").write_bytes(bytes(64 << 10))
    (disk / "one-more").unlink()


def test_a_full_disk_is_pruned_to_what_was_asked_for(small_disk: Path) -> None:
    """Shards that go as a whole go first, which makes room for writing others anew."""
    directory, records = small_disk / "cache", numbered([2000] * 300)
    write(directory, records, shard_bytes=50_000, batch_bytes=10_000)
    fill_up(small_disk)
    bound = int(0.6 * size_of(directory))
    done = prune(directory, max_bytes=bound, before_draw_set=60)
    assert not done.left
    kept = kept_numbers(directory)
    assert kept == list(range(300 - len(kept), 300))
    assert 0 < len(kept) < 300
    assert bound - 60_000 < size_of(directory) <= bound
    assert all(CacheReader(directory, FINGERPRINT).get(r.key) == r.payload for r in records[300 - len(kept) :])


def test_a_shard_that_a_full_disk_has_no_room_to_write_anew_is_left_whole_and_named(small_disk: Path) -> None:
    directory, records = small_disk / "cache", numbered([2000] * 300)
    write(directory, records)
    fill_up(small_disk)
    done = prune(directory, before_draw_set=150)
    assert "No space left" in done.left[0]
    assert kept_numbers(directory) == list(range(300))


def test_the_shard_that_its_writer_could_not_seal_for_want_of_room_is_pruned_too(small_disk: Path) -> None:
    """A run that fills the disk leaves such a shard."""
    directory, records = small_disk / "cache", numbered([2000] * 200)
    write(directory, records[:20])
    writer = CacheWriter(directory, FINGERPRINT, batch_bytes=10_000)
    for one in records[20:150]:
        assert writer.put(*one[:5])
    assert writer.flush()
    fill_up(small_disk)
    while not writer.disabled:
        writer.put(*records[150][:5])
        writer.flush()
    writer.close()
    found = len(CacheReader(directory))
    oldest = min(directory.glob("*.arrow"))
    assert not prune(directory, max_bytes=size_of(directory) - oldest.stat().st_size).left
    assert len(kept_numbers(directory)) == found - 20
    assert not list(directory.glob("*.open"))


PRUNE = """
import sys
from pathlib import Path
from logitstream.cache.tools.rewrite import prune
print("ready", flush=True)
sys.stdin.readline()
print(prune(Path(sys.argv[1]), max_bytes=int(sys.argv[2])).left, flush=True)
"""


def test_no_record_that_stays_is_lost_when_pruning_is_killed(tmp_path: Path) -> None:
    directory, original, chance = tmp_path / "cache", tmp_path / "original", random.Random(0)
    records = numbered([2000] * 300)
    write(original, records, shard_bytes=200_000, batch_bytes=50_000)
    bound = size_of(original) // 2
    prune(shutil.copytree(original, tmp_path / "pruned"), max_bytes=bound)
    kept = [one for one in records if one.draw_set in set(kept_numbers(tmp_path / "pruned"))]
    interrupted, seconds = 0, 0.0
    for number in range(9):  # the first to its end, so that the others are killed within the time that it took
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(original, directory)
        process = subprocess.Popen(
            [sys.executable, "-c", PRUNE, str(directory), str(bound)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        started = time.perf_counter()
        process.stdin.write(b"\n")
        process.stdin.flush()
        if number:
            time.sleep(chance.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
        ended = process.stdout.readline()
        seconds = seconds or time.perf_counter() - started
        process.communicate()
        interrupted += not ended
        reader = CacheReader(directory, FINGERPRINT)
        assert [reader.get(one.key) for one in kept] == [one.payload for one in kept]
        assert not prune(directory, max_bytes=bound).left  # and again, to its end
        assert size_of(directory) <= bound
    assert interrupted


def test_pruning_is_refused_while_another_is_under_way_and_leaves_no_file_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [record(0, 0)])
    with (tmp_path / "manifest.json").open("r+b") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        assert main(["cache", "prune", str(tmp_path), "--max_bytes", "1"]) == 2
    assert "another prune" in capsys.readouterr().err
    assert main(["cache", "prune", str(tmp_path), "--before_draw_set", "0"]) == 0
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".json", ".arrow", ".index"}
    assert json.loads((tmp_path / "manifest.json").read_bytes())["format"]
