"""Compiled kernels of codec version 2: rows of targets <-> range-coded bytes, as docs/targets-format.md describes.

The coder's state is (low or code, width, position) in int64; a carry is propagated into the bytes already written.
Adaptive bits hold 16 bits of P(0) and, in the low 8 bits, how often they were seen. All kernels are in one file, as
numba's cache on disk does not notice a change in another file's callee.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from logitstream.id_model import DRAW_CLASSES, INNER_BITS, NEXT_BITS, SLOT_BITS

F = TypeVar("F", bound=Callable[..., Any])
Array = npt.NDArray[Any]
State = tuple[int, int, int]
"""Low end (or code), width and position in the bytes."""
Decoded = tuple[int, int, int, int]
"""A value and the State after it."""

MAX_ENTRY_BYTES = 64
"""No entry and no row length takes more: 30 adaptive bits of at most 12 bits each, 31 plain ones, and an id."""

TOO_MANY_ENTRIES, OUT_OF_RANGE = 1, 2

_MASK = (1 << 48) - 1
_LEAST_WIDTH = 1 << 32
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
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # "no locator available": a read-only file system
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


@_compiled
def _bit_length(value: int) -> int:
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@_compiled
def _put(out: Array, low: int, width: int, position: int, start: int, size: int) -> State:
    """Narrow the interval to [start, start + size) of it, both already in the coder's units."""
    low += start
    if low > _MASK:
        low &= _MASK
        _carry(out, position - 1)
    if size < _LEAST_WIDTH:
        out[position] = low >> 40
        out[position + 1] = (low >> 32) & 255
        return (low << 16) & _MASK, size << 16, position + 2
    return low, size, position


@_compiled
def _carry(out: Array, last: int) -> None:
    while out[last] == 255:
        out[last] = 0
        last -= 1
    out[last] += 1


@_compiled
def _finish(out: Array, low: int, width: int, position: int) -> int:
    """The shortest number in [low, low + width), of no more than 16 bits; the reader appends zeros to it."""
    num_bytes, step = 0, 1 << 48
    number = 0
    while number < low:
        num_bytes += 1
        step >>= 8
        number = (low + step - 1) & ~(step - 1)
        if number >= low + width:
            number = 0
    if number > _MASK:
        _carry(out, position - 1)
    for i in range(num_bytes):
        out[position + i] = (number >> (40 - 8 * i)) & 255
    return position + num_bytes


@_compiled
def _put_bit(out: Array, low: int, width: int, position: int, contexts: Array, index: int, bit: int) -> State:
    state = int(contexts[index])
    p0 = state >> 8
    bound = (width >> 12) * (p0 >> 4)
    contexts[index] = _adapted(state, bit)
    if bit:
        return _put(out, low, width, position, bound, width - bound)
    return _put(out, low, width, position, 0, bound)


@_compiled
def _adapted(state: int, bit: int) -> int:
    p0, seen = state >> 8, state & 255
    rate = int(_RATES[seen])
    if bit:
        p0 -= p0 >> rate
    else:
        p0 += (65536 - p0) >> rate
    p0 = min(max(p0, 32), 65536 - 32)
    return (p0 << 8) | min(seen + 1, 15)


@_compiled
def _put_plain(out: Array, low: int, width: int, position: int, value: int, num_bits: int) -> State:
    """num_bits equiprobable bits, at most 16 at once."""
    while num_bits > 0:
        part = min(num_bits, 16)
        num_bits -= part
        unit = width >> part
        low, width, position = _put(out, low, width, position, unit * ((value >> num_bits) & ((1 << part) - 1)), unit)
    return low, width, position


@_compiled
def _put_value(out: Array, low: int, width: int, position: int, contexts: Array, base: int, value: int) -> State:
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
def _more(data: Array, code: int, width: int, position: int) -> State:
    if width < _LEAST_WIDTH:
        code = ((code << 16) & _MASK) | (_byte(data, position) << 8) | _byte(data, position + 1)
        return code, width << 16, position + 2
    return code, width, position


@_compiled
def _byte(data: Array, position: int) -> int:
    """Zero past the end."""
    return int(data[position]) if position < len(data) else 0


@_compiled
def _get_bit(data: Array, code: int, width: int, position: int, contexts: Array, index: int) -> Decoded:
    state = int(contexts[index])
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
def _get_plain(data: Array, code: int, width: int, position: int, num_bits: int) -> Decoded:
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
def _get_value(data: Array, code: int, width: int, position: int, contexts: Array, base: int) -> Decoded:
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
def _class_of(num_left: int) -> int:
    return int(_CLASS_OF[min(num_left, _LAST_CLASS)])


@_compiled
def _count_context(num_left: int, excess: int) -> int:
    """Of an entry's count, where num_left entries (this one included) have `excess` more than one each to share."""
    return int(_CONTEXT[min(num_left, 31), min(excess, 255)])


@_compiled
def _quotient(a: int, b: int) -> int:
    """a // b of numbers that are not negative, as one machine instruction."""
    return int(np.int64(np.uint64(a) // np.uint64(b)))


@_compiled
def encode_block(
    out: Array,
    lengths: Array,
    token_ids: Array,
    counts: Array,
    units: int,
    bucket_of: Array,
    inner_start: Array,
    inner_total: Array,
    next_start: Array,
) -> int:
    """One block's rows into `out`; units > 0 says that each row's counts sum to it. The number of bytes written."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int64)
    low, width, position = 0, _MASK, 0
    entry = 0
    for row in range(len(lengths)):
        length = int(lengths[row])
        low, width, position = _put_value(out, low, width, position, contexts, _LENGTH, length)
        first, used, excess = 0, 0, max(int(units) - length, 0)
        for num_left in range(length, 0, -1):
            token_id = int(token_ids[entry])
            bucket = int(bucket_of[token_id])
            draws = _class_of(num_left)
            unit = width >> NEXT_BITS
            start, end = int(next_start[first, draws, bucket]), int(next_start[first, draws, bucket + 1])
            low, width, position = _put(out, low, width, position, unit * start, unit * (end - start))
            start = int(inner_start[token_id])
            total = int(inner_total[bucket])
            is_last = token_id + 1 == len(bucket_of) or bucket_of[token_id + 1] != bucket
            end = total if is_last else int(inner_start[token_id + 1])
            if bucket != first:
                used = 0
            if total - used > end - start:
                unit = _quotient(width, total - used)
                low, width, position = _put(out, low, width, position, unit * (start - used), unit * (end - start))
            first, used = (bucket + 1, 0) if is_last else (bucket, end)
            count = int(counts[entry])
            if units == 0:
                is_tail = count == 0
                low, width, position = _put_bit(out, low, width, position, contexts, _IS_TAIL, int(is_tail))
                if not is_tail:
                    low, width, position = _put_value(out, low, width, position, contexts, _PLAIN, count - 1)
            elif excess > 0 and num_left > 1:
                index = _count_context(num_left, excess)
                more = count - 1
                low, width, position = _put_bit(out, low, width, position, contexts, _IS_ONE + index, int(more > 0))
                if more > 0:
                    takes_rest = int(more == excess)
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
    data: Array,
    lengths: Array,
    token_ids: Array,
    counts: Array,
    units: int,
    bucket_start: Array,
    inner_start: Array,
    inner_total: Array,
    inner_slot: Array,
    next_start: Array,
    next_slot: Array,
) -> int:
    """What encode_block wrote, into arrays whose sizes say how many rows and entries there are; 0, or what is wrong."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int64)
    code, width, position = 0, _MASK, 6
    for i in range(position):
        code = (code << 8) | _byte(data, i)
    num_buckets = len(inner_total)
    entry = 0
    for row in range(len(lengths)):
        length, code, width, position = _get_value(data, code, width, position, contexts, _LENGTH)
        if length > len(token_ids) - entry:
            return TOO_MANY_ENTRIES
        lengths[row] = length
        first, used, excess = 0, 0, max(int(units) - length, 0)
        if units > 0 and length > units:
            return OUT_OF_RANGE
        for num_left in range(length, 0, -1):
            if first >= num_buckets:
                return OUT_OF_RANGE
            draws = _class_of(num_left)
            unit = width >> NEXT_BITS
            target = min(_quotient(code, unit), (1 << NEXT_BITS) - 1)
            slot = target >> (NEXT_BITS - SLOT_BITS)
            bucket = int(next_slot[first, draws, slot])
            above = int(next_slot[first, draws, slot + 1]) + 1
            while above - bucket > 1:
                middle = (bucket + above) >> 1
                if next_start[first, draws, middle] <= target:
                    bucket = middle
                else:
                    above = middle
            start, end = int(next_start[first, draws, bucket]), int(next_start[first, draws, bucket + 1])
            code, width, position = _more(data, code - unit * start, unit * (end - start), position)
            total = int(inner_total[bucket])
            if bucket != first:
                used = 0
            token_id = int(bucket_start[bucket])
            last = int(bucket_start[bucket + 1]) - 1
            if last > token_id:
                unit = _quotient(width, total - used)
                target = min(_quotient(code, unit), total - used - 1) + used
                slot = target >> (INNER_BITS - SLOT_BITS)
                token_id, above = int(inner_slot[bucket, slot]), int(inner_slot[bucket, slot + 1]) + 1
                while above - token_id > 1:
                    middle = (token_id + above) >> 1
                    if inner_start[middle] <= target:
                        token_id = middle
                    else:
                        above = middle
                start = int(inner_start[token_id])
                end = total if token_id == last else int(inner_start[token_id + 1])
                if total - used > end - start:
                    code, width, position = _more(data, code - unit * (start - used), unit * (end - start), position)
            first, used = (bucket + 1, 0) if token_id == last else (bucket, int(inner_start[token_id + 1]))
            token_ids[entry] = token_id
            count = 1
            if units == 0:
                is_tail, code, width, position = _get_bit(data, code, width, position, contexts, _IS_TAIL)
                if is_tail:
                    count = 0
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
