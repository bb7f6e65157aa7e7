"""Maintenance of caches: verify, merge, prune, describe, export (the `logitstream cache` command)."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def watched(what: Sequence[T], doing: str) -> Iterable[T]:
    """Show a progress bar on stderr while these are gone through."""
    return track(what, doing, console=Console(stderr=True), transient=True)
