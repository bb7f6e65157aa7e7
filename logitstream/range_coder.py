"""The compiled coder of codec version 2: rows of targets <-> range-coded bytes, as docs/targets-format.md describes.

Each step is written once for both directions; `decoding` is a constant where it is compiled in. All kernels are in one
file: numba's cache on disk does not notice a change in another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from logitstream.id_model import DRAW_CLASSES, INNER_BITS, INNER_SLOT_BITS, NEXT_BITS, SLOT_BITS, IdTables

Array = npt.NDArray[Any]
State = tuple[int, int, int]
"""Low (decoding: the code's distance from it), width of the interval, position in the bytes."""
Coded = tuple[int, State]
Rows = tuple[Array, Array, Array]
"""Lengths int64 [R], token ids and counts int32 [K]."""
F = TypeVar("F", bound=Callable[..., Any])

OUT_OF_SPACE, INVALID = -1, -2
MAX_ENTRY_BYTES = 128
"""No entry or row length takes more: 66 adaptive bits of at most 11 bits each and 56 plain ones."""
MAX_COUNT = (1 << 31) - 1

_int = cast(Callable[[Any], int], np.int64)
_at = cast(Callable[[int], int], np.uintp)
"""An index that is not negative: spares numba's check for one that counts from the end."""
_MASK, _LEAST_WIDTH = (1 << 48) - 1, 1 << 32
_UNSEEN = 32768 << 8
"""A context: 16 bits of P(0) and, in the low 8 bits, how often it was seen."""
_RATES = 0x5444444443333221
"""How fast a context adapts, by how often it was seen, four bits each."""

# Layout of the contexts: a value's bit length, and the two bits below its top bit, for each use.
_VALUE_CONTEXTS = 32 + 32 * 4
_LENGTH, _EXCESS, _PLAIN, _GAP, _HAS_MORE = (use * _VALUE_CONTEXTS for use in (0, 1, 2, 3, 4))
_TAKES_ALL, _IS_TAIL, _NUM_CONTEXTS = _HAS_MORE + 64, _HAS_MORE + 128, _HAS_MORE + 129

_CLASS_OF = np.searchsorted(DRAW_CLASSES, np.arange(DRAW_CLASSES[-1] + 1), side="right").astype(np.uint8) - 1
_LAST_CLASS = int(DRAW_CLASSES[-1])
_COUNT_CONTEXT = np.array(
    [
        [min(max(left - 2, 0), 7) + 8 * min((4 * excess // max(left, 1)).bit_length(), 7) for excess in range(256)]
        for left in range(32)
    ],
    dtype=np.uint8,
).ravel()


class Coder(NamedTuple):
    data: Array
    contexts: Array
    decoding: bool


def kernel(function: F) -> F:
    """Compile at the first call; numba keeps the code on disk if it finds a writable folder (NUMBA_CACHE_DIR)."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # "no locator available": a read-only file system
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """Compile into the kernels that call it, without numba's reference counts, whose atomic steps would cost more."""
    options: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
    return cast(F, numba.njit(**options)(function))


@inlined
def _symbol(coder: Coder, at: State, start: int, size: int) -> State:
    """Narrow the interval to [start, start + size) of it, in the coder's units."""
    data, (low, _, position) = coder.data, at
    shift = 16 if size < _LEAST_WIDTH else 0
    if coder.decoding:
        following = (_int(data[_at(position)]) << 8) | _int(data[_at(position + 1)])
        low = (((low - start) << shift) & _MASK) | (following if shift else 0)
        return low, size << shift, min(position + (shift >> 3), len(data) - 2)
    low += start
    if low > _MASK:
        low &= _MASK
        _carry(data, position - 1)
    # Bytes are complete as good as at random: no branch, they are written either way.
    data[_at(position)] = low >> 40
    data[_at(position + 1)] = (low >> 32) & 255
    return (low << shift) & _MASK, size << shift, position + (shift >> 3)


@inlined
def _carry(data: Array, last: int) -> None:
    while data[last] == 255:
        data[last] = 0
        last -= 1
    data[last] += 1


@inlined
def _finish(data: Array, at: State) -> int:
    """Write the shortest number in the interval, at most 16 bits; the reader appends zeros to it."""
    low, width, position = at
    num_bytes, step, number = 0, 1 << 48, 0
    while not low <= number < low + width:
        num_bytes += 1
        step >>= 8
        number = (low + step - 1) & ~(step - 1)
    if number > _MASK:
        _carry(data, position - 1)
    for i in range(num_bytes):
        data[position + i] = (number >> (40 - 8 * i)) & 255
    return position + num_bytes


@inlined
def _bit(coder: Coder, at: State, index: int, bit: int) -> Coded:
    state = _int(coder.contexts[_at(index)])
    p0, seen = state >> 8, state & 15
    bound = (at[1] >> 12) * (p0 >> 4)
    if coder.decoding:
        bit = int(at[0] >= bound)
    rate = (_RATES >> (4 * seen)) & 15
    step = -(p0 >> rate) if bit else (65536 - p0) >> rate
    coder.contexts[_at(index)] = (min(max(p0 + step, 32), 65536 - 32) << 8) | min(seen + 1, 15)
    return bit, _symbol(coder, at, bound if bit else 0, at[1] - bound if bit else bound)


@inlined
def _quotient(a: int, b: int) -> int:
    """Return a // b of numbers that are not negative, as one machine instruction."""
    return _int(np.uint64(a) // np.uint64(b))


@inlined
def _plain(coder: Coder, at: State, value: int, num_bits: int) -> Coded:
    """Code num_bits equiprobable bits, at most 16 at once."""
    coded = 0
    while num_bits > 0:
        part = min(num_bits, 16)
        num_bits -= part
        unit, most = at[1] >> part, (1 << part) - 1
        digit = min(_quotient(at[0], unit), most) if coder.decoding else (value >> num_bits) & most
        coded = (coded << part) | digit
        at = _symbol(coder, at, unit * digit, unit)
    return coded, at


@inlined
def _value(coder: Coder, at: State, base: int, value: int) -> Coded:
    """Code a number below 2^31: bit length in unary, the two bits below the top bit adaptively, the rest plainly."""
    length = 0
    while length < 31:
        more, at = _bit(coder, at, base + length, int(value >> length > 0))
        if not more:
            break
        length += 1
    left, node, coded = length - 1, 1, int(length > 0)
    while left > 0 and node < 4:
        left -= 1
        bit, at = _bit(coder, at, base + 32 + 4 * length + node, (value >> left) & 1)
        node, coded = 2 * node + bit, 2 * coded + bit
    if left > 0:
        rest, at = _plain(coder, at, value & ((1 << left) - 1), left)
        coded = (coded << left) | rest
    return coded, at


@inlined
def _id(
    coder: Coder, at: State, tables: IdTables, num_left: int, first: int, used: int, token_id: int
) -> tuple[int, State, int, int]:
    """Code the id's bucket among those from `first` on, then its place among what is unused of the bucket.

    The last two results are `first` and `used` of the next id, of which num_left - 1 are to come after this one.
    """
    draws = _CLASS_OF[_at(min(num_left, _LAST_CLASS))]
    starts = tables.next_start[_at(first), _at(draws)]
    unit = at[1] >> NEXT_BITS
    if coder.decoding:
        target = min(_quotient(at[0], unit), (1 << NEXT_BITS) - 1)
        bucket = _int(tables.next_slot[_at(first), _at(draws), _at(target >> (NEXT_BITS - SLOT_BITS))])
        while starts[_at(bucket + 1)] <= target:
            bucket += 1
    else:
        bucket = _int(tables.bucket_of[_at(token_id)])
    start, end = _int(starts[_at(bucket)]), _int(starts[_at(bucket + 1)])
    at = _symbol(coder, at, unit * start, unit * (end - start))
    used = used if bucket == first else 0
    left = (1 << INNER_BITS) - used
    unit = at[1] >> INNER_BITS if used == 0 else _quotient(at[1], left)
    last = _int(tables.bucket_start[_at(bucket + 1)]) - 1
    if coder.decoding:
        target = min(_quotient(at[0], unit), left - 1) + used
        slot = _int(tables.inner_slot[_at(bucket), _at(target >> (INNER_BITS - INNER_SLOT_BITS))])
        token_id = _int(tables.bucket_start[_at(bucket)]) + slot
        while token_id < last and tables.inner_start[_at(token_id + 1)] <= target:
            token_id += 1
    start = _int(tables.inner_start[_at(token_id)])
    end = 1 << INNER_BITS if token_id == last else _int(tables.inner_start[_at(token_id + 1)])
    if end - start < left:
        at = _symbol(coder, at, unit * (start - used), unit * (end - start))
    return token_id, at, bucket + int(token_id == last), 0 if token_id == last else end


@inlined
def _gap(coder: Coder, at: State, vocab_size: int, num_left: int, previous: int, token_id: int) -> Coded:
    """Code how far the id is behind the previous one: as a value in units near the mean gap, the rest plainly."""
    mean, shift = _quotient(vocab_size - previous, num_left + 1), 0
    while mean >> shift > 2:
        shift += 1
    gap = token_id - previous - 1
    high, at = _value(coder, at, _GAP, gap >> shift)
    rest, at = _plain(coder, at, gap & ((1 << shift) - 1), shift)
    return previous + 1 + (high << shift) + rest, at


@inlined
def _count(coder: Coder, at: State, num_left: int, excess: int, count: int) -> Coded:
    """Code a count of a row whose num_left entries, this one included, have `excess` above 1 each; -1: of any row."""
    if excess < 0:
        is_tail, at = _bit(coder, at, _IS_TAIL, int(count == 0))
        if is_tail:
            return 0, at
        more, at = _value(coder, at, _PLAIN, count - 1)
        return 1 + more, at
    if excess == 0 or num_left == 1:
        return 1 + excess, at
    context = _COUNT_CONTEXT[_at(256 * min(num_left, 31) + min(excess, 255))]
    more, at = _bit(coder, at, _HAS_MORE + context, int(count > 1))
    if not more:
        return 1, at
    takes_all, at = _bit(coder, at, _TAKES_ALL + context, int(count == 1 + excess))
    if takes_all:
        return 1 + excess, at
    more, at = _value(coder, at, _EXCESS, count - 2)
    return 2 + more, at


@inlined
def _rows(coder: Coder, at: State, rows: Rows, row_sum: int, vocab_size: int, tables: IdTables) -> int:
    """Code all rows; return the bytes written (0 after decoding), OUT_OF_SPACE or INVALID."""
    decoding, (lengths, token_ids, counts) = coder.decoding, rows
    num_buckets, entry = len(tables.bucket_start) - 1, 0
    space = len(coder.data) if decoding else len(coder.data) - MAX_ENTRY_BYTES
    for row in range(len(lengths)):
        if at[2] > space:
            return OUT_OF_SPACE
        length, at = _value(coder, at, _LENGTH, lengths[row])
        lengths[row] = length
        if length > len(token_ids) - entry or (row_sum >= 0 and length > row_sum):
            return INVALID
        first, used, previous, excess = 0, 0, -1, row_sum - length if row_sum >= 0 else -1
        for num_left in range(length, 0, -1):
            token_id, count = _int(token_ids[entry]), _int(counts[entry])
            if at[2] > space:
                return OUT_OF_SPACE
            if not decoding and (token_id <= previous or token_id >= vocab_size or count < 0):
                return INVALID
            if num_buckets:
                if decoding and first >= num_buckets:
                    return INVALID
                token_id, at, first, used = _id(coder, at, tables, num_left, first, used, token_id)
            else:
                token_id, at = _gap(coder, at, vocab_size, num_left, previous, token_id)
            count, at = _count(coder, at, num_left, excess, count)
            excess -= count - 1 if row_sum >= 0 else 0
            if token_id >= vocab_size or count > MAX_COUNT or (row_sum >= 0 and excess < 0):
                return INVALID
            if decoding:
                token_ids[entry], counts[entry] = token_id, count
            previous = token_id
            entry += 1
    if entry < len(token_ids):
        return INVALID
    return 0 if decoding else _finish(coder.data, at)


@kernel
def encode_rows(data: Array, rows: Rows, row_sum: int, vocab_size: int, tables: IdTables) -> int:
    """Encode rows into `data`; return the bytes written, OUT_OF_SPACE or INVALID.

    row_sum: what the counts of each row sum to, or -1; tables: without buckets if there is no id model.
    """
    coder = Coder(data, np.full(_NUM_CONTEXTS, _UNSEEN, np.int32), False)
    return _rows(coder, (0, _MASK, 0), rows, row_sum, vocab_size, tables)


@kernel
def decode_rows(data: Array, rows: Rows, row_sum: int, vocab_size: int, tables: IdTables) -> int:
    """Decode what `encode_rows` wrote, and 8 zeros behind it, into arrays of the rows' and entries' number."""
    code = 0
    for byte in data[:6]:
        code = (code << 8) | _int(byte)
    coder = Coder(data, np.full(_NUM_CONTEXTS, _UNSEEN, np.int32), True)
    return _rows(coder, (code, _MASK, 6), rows, row_sum, vocab_size, tables)
