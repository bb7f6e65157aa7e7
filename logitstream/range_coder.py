# mypy: allow-untyped-defs, allow-untyped-calls
"""Compiled kernels of codec version 2: rows of targets <-> range-coded bytes, as docs/targets-format.md describes.

The coder's state is (low or code, width, position) in int64; a carry is propagated into the bytes already written.
Adaptive bits hold 16 bits of P(0) and, in the low 8 bits, how often they were seen. All kernels are in one file, as
numba's cache on disk does not notice a change in another file's callee.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from logitstream.id_model import DRAW_CLASSES, INNER_BITS, NEXT_BITS, SLOT_BITS

F = TypeVar("F", bound=Callable[..., Any])

MAX_ENTRY_BYTES = 64
"""No entry and no row length takes more: 30 adaptive bits of at most 12 bits each, 31 plain ones, and an id."""

TOO_MANY_ENTRIES, OUT_OF_RANGE = 1, 2

_MASK = 0xFFFFFFFF
_TOP = 1 << 24
_UNSEEN = 32768 << 8
_RATES = np.array([1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5], dtype=np.int64)

# Layout of the adaptive contexts: of a value's bit length, and of the two bits below its top bit, for each use.
_VALUE_CONTEXTS = 32 + 32 * 4
_LENGTH, _EXCESS, _PLAIN = 0, _VALUE_CONTEXTS, 2 * _VALUE_CONTEXTS
_IS_ONE = 3 * _VALUE_CONTEXTS
_TAKES_REST = _IS_ONE + 64
_IS_TAIL = _TAKES_REST + 64
_NUM_CONTEXTS = _IS_TAIL + 4

_CLASS_OF = np.searchsorted(DRAW_CLASSES, np.arange(DRAW_CLASSES[-1] + 1), side="right").astype(np.int32) - 1
_LAST_CLASS = int(DRAW_CLASSES[-1])
_CONTEXT = np.array(
    [
        [min(max(left - 2, 0), 7) + 8 * min((4 * excess // max(left, 1)).bit_length(), 7) for excess in range(256)]
        for left in range(32)
    ],
    dtype=np.int64,
)


def _compiled(function: F) -> F:
    """Compiled at the first call; kept on disk where numba finds a writable folder (NUMBA_CACHE_DIR names one)."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    except RuntimeError:  # "no locator available": a read-only file system
        return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


@_compiled
def _bit_length(value):
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@_compiled
def _put(out, low, width, position, start, size):
    """Narrow the interval to [start, start + size) of it, both already in the coder's units."""
    low += start
    if low > _MASK:
        low &= _MASK
        carry = position - 1
        while out[carry] == 255:
            out[carry] = 0
            carry -= 1
        out[carry] += 1
    width = size
    while width < _TOP:
        out[position] = low >> 24
        position += 1
        low = (low << 8) & _MASK
        width <<= 8
    return low, width, position


@_compiled
def _finish(out, low, width, position):
    """The shortest number in [low, low + width): one byte, as width ≥ 2^24; the reader appends zeros."""
    if low == 0:
        return position
    low, width, position = _put(out, low, width, position, (-low) & (_TOP - 1), _TOP)
    out[position] = low >> 24
    return position + 1


@_compiled
def _put_bit(out, low, width, position, contexts, index, bit):
    state = contexts[index]
    p0 = state >> 8
    bound = (width >> 12) * (p0 >> 4)
    contexts[index] = _adapted(state, bit)
    if bit:
        return _put(out, low, width, position, bound, width - bound)
    return _put(out, low, width, position, 0, bound)


@_compiled
def _adapted(state, bit):
    p0, seen = state >> 8, state & 255
    rate = _RATES[seen]
    if bit:
        p0 -= p0 >> rate
    else:
        p0 += (65536 - p0) >> rate
    p0 = min(max(p0, 32), 65536 - 32)
    return (p0 << 8) | min(seen + 1, 15)


@_compiled
def _put_plain(out, low, width, position, value, num_bits):
    """num_bits equiprobable bits, at most 16 at once."""
    while num_bits > 0:
        part = min(num_bits, 16)
        num_bits -= part
        unit = width >> part
        low, width, position = _put(out, low, width, position, unit * ((value >> num_bits) & ((1 << part) - 1)), unit)
    return low, width, position


@_compiled
def _put_value(out, low, width, position, contexts, base, value):
    """A number below 2^31: its bit length in unary, the two bits below its top bit adaptively, the rest plainly."""
    length = _bit_length(value)
    for i in range(length):
        low, width, position = _put_bit(out, low, width, position, contexts, base + i, 1)
    if length < 31:
        low, width, position = _put_bit(out, low, width, position, contexts, base + length, 0)
    left, node = length - 1, 1
    while left > 0 and node < 4:
        left -= 1
        bit = (value >> left) & 1
        low, width, position = _put_bit(out, low, width, position, contexts, base + 32 + 4 * length + node, bit)
        node = 2 * node + bit
    if left > 0:
        low, width, position = _put_plain(out, low, width, position, value & ((1 << left) - 1), left)
    return low, width, position


@_compiled
def _more(data, code, width, position):
    while width < _TOP:
        code = ((code << 8) & _MASK) | (np.int64(data[position]) if position < len(data) else 0)
        position += 1
        width <<= 8
    return code, width, position


@_compiled
def _get_bit(data, code, width, position, contexts, index):
    state = contexts[index]
    bound = (width >> 12) * ((state >> 8) >> 4)
    if code < bound:
        bit = 0
        width = bound
    else:
        bit = 1
        code -= bound
        width -= bound
    contexts[index] = _adapted(state, bit)
    code, width, position = _more(data, code, width, position)
    return bit, code, width, position


@_compiled
def _get_plain(data, code, width, position, num_bits):
    value = 0
    while num_bits > 0:
        part = min(num_bits, 16)
        num_bits -= part
        unit = width >> part
        digit = min(_quotient(code, unit), (1 << part) - 1)
        value = (value << part) | digit
        code, width, position = _more(data, code - unit * digit, unit, position)
    return value, code, width, position


@_compiled
def _get_value(data, code, width, position, contexts, base):
    length = 0
    bit = 1
    while length < 31:
        bit, code, width, position = _get_bit(data, code, width, position, contexts, base + length)
        if bit == 0:
            break
        length += 1
    if length == 0:
        return 0, code, width, position
    left, node, value = length - 1, 1, 1
    while left > 0 and node < 4:
        left -= 1
        bit, code, width, position = _get_bit(data, code, width, position, contexts, base + 32 + 4 * length + node)
        node = 2 * node + bit
        value = 2 * value + bit
    if left > 0:
        low_bits, code, width, position = _get_plain(data, code, width, position, left)
        value = (value << left) | low_bits
    return value, code, width, position


@_compiled
def _class_of(num_left):
    return _CLASS_OF[min(num_left, _LAST_CLASS)]


@_compiled
def _count_context(num_left, excess):
    """Of an entry's count, where num_left entries (this one included) have `excess` more than one each to share."""
    return _CONTEXT[min(num_left, 31), min(excess, 255)]


@_compiled
def _quotient(a, b):
    """a // b of numbers below 2^32, as the machine's fast unsigned division."""
    return np.int64(np.uint32(a) // np.uint32(b))


@_compiled
def encode_block(out, lengths, token_ids, counts, units, bucket_of, inner_start, inner_total, next_start):
    """One block's rows into `out`; units > 0 says that each row's counts sum to it. The number of bytes written."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int64)
    low, width, position = np.int64(0), np.int64(_MASK), np.int64(0)
    entry = 0
    for row in range(len(lengths)):
        length = np.int64(lengths[row])
        low, width, position = _put_value(out, low, width, position, contexts, _LENGTH, length)
        first, used, excess = np.int64(0), np.int64(0), max(np.int64(units) - length, 0)
        for num_left in range(length, 0, -1):
            token_id = token_ids[entry]
            bucket = np.int64(bucket_of[token_id])
            draws = _class_of(num_left)
            unit = width >> NEXT_BITS
            start, end = np.int64(next_start[first, draws, bucket]), np.int64(next_start[first, draws, bucket + 1])
            low, width, position = _put(out, low, width, position, unit * start, unit * (end - start))
            start = np.int64(inner_start[token_id])
            total = np.int64(inner_total[bucket])
            is_last = token_id + 1 == len(bucket_of) or bucket_of[token_id + 1] != bucket
            end = total if is_last else np.int64(inner_start[token_id + 1])
            if bucket != first:
                used = np.int64(0)
            if total - used > end - start:
                unit = _quotient(width, total - used)
                low, width, position = _put(out, low, width, position, unit * (start - used), unit * (end - start))
            first, used = (bucket + 1, np.int64(0)) if is_last else (bucket, end)
            count = np.int64(counts[entry])
            if units == 0:
                is_tail = count == 0
                low, width, position = _put_bit(out, low, width, position, contexts, _IS_TAIL, np.int64(is_tail))
                if not is_tail:
                    low, width, position = _put_value(out, low, width, position, contexts, _PLAIN, count - 1)
            elif excess > 0 and num_left > 1:
                index = _count_context(num_left, excess)
                more = count - 1
                low, width, position = _put_bit(
                    out, low, width, position, contexts, _IS_ONE + index, np.int64(more > 0)
                )
                if more > 0:
                    takes_rest = np.int64(more == excess)
                    low, width, position = _put_bit(
                        out, low, width, position, contexts, _TAKES_REST + index, takes_rest
                    )
                    if not takes_rest:
                        low, width, position = _put_value(out, low, width, position, contexts, _EXCESS, more - 1)
                excess -= more
            entry += 1
    return _finish(out, low, width, position)


@_compiled
def decode_block(
    data, lengths, token_ids, counts, units, bucket_start, inner_start, inner_total, inner_slot, next_start, next_slot
):
    """What encode_block wrote, into arrays whose sizes say how many rows and entries there are; 0, or what is wrong."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int64)
    code, _, position = _more(data, np.int64(0), np.int64(1), np.int64(0))
    code, _, position = _more(data, code, np.int64(_TOP >> 8), position)
    width = np.int64(_MASK)
    num_buckets = np.int64(len(inner_total))
    entry = 0
    for row in range(len(lengths)):
        length, code, width, position = _get_value(data, code, width, position, contexts, _LENGTH)
        if length > len(token_ids) - entry:
            return TOO_MANY_ENTRIES
        lengths[row] = length
        first, used, excess = np.int64(0), np.int64(0), max(np.int64(units) - length, 0)
        if units > 0 and length > units:
            return OUT_OF_RANGE
        for num_left in range(length, 0, -1):
            if first >= num_buckets:
                return OUT_OF_RANGE
            draws = _class_of(num_left)
            unit = width >> NEXT_BITS
            target = min(_quotient(code, unit), (1 << NEXT_BITS) - 1)
            slot = target >> (NEXT_BITS - SLOT_BITS)
            bucket = np.int64(next_slot[first, draws, slot])
            above = np.int64(next_slot[first, draws, slot + 1]) + 1
            while above - bucket > 1:
                middle = (bucket + above) >> 1
                if next_start[first, draws, middle] <= target:
                    bucket = middle
                else:
                    above = middle
            start, end = np.int64(next_start[first, draws, bucket]), np.int64(next_start[first, draws, bucket + 1])
            code, width, position = _more(data, code - unit * start, unit * (end - start), position)
            total = np.int64(inner_total[bucket])
            if bucket != first:
                used = np.int64(0)
            token_id = np.int64(bucket_start[bucket])
            last = np.int64(bucket_start[bucket + 1]) - 1
            if last > token_id:
                unit = _quotient(width, total - used)
                target = min(_quotient(code, unit), total - used - 1) + used
                slot = target >> (INNER_BITS - SLOT_BITS)
                token_id, above = np.int64(inner_slot[bucket, slot]), np.int64(inner_slot[bucket, slot + 1]) + 1
                while above - token_id > 1:
                    middle = (token_id + above) >> 1
                    if inner_start[middle] <= target:
                        token_id = middle
                    else:
                        above = middle
                start = np.int64(inner_start[token_id])
                end = total if token_id == last else np.int64(inner_start[token_id + 1])
                if total - used > end - start:
                    code, width, position = _more(data, code - unit * (start - used), unit * (end - start), position)
            first, used = (
                (bucket + 1, np.int64(0)) if token_id == last else (bucket, np.int64(inner_start[token_id + 1]))
            )
            token_ids[entry] = token_id
            count = np.int64(1)
            if units == 0:
                is_tail, code, width, position = _get_bit(data, code, width, position, contexts, _IS_TAIL)
                if is_tail:
                    count = np.int64(0)
                else:
                    more, code, width, position = _get_value(data, code, width, position, contexts, _PLAIN)
                    count += more
            elif excess > 0 and num_left > 1:
                index = _count_context(num_left, excess)
                more, code, width, position = _get_bit(data, code, width, position, contexts, _IS_ONE + index)
                if more:
                    takes_rest, code, width, position = _get_bit(
                        data, code, width, position, contexts, _TAKES_REST + index
                    )
                    if takes_rest:
                        more = excess
                    else:
                        more, code, width, position = _get_value(data, code, width, position, contexts, _EXCESS)
                        more += 1
                count += more
                excess -= more
            else:
                count += excess
            if excess < 0 or count > 0x7FFFFFFF:
                return OUT_OF_RANGE
            counts[entry] = count
            entry += 1
    return 0 if entry == len(token_ids) else TOO_MANY_ENTRIES
