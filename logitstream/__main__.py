"""`logitstream cache {info,verify,merge,export,prune}`: looking after caches of targets (docs/cache.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from logitstream.cache import CacheReader
from logitstream.cache.manifest import caches_in, tree_bytes
from logitstream.cache.remote import downloaded, is_remote, local_path
from logitstream.cache.tools.describe import describe
from logitstream.cache.tools.export import export
from logitstream.cache.tools.rewrite import merge, prune
from logitstream.cache.tools.verify import verify
from logitstream.errors import LogitstreamError

SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


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
    info = _command(commands, "info", _info, "size, bytes a token, entries a row, fingerprint, provenance")
    info.add_argument("--json", action="store_true", help="as JSON")
    check = _command(commands, "verify", _verify, "read every byte; exit status 1 where something is damaged")
    check.add_argument("--keys", type=Path, metavar="FILE", help="write the keys to fetch again here, one a line (hex)")
    join = commands.add_parser("merge", help="several caches of one fingerprint into one, each key once")
    join.add_argument("directories", nargs="+")
    join.set_defaults(run=_merge)
    out = _command(commands, "export", _export, "Parquet files with decoded columns")
    for command, what in ((join, "cache to write or to add to"), (out, "folder for the Parquet files")):
        command.add_argument("--output", required=True, help=what)
    cut = _command(commands, "prune", _prune, "drop records to make room")
    cut.add_argument("--max_bytes", type=_size, help="drop the oldest records until this many bytes hold (10G, 2T, …)")
    cut.add_argument("--before_draw_set", type=_draw_set, help="drop records of earlier draw sets")
    cut.add_argument("--damaged", action="store_true", help="drop damaged records")
    cut.add_argument("--dry_run", action="store_true", help="only say how many records and bytes would go")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("directory", help="a folder, or an fsspec URL (s3://…)")
    parser.set_defaults(run=run)
    return parser


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in SIZE_UNITS:
        raise argparse.ArgumentTypeError(f"expected a number of bytes with K, M, G or T, got {text!r}")
    size = int(float(number) * SIZE_UNITS[unit])
    if size < 0:
        raise argparse.ArgumentTypeError(f"expected no bytes or more, got {text!r}")
    return size


def _draw_set(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a draw set, 0 or more, got {text!r}")
    return int(text)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; the function that is yielded advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda amount: progress.advance(task, amount)


def _info(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader:
        found = describe(reader)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    histogram = found.pop("entries_histogram")
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key}: {inner}")
        else:
            print(f"{name}: {'unknown, there are no records' if value is None else value}")
    for count, rows in histogram.items():
        print(f"  {count:>5} entries {'#' * max(1, round(40 * rows / max(histogram.values())))} {rows}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with downloaded(arguments.directory) as directory, _bar("verifying", tree_bytes(directory)) as advance:
        damage = verify(directory, advance)
    for note in damage.notes:
        print(f"note: {note}")
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
    total = sum(len(CacheReader(source)) for source in arguments.directories)
    with _bar("merging", total) as advance:
        written, duplicates, damaged = merge(arguments.directories, arguments.output, advance)
    print(f"{arguments.output}: {written} records written, {duplicates} duplicates and {damaged} damaged left out")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with CacheReader(arguments.directory) as reader, _bar("exporting", len(reader)) as advance:
        files, skipped = export(reader, Path(arguments.output), progress=advance)
        written = len(reader) - skipped
    print(f"{arguments.output}: {written} records in {len(files)} files, {skipped} damaged left out")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    if arguments.max_bytes is None and arguments.before_draw_set is None and not arguments.damaged:
        raise ValueError("expected --max_bytes, --before_draw_set or --damaged")
    if is_remote(arguments.directory):
        raise ValueError("expected a local folder: merge a bucket's cache into one, or use the store's lifecycle rules")
    directory = local_path(arguments.directory)
    total = sum(CacheReader(folder).num_records for folder in caches_in(directory))
    with _bar("pruning", total) as advance:
        found = prune(
            directory,
            max_bytes=arguments.max_bytes,
            before_draw_set=arguments.before_draw_set,
            damaged=arguments.damaged,
            dry_run=arguments.dry_run,
            progress=advance,
        )
    share = found.records / max(found.total_records, 1)
    remaining = found.total_bytes - found.num_bytes
    print(
        f"{arguments.directory}: {found.records} of {found.total_records} records ({share:.1%}) "
        f"{'would be dropped' if arguments.dry_run else 'dropped'}, {found.num_bytes} bytes freed, {remaining} remain"
    )
    if arguments.max_bytes is not None and remaining > arguments.max_bytes:
        found.left.append(f"{remaining} bytes remain, more than {arguments.max_bytes}: what no record is part of stays")
    for line in found.notes:
        print(f"note: {line}")
    for line in found.left:
        print(f"left: {line}")
    return 1 if found.left else 0


if __name__ == "__main__":
    sys.exit(main())
