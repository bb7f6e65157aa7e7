"""Where the records of open shards lie: 68 bytes a record, and their keys' 20 in an index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.shard import SPAN, SPAN_DTYPE, Spans

RECORDS_PER_BLOCK = 1024


class OpenRecords:
    """Shard and span of each record in the order in which they were found.

    They only grow, in blocks that stay where they are: what holds for the first n of them does so for ever.
    """

    def __init__(self) -> None:
        self.count = 0
        self._paths: list[str] = []
        self._numbers: dict[str, int] = {}
        self._spans: list[Spans] = []
        self._shards: list[npt.NDArray[np.uint32]] = []

    def append(self, path: str, spans: Spans) -> None:
        """More records of a shard."""
        if path not in self._numbers:
            self._numbers[path] = len(self._paths)
            self._paths.append(path)
        while len(spans):
            block, start = divmod(self.count, RECORDS_PER_BLOCK)
            if block == len(self._spans):
                self._spans.append(np.zeros(RECORDS_PER_BLOCK, SPAN_DTYPE))
                self._shards.append(np.zeros(RECORDS_PER_BLOCK, np.uint32))
            some, spans = spans[: RECORDS_PER_BLOCK - start], spans[RECORDS_PER_BLOCK - start :]
            self._spans[block][start : start + len(some)] = some
            self._shards[block][start : start + len(some)] = self._numbers[path]
            self.count += len(some)

    def row(self, number: int) -> tuple[str, tuple[Any, ...]]:
        """Path of the shard and span of a record."""
        block, row = divmod(number, RECORDS_PER_BLOCK)
        return self._paths[self._shards[block][row]], SPAN.unpack(self._spans[block][row].tobytes())

    def spans(self, count: int) -> Spans:
        """Of the first `count` records."""
        return np.concatenate([np.zeros(0, SPAN_DTYPE), *self._spans])[:count]

    def by_shard(self, count: int) -> Iterator[tuple[str, npt.NDArray[np.intp], Spans]]:
        """Path of each shard, and numbers and spans of its records among the first `count`."""
        shards = np.concatenate([np.zeros(0, np.uint32), *self._shards])[:count]
        spans = self.spans(count)
        for number in np.unique(shards).tolist():
            numbers = np.flatnonzero(shards == number)
            yield self._paths[number], numbers, spans[numbers]
