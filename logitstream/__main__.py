"""`logitstream cache {info,verify,merge,export,prune}`: looking after caches of targets (docs/cache.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from logitstream.cache import CacheReader
from logitstream.cache.remote import is_remote, local_path
from logitstream.cache.tools.export import export
from logitstream.cache.tools.rewrite import merge, prune
from logitstream.cache.tools.verify import describe, verify
from logitstream.errors import LogitstreamError

SIZE_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 if `verify` found damage or `prune` left something, 2 for an error."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (LogitstreamError, OSError, ValueError) as error:
        print(f"logitstream cache {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="logitstream")
    groups = parser.add_subparsers(dest="group", required=True)
    commands = groups.add_parser("cache", help="look after caches of targets").add_subparsers(
        dest="command", required=True
    )

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument(
            "directory", nargs="+" if name == "merge" else None, help="a folder, or an fsspec URL (s3://…)"
        )
        added.set_defaults(run=run)
        return added

    command("info", _info, "size, bytes a token, fingerprint, provenance, as JSON")
    command("verify", _verify, "read every byte; exit status 1 where something is damaged")
    join = command("merge", _merge, "several caches of one fingerprint into one, each key once")
    join.add_argument("--output", required=True, help="cache to write or to add to")
    out = command("export", _export, "a Parquet file with decoded columns")
    out.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    cut = command("prune", _prune, "drop records to make room")
    cut.add_argument("--max_bytes", type=_size, help="drop the oldest shards until this many bytes hold (10G, 2T, …)")
    cut.add_argument("--before_draw_set", type=int, default=0, help="drop records of earlier draw sets")
    cut.add_argument("--damaged", action="store_true", help="drop damaged records")
    cut.add_argument("--dry_run", action="store_true", help="only say how many records and bytes would go")
    return parser


def _size(text: str) -> int:
    unit = SIZE_UNITS.get(text[-1:].upper(), 1)
    size = int(float(text if unit == 1 else text[:-1]) * unit)
    if size < 0:
        raise argparse.ArgumentTypeError(f"expected a number of bytes, with K, M, G or T, got {text!r}")
    return size


def _local(directory: str) -> Path:
    if is_remote(directory):
        raise ValueError("expected a local folder: download the store's, or merge it into one")
    return local_path(directory)


def _info(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader:
        print(json.dumps(describe(reader), indent=1))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    problems, whole_records = verify(_local(arguments.directory))
    for problem in problems:
        print(f"damaged: {problem}")
    print(f"{whole_records} whole records, {len(problems)} problems")
    return 1 if problems else 0


def _merge(arguments: argparse.Namespace) -> int:
    written, left_out = merge(arguments.directory, arguments.output)
    print(f"{arguments.output}: {written} records written, {left_out} left out as duplicates or damaged")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader:
        skipped = export(reader, arguments.output)
        print(f"{arguments.output}: {len(reader) - skipped} records, {skipped} damaged left out")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    found = prune(
        _local(arguments.directory),
        max_bytes=arguments.max_bytes,
        before_draw_set=arguments.before_draw_set,
        damaged=arguments.damaged,
        dry_run=arguments.dry_run,
    )
    share, remaining = found.records / max(found.total_records, 1), found.total_bytes - found.num_bytes
    print(
        f"{arguments.directory}: {found.records} of {found.total_records} records ({share:.1%}) "
        f"{'would be dropped' if arguments.dry_run else 'dropped'}, {found.num_bytes} bytes freed, {remaining} remain"
    )
    if arguments.max_bytes is not None and remaining > arguments.max_bytes:
        found.left.append(f"{remaining} bytes remain, more than {arguments.max_bytes}: what no record is part of stays")
    for line in found.left:
        print(f"left: {line}")
    return 1 if found.left else 0


if __name__ == "__main__":
    sys.exit(main())
