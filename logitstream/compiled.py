"""How this package compiles: with numba, at the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

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


def contracted_part(function: F) -> F:
    """As `part`, where a product and a sum may be rounded once together: other results, none less exact."""
    options: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False, "fastmath": {"contract"}}
    return cast(F, numba.njit(**options)(function))


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[number] * 3]), "llvm.prefetch.p0i8"
        )
        address = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        # For reading, to be kept in every cache, data.
        builder.call(function, [address, *(ir.Constant(number, flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch = cast(Callable[[Any, int], None], intrinsic(_prefetch))
"""In kernels: start reading what lies at an index of an array, or past its end, without waiting for it."""


def _wide_vectors(typing_context: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # its own `add` knows plain words alone
        return context.get_dummy_value()

    return types.void(), generate


wide_vectors = cast(Callable[[], None], intrinsic(_wide_vectors))
"""In parts: LLVM may use vectors of 512 bits for the loops of this one, which it keeps to 256 on Intel's processors for
the sake of their clocks; the matrix products that logits come from have lowered those already."""


def _block_sum(typing_context: Any, array: Any, index: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, quarter = ir.IntType(32), ir.VectorType(ir.FloatType(), 16)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        block = builder.bitcast(builder.gep(data, [arguments[1]]), quarter.as_pointer())
        parts = [builder.load(builder.gep(block, [ir.Constant(number, i)]), align=4) for i in range(4)]

        def half(lanes: Any, which: list[int]) -> Any:
            mask = ir.Constant(ir.VectorType(number, len(which)), which)
            return builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), mask)

        lanes = builder.fadd(builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3]))
        for first, second in ((range(8), range(8, 16)), (range(4), range(4, 8)), ((0, 2), (1, 3))):
            lanes = builder.fadd(half(lanes, list(first)), half(lanes, list(second)))
        return builder.fadd(*(builder.extract_element(lanes, ir.Constant(number, i)) for i in range(2)))

    return types.float32(array, index), generate


block_sum = cast(Callable[[Any, int], Any], intrinsic(_block_sum))
"""In kernels: the sum of 64 float32 from an index on, in the order of inverse_cdf.block_sum; written as vectors because
LLVM makes 63 scalar additions of the same sum in Python, which take as long as the exponentials."""


def _multiply_high(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.int64(types.uint64, types.uint64), generate


multiply_high = cast(Callable[[Any, Any], int], intrinsic(_multiply_high))
"""In kernels: a·b // 2^64 of two uint64, which must stay below 2^63."""
