"""Triton kernels for CUDA. Each has a twin in plain torch, which is its specification.

The modules in here import Triton: import them where tensors are on CUDA and `are_usable` says so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch

UNUSED = -1
"""The count of a place without an entry in what the draw packs."""
BAD = -2
"""The first count of a row whose logits hold NaN, +inf or nothing finite."""

MOST_CHUNK_BYTES = 1 << 30
"""Beyond this many bytes of logits the head's weight is read so seldom that it no longer counts."""
CHUNK_SHARE = 16
"""A chunk of logits takes this part of the free memory."""
ROWS_MULTIPLE = 128
"""Numbers of rows that suit matrix products."""


def chunk_rows(row_bytes: int, free_bytes: int) -> int:
    """Return how many rows of logits to make at a time on a GPU: a part of its free memory, up to 1 GiB."""
    rows = min(MOST_CHUNK_BYTES, free_bytes // CHUNK_SHARE) // row_bytes
    return max(ROWS_MULTIPLE, rows // ROWS_MULTIPLE * ROWS_MULTIPLE)


def are_usable(device: torch.device) -> bool:
    """Tell if the kernels run on this device: it is CUDA, and Triton, which CUDA builds of torch bring, is here."""
    return device.type == "cuda" and _has_triton()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: unlike torch's operations, Triton's launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
