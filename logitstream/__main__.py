"""`logitstream cache {info,verify,merge,export,prune}`: looking after caches of targets (docs/cache.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from logitstream.cache import CacheReader
from logitstream.cache.manifest import tree_bytes
from logitstream.cache.remote import downloaded, is_remote, local_path
from logitstream.cache.tools.describe import describe
from logitstream.cache.tools.export import export
from logitstream.cache.tools.rewrite import merge, prune
from logitstream.cache.tools.verify import verify
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

    command("info", _info, "size, bytes a token, entries a row, fingerprint, provenance, as JSON")
    check = command("verify", _verify, "read every byte; exit status 1 where something is damaged")
    check.add_argument("--keys", type=Path, metavar="FILE", help="write the keys to fetch again here, one a line (hex)")
    join = command("merge", _merge, "several caches of one fingerprint into one, each key once")
    join.add_argument("--output", required=True, help="cache to write or to add to")
    out = command("export", _export, "Parquet files with decoded columns")
    out.add_argument("--output", required=True, type=Path, help="folder for the Parquet files")
    cut = command("prune", _prune, "drop records to make room")
    cut.add_argument("--max_bytes", type=_size, help="drop the oldest shards until this many bytes hold (10G, 2T, …)")
    cut.add_argument("--before_draw_set", type=int, help="drop records of earlier draw sets")
    cut.add_argument("--damaged", action="store_true", help="drop damaged records")
    cut.add_argument("--dry_run", action="store_true", help="only say how many records and bytes would go")
    return parser


def _size(text: str) -> int:
    unit = SIZE_UNITS.get(text[-1:].upper(), 1)
    size = int(float(text if unit == 1 else text[:-1]) * unit)
    if size < 0:
        raise argparse.ArgumentTypeError(f"expected a number of bytes, with K, M, G or T, got {text!r}")
    return size


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; the function that is yielded advances it."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda amount: progress.advance(task, amount)


def _info(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader:
        print(json.dumps(describe(reader), indent=1))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with downloaded(arguments.directory) as directory, _bar("verifying", tree_bytes(directory)) as advance:
        damage = verify(directory, advance)
    for problem in damage.problems:
        print(f"damaged: {problem}")
    keys = [key.hex() for key in damage.lost_keys]
    if arguments.keys is not None:
        arguments.keys.write_text("".join(f"{key}\n" for key in keys))
    else:
        for key in keys:
            print(f"fetch again: {key}")
    print(f"{damage.whole_records} whole records, {len(damage.damaged_keys)} damaged, {len(keys)} to fetch again")
    return 1 if damage.problems else 0


def _merge(arguments: argparse.Namespace) -> int:
    total = sum(len(CacheReader(source)) for source in arguments.directory)
    with _bar("merging", total) as advance:
        written, duplicates, damaged = merge(arguments.directory, arguments.output, advance)
    print(f"{arguments.output}: {written} records written, {duplicates} duplicates and {damaged} damaged left out")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader, _bar("exporting", len(reader)) as advance:
        files, skipped = export(reader, arguments.output, progress=advance)
        written = len(reader) - skipped
    print(f"{arguments.output}: {written} records in {len(files)} files, {skipped} damaged left out")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    if arguments.max_bytes is None and arguments.before_draw_set is None and not arguments.damaged:
        raise ValueError("expected --max_bytes, --before_draw_set or --damaged")
    if is_remote(arguments.directory):
        raise ValueError("expected a local folder: merge a bucket's cache into one, or use the store's lifecycle rules")
    directory = local_path(arguments.directory)
    with _bar("pruning", CacheReader(directory).num_records) as advance:
        found = prune(
            directory,
            max_bytes=arguments.max_bytes,
            before_draw_set=arguments.before_draw_set,
            damaged=arguments.damaged,
            dry_run=arguments.dry_run,
            progress=advance,
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
