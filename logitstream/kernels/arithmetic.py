"""Arithmetic that the kernels share."""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
HAS_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""False in Triton's interpreter, which runs kernels on the CPU in tests."""


@triton.jit
def exp2(y):
    """Return 2^y by one instruction, 0 below 2^-126: keeping smaller numbers would take three more."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505  the compiler drops the branch that is not taken only in this form
        return tl.exp2(y)
