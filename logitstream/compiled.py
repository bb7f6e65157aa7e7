"""How this package compiles: with numba, at the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compiled at the first call; kept on disk where numba finds a writable folder (NUMBA_CACHE_DIR names one)."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # "no locator available": a read-only file system
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def part(function: F) -> F:
    """Part of a kernel, put in its place; without numba's reference counts, whose atomic steps would cost more."""
    options: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
    return cast(F, numba.njit(**options)(function))
