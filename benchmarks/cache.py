"""Replay against reading the same bytes raw with pyarrow; opening a million sequences; memory over an epoch.

    python -m benchmarks.cache

Writes benchmarks/results/cache.json. Both sides read from the page cache in one thread; they are measured in turn, so
that their ratio survives a machine that others use, and the medians of wall and CPU seconds are given.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.machine import machine
from logitstream.cache import CacheReader, CacheWriter
from logitstream.types import Fingerprint, TargetSpec

FINGERPRINT = Fingerprint(
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=49_152,
    dtype="float32",
    id_model_digest="",
    spec=TargetSpec().canonical(),
)
REPLAYED_BYTES = 100 << 20
SHAPES = ((512, 10), (1024, 10), (2048, 10), (2048, 18), (4096, 36))
"""Tokens of a sequence and payload bytes of a token."""
ROUNDS = 9
NUM_SMALL = 1_000_000


def fill(directory: Path, *, num_records: int, num_tokens: int, payload_bytes: int) -> None:
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, FINGERPRINT.vocab_size, num_tokens, dtype=np.int32)
    with CacheWriter(directory, FINGERPRINT) as writer:
        for _ in range(num_records):
            size = int(payload_bytes * rng.uniform(0.9, 1.1))
            writer.put(rng.bytes(16), token_ids, None, rng.bytes(size), 0)
        assert writer.flush(), writer.disabled


def raw_in_order(directory: Path) -> int:
    """Record by record, payload as bytes and token ids as an array: pyarrow alone, memory-mapped, nothing checked."""
    total = 0
    for path in sorted(directory.glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                lists = batch.column("token_ids")
                values, offsets = lists.flatten().to_numpy(), lists.offsets.to_pylist()
                values.max()  # touches every token, as a checksum does
                for i, payload in enumerate(batch.column("payload").to_pylist()):
                    total += len(payload) + 0 * len(values[offsets[i] : offsets[i + 1]])
    return total


def raw_whole_records(directory: Path) -> int:
    """As raw_in_order, with the other four values that a replayed record holds: key, mask, draw set, version."""
    total = 0
    for path in sorted(directory.glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                lists = batch.column("token_ids")
                values, offsets = lists.flatten().to_numpy(), lists.offsets.to_pylist()
                values.max()
                names = ("key", "loss_mask", "payload", "draw_set", "teacher_version")
                columns = (batch.column(name).to_pylist() for name in names)
                for i, (_key, _mask, payload, _draw_set, _version) in enumerate(zip(*columns, strict=True)):
                    total += len(payload) + 0 * len(values[offsets[i] : offsets[i + 1]])
    return total


def raw_shuffled(tables: pa.Table, order: list[int]) -> int:
    payloads, token_ids = tables["payload"], tables["token_ids"]
    total = 0
    for i in order:
        total += len(payloads[i].as_py())
        token_ids[i].values.to_numpy().max()
    return total


def replay_in_order(reader: CacheReader) -> int:
    total = 0
    for record in reader.records():
        total += len(record.payload) + 0 * len(record.token_ids)
    return total


def replay_shuffled(reader: CacheReader, keys: list[bytes]) -> int:
    """As training does (logitstream/training/target_cache.py): key by key."""
    total = 0
    for key in keys:
        payload = reader.get(key)
        assert payload is not None
        total += len(payload)
    return total


def measure(sides: dict[str, Callable[[], int]]) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each side, in turn."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    totals = {name: side() for name, side in sides.items()}  # also brings everything into the page cache
    assert len(set(totals.values())) == 1, totals
    for _ in range(ROUNDS):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {
            "wall_seconds": statistics.median(wall for wall, _ in runs),
            "cpu_seconds": statistics.median(cpu for _, cpu in runs),
            "payload_bytes": totals[name],
        }
        for name, runs in seconds.items()
    }


def replay(directory: Path, num_tokens: int, bytes_per_token: int) -> dict[str, Any]:
    record_bytes = num_tokens * (bytes_per_token + 2)
    num_records = REPLAYED_BYTES // record_bytes
    fill(directory, num_records=num_records, num_tokens=num_tokens, payload_bytes=num_tokens * bytes_per_token)
    reader = CacheReader(directory, FINGERPRINT)
    tables = pa.concat_tables(
        [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sorted(directory.glob("*.arrow"))]
    )
    order = np.random.default_rng(1).permutation(num_records).tolist()
    keys = [reader.key(i) for i in order]
    found = measure(
        {
            "raw_in_order": lambda: raw_in_order(directory),
            "replay_in_order": lambda: replay_in_order(reader),
            "raw_whole_records": lambda: raw_whole_records(directory),
            "raw_shuffled": lambda: raw_shuffled(tables, order),
            "replay_shuffled": lambda: replay_shuffled(reader, keys),
        }
    )
    compared = {
        "in_order": ("raw_in_order", "replay_in_order"),
        "whole_records_in_order": ("raw_whole_records", "replay_in_order"),
        "shuffled": ("raw_shuffled", "replay_shuffled"),
    }
    ratios = {
        f"{name}_{clock}_ratio": round(found[raw][f"{clock}_seconds"] / found[ours][f"{clock}_seconds"], 3)
        for name, (raw, ours) in compared.items()
        for clock in ("wall", "cpu")
    }
    rates = {
        f"{name}_sequences_per_cpu_second": round(num_records / found[name]["cpu_seconds"])
        for name in ("replay_in_order", "replay_shuffled")
    }
    return {"tokens": num_tokens, "bytes_per_token": bytes_per_token, "records": num_records, **ratios, **rates}


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_small(directory: Path) -> dict[str, Any]:
    """In a process of its own: seconds to open, RAM a sequence, and how the memory moves over an epoch."""
    with tempfile.TemporaryDirectory() as other:
        fill(Path(other), num_records=1, num_tokens=1, payload_bytes=1)
        len(CacheReader(other))  # imports and buffers that the first reader brings
    before = resident_bytes()
    started = time.perf_counter()
    reader = CacheReader(directory, FINGERPRINT)
    count = len(reader)
    seconds = time.perf_counter() - started
    opened = resident_bytes()
    keys = [reader.key(int(i)) for i in np.random.default_rng(0).integers(0, count, 200_000)]
    replay_shuffled(reader, keys[:1000])
    resident = []
    for part in range(10):
        replay_shuffled(reader, keys[part::10])
        resident.append(resident_bytes())
    return {
        "sequences": count,
        "open_seconds": round(seconds, 3),
        "ram_bytes_per_sequence": round((opened - before) / count, 1),
        "epoch_growth_bytes": resident[-1] - resident[0],
    }


def replay_memory(directory: Path) -> int:
    """Growth of the resident size over a replay in order, after its first tenth, in bytes."""
    reader = CacheReader(directory, FINGERPRINT)
    sizes = [resident_bytes() for i, _ in enumerate(reader.records()) if i % max(1, len(reader) // 20) == 0]
    return max(sizes[2:]) - sizes[2]


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(open_small(Path(sys.argv[1]))))
        return
    results: dict[str, Any] = {"machine": machine("pyarrow", "numpy", "xxhash", "logitstream"), "replay": []}
    with tempfile.TemporaryDirectory() as folder:
        for num_tokens, bytes_per_token in SHAPES:
            directory = Path(folder) / f"{num_tokens}-{bytes_per_token}"
            results["replay"].append(replay(directory, num_tokens, bytes_per_token))
            results["replay"][-1]["in_order_growth_bytes"] = replay_memory(directory)
            print(json.dumps(results["replay"][-1]), flush=True)
        started = time.perf_counter()
        fill(Path(folder) / "small", num_records=NUM_SMALL, num_tokens=8, payload_bytes=32)
        results["write_microseconds_per_small_record"] = round((time.perf_counter() - started) / NUM_SMALL * 1e6, 1)
        command = [sys.executable, "-m", "benchmarks.cache", str(Path(folder) / "small")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results["million"] = json.loads(done.stdout)
        print(done.stdout, flush=True)
    path = Path(__file__).parent / "results" / "cache.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
