"""Files that cannot be read, are none, or are somebody else's: `verify` names each, and none stops the rest."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from logitstream.__main__ import main
from logitstream.cache import CacheReader, Record
from tests.integration.test_cache_command import FINGERPRINT, make_records, write

RECORDS = [record for record, _ in make_records(120)]
EIO_FILE = Path("/proc/self/mem")
"""A regular file whose first byte fails to be read with EIO."""


def io_error(shard: Path) -> str:
    shard.unlink()
    shard.symlink_to(EIO_FILE)
    return "Input/output error"


def dangling(shard: Path) -> str:
    shard.unlink()
    shard.symlink_to("nowhere")
    return "No such file"


def folder(shard: Path) -> str:
    shard.unlink()
    shard.mkdir()
    return "Is a directory"


def cut(shard: Path) -> str:
    os.truncate(shard, 3000)
    return "are damaged or cannot be read"


def emptied(shard: Path) -> str:
    os.truncate(shard, 0)
    return "damaged"


def foreign(shard: Path) -> str:
    table = pa.table({"text": ["not", "ours"]})
    shard.with_suffix(".index").unlink()
    with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return "no shard of this cache"


DAMAGES = [io_error, dangling, folder, cut, emptied, foreign]


def damage_all(directory: Path) -> dict[str, str]:
    """One shard for each kind of damage; what `verify` must say of it."""
    write(directory, RECORDS)
    shards = sorted(directory.glob("*.arrow"))
    assert len(shards) > len(DAMAGES)
    return {shard.name: damage(shard) for shard, damage in zip(shards, DAMAGES, strict=False)}


def test_verify_names_every_bad_file_and_reads_all_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = damage_all(tmp_path)
    (tmp_path / "broken-0000000000000-00000000.arrow.open").mkdir()
    (tmp_path / "linked.arrow.open").symlink_to(EIO_FILE)
    reader = CacheReader(tmp_path, FINGERPRINT)
    assert main(["cache", "verify", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    for name, said in expected.items():
        assert [line for line in output.splitlines() if line.startswith("damaged: ") and name in line and said in line]
    assert "damaged: broken-0000000000000-00000000.arrow" in output
    assert "damaged: linked.arrow" in output
    found = sum(reader.get(record.key) is not None for record in RECORDS)
    assert f"{found} whole records" in output


@pytest.mark.parametrize("name", ["manifest.json", "id_model.bin", "x-0000000000000-00000000.index"])
@pytest.mark.parametrize("damage", [io_error, dangling, folder])
def test_files_beside_the_shards_that_cannot_be_read_are_named_too(
    tmp_path: Path, name: str, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, RECORDS[:20])
    (tmp_path / name).touch()
    damage(tmp_path / name)
    status = main(["cache", "verify", str(tmp_path)])
    output = capsys.readouterr().out
    assert ("20 whole records" in output) == (name != "manifest.json")  # without it no shard can be checked
    assert status == (0 if name == "id_model.bin" else 1)  # this fingerprint names none
    assert (name.split(".")[0] in output) == (status == 1)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """A file system of 16 MB, and what makes the second half of a file on it fail with EIO."""
    image, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    made = shutil.which("mkfs.ext4") and shutil.which("filefrag")
    if not made or subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=False).returncode:
        pytest.skip("no file system can be made here; the tests with a file of /proc cover it")
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here; the tests with a file of /proc cover it")

    def fail(path: Path) -> None:
        os.sync()
        layout = subprocess.run(["filefrag", "-v", "-b1024", str(path)], capture_output=True, text=True, check=True)
        fields = next(line for line in layout.stdout.splitlines() if line.strip().startswith("0:")).split(":")
        first = int(fields[2].split("..")[0])
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.truncate(image, (first * 1024 + path.stat().st_size // 2) // 4096 * 4096)

    yield folder, fail
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def big_records() -> list[Record]:
    return [record._replace(payload=record.payload * 100) for record in RECORDS]


def test_records_in_a_bad_block_are_named_and_the_others_of_the_shard_are_read(
    failing_disk: tuple[Path, Callable[[Path], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fail = failing_disk
    write(folder / "cache", big_records())
    last = max((folder / "cache").glob("*.arrow"), key=lambda path: path.stat().st_size)
    last.rename(folder / "kept")  # so that its copy is the last file on the disk
    shutil.copy(folder / "kept", last)
    fail(last)
    assert main(["cache", "verify", str(folder / "cache")]) == 1
    output = capsys.readouterr().out
    assert f"{last.name} cannot be read: [Errno 5] Input/output error" in output
    reader = CacheReader(folder / "cache", FINGERPRINT)
    whole = {record.key for record in RECORDS if reader.get(record.key) is not None}
    assert len(whole) < len(RECORDS)
    assert f"{len(whole)} whole records" in output
    assert main(["cache", "prune", str(folder / "cache"), "--max_bytes", "1T"]) == 0
    assert last.exists()  # what cannot be read is dropped where that is asked for alone
    assert main(["cache", "prune", str(folder / "cache"), "--damaged"]) == 0
    assert f"{len(RECORDS) - len(whole)} of" in capsys.readouterr().out
    assert {record.key for record in CacheReader(folder / "cache").records()} == whole
    assert not last.exists()
