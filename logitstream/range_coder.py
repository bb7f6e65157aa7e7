"""Compiled kernels of codec version 2: rows of targets <-> range-coded bytes, as docs/targets-format.md describes.

The coder's state is (low or code, width, position) in int64; a carry is propagated into the bytes already written.
Adaptive bits hold 16 bits of P(0) and, in the low 8 bits, how often they were seen. All kernels are in one file, as
numba's cache on disk does not notice a change in another file's callee.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.compiled import kernel, multiply_high, part, prefetch
from logitstream.id_model import DRAW_CLASSES, NEXT_BITS, SLOT_BITS, IdTables

Array = npt.NDArray[Any]
State = tuple[int, int, int]
"""Low end (or code), width and position in the bytes."""
Decoded = tuple[int, int, int, int]
"""A value and the State after it."""

MAX_ENTRY_BYTES = 64
"""No entry and no row length takes more: 30 adaptive bits of at most 12 bits each, 31 plain ones, and an id."""

MAX_COUNT = (1 << 31) - 1

_MASK = (1 << 48) - 1
_LEAST_WIDTH = 1 << 32
_UNSEEN = 32768 << 8
_RATES = 0x5444444443333221
"""By how often a context was seen, four bits each."""

# Layout of the adaptive contexts: of a value's bit length, and of the two bits below its top bit, for each use.
_VALUE_CONTEXTS = 32 + 32 * 4
_LENGTH, _EXCESS, _PLAIN = 0, _VALUE_CONTEXTS, 2 * _VALUE_CONTEXTS
_HAS_MORE = 3 * _VALUE_CONTEXTS
_TAKES_ALL = _HAS_MORE + 64
_IS_TAIL = _TAKES_ALL + 64
_NUM_CONTEXTS = _IS_TAIL + 4

_CLASS_OF = np.searchsorted(DRAW_CLASSES, np.arange(DRAW_CLASSES[-1] + 1), side="right").astype(np.uint8) - 1
_LAST_CLASS = int(DRAW_CLASSES[-1])
_CONTEXT = np.array(
    [
        [min(max(left - 2, 0), 7) + 8 * min((4 * excess // max(left, 1)).bit_length(), 7) for excess in range(256)]
        for left in range(32)
    ],
    dtype=np.uint8,
).ravel()


@part
def _at(index: int) -> Any:
    """An index that is not negative: without the check for one that counts from the end."""
    return np.uintp(index)


@part
def _int(number: Any) -> int:
    """Signed, whatever the table's type is: numba makes floats of signed and unsigned together."""
    return np.int64(number)  # type: ignore[return-value]


@part
def _put(out: Array, low: int, width: int, position: int, start: int, size: int) -> State:
    """Narrow the interval to [start, start + size) of it, both already in the coder's units."""
    low += start
    if low > _MASK:
        low &= _MASK
        _carry(out, position - 1)
    # Whether bytes are complete is as good as random after most symbols: no branch, they are written either way.
    out[_at(position)] = low >> 40
    out[_at(position + 1)] = (low >> 32) & 255
    shift = 16 if size < _LEAST_WIDTH else 0
    return (low << shift) & _MASK, size << shift, position + (shift >> 3)


@part
def _carry(out: Array, last: int) -> None:
    while out[last] == 255:
        out[last] = 0
        last -= 1
    out[last] += 1


@part
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


@part
def _put_bit(out: Array, low: int, width: int, position: int, contexts: Array, index: int, bit: int) -> State:
    state = _int(contexts[_at(index)])
    bound = (width >> 12) * (state >> 12)
    contexts[_at(index)] = _adapted(state, bit)
    low += bound if bit else 0
    width = width - bound if bit else bound
    if low > _MASK:
        low &= _MASK
        _carry(out, position - 1)
    if width < _LEAST_WIDTH:
        out[_at(position)] = low >> 40
        out[_at(position + 1)] = (low >> 32) & 255
        return (low << 16) & _MASK, width << 16, position + 2
    return low, width, position


@part
def _adapted(state: int, bit: int) -> int:
    p0, seen = state >> 8, state & 15
    rate = (_RATES >> (4 * seen)) & 15
    step = -(p0 >> rate) if bit else (65536 - p0) >> rate
    return (min(max(p0 + step, 32), 65536 - 32) << 8) | min(seen + 1, 15)


@part
def _put_plain(out: Array, low: int, width: int, position: int, value: int, num_bits: int) -> State:
    """num_bits equiprobable bits, at most 16 at once."""
    while num_bits > 0:
        part = min(num_bits, 16)
        num_bits -= part
        unit = width >> part
        low, width, position = _put(out, low, width, position, unit * ((value >> num_bits) & ((1 << part) - 1)), unit)
    return low, width, position


@part
def _put_value(out: Array, low: int, width: int, position: int, contexts: Array, base: int, value: int) -> State:
    """A number below 2^31: its bit length in unary, the two bits below its top bit adaptively, the rest plainly."""
    length = 0
    while value >> length:
        low, width, position = _put_bit(out, low, width, position, contexts, base + length, 1)
        length += 1
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


@part
def _more(data: Array, code: int, width: int, position: int) -> State:
    """data: with zeros behind its end, where the position stays."""
    is_short = width < _LEAST_WIDTH
    following = (_int(data[_at(position)]) << 8) | _int(data[_at(position + 1)])
    shift = 16 if is_short else 0
    code = ((code << shift) & _MASK) | (following if is_short else 0)
    return code, width << shift, min(position + (shift >> 3), len(data) - 2)


@part
def _get_bit(data: Array, code: int, width: int, position: int, contexts: Array, index: int) -> Decoded:
    state = _int(contexts[_at(index)])
    bound = (width >> 12) * (state >> 12)
    bit = int(code >= bound)
    code -= bound if bit else 0
    width = width - bound if bit else bound
    contexts[_at(index)] = _adapted(state, bit)
    if width < _LEAST_WIDTH:
        code, width, position = _more(data, code, width, position)
    return bit, code, width, position


@part
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


@part
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


@part
def _quotient(a: int, b: int) -> int:
    """a // b of numbers that are not negative, as one machine instruction."""
    return int(_int(np.uint64(a) // np.uint64(b)))


@part
def _unit(width: int, tables: IdTables, bucket: int, total: int, used: int) -> int:
    """width // (total - used), where nothing is used by an exact multiplication: width is below 2^48, total to 2^16."""
    if used == 0:
        return multiply_high(np.uint64(width), tables.reciprocal[_at(bucket)])
    return _quotient(width, total - used)


@part
def _put_id(
    out: Array,
    low: int,
    width: int,
    position: int,
    tables: IdTables,
    num_left: int,
    first: int,
    used: int,
    token_id: int,
) -> tuple[int, int, int, int, int]:
    """The id's bucket among those from `first` on, then its place among what is unused of the bucket.

    The last two values are `first` and `used` of the next id, of which num_left - 1 are to come after this one.
    """
    is_uniform = len(tables.bucket_of) == 0
    bucket = token_id // int(tables.bucket_start[1]) if is_uniform else _int(tables.bucket_of[_at(token_id)])
    draws = _int(_CLASS_OF[_at(min(num_left, _LAST_CLASS))])
    starts = tables.next_start[_at(first), _at(draws)]
    unit = width >> NEXT_BITS
    start, end = _int(starts[_at(bucket)]), _int(starts[_at(bucket + 1)])
    low, width, position = _put(out, low, width, position, unit * start, unit * (end - start))
    used = used if bucket == first else 0
    total = _int(tables.inner_total[_at(bucket)])
    is_last = token_id + 1 == tables.bucket_start[_at(bucket + 1)]
    if is_uniform:
        start = token_id - _int(tables.bucket_start[_at(bucket)])
        end = start + 1
    else:
        start = _int(tables.inner_start[_at(token_id)])
        end = total if is_last else _int(tables.inner_start[_at(token_id + 1)])
    if total - used > end - start:
        unit = _unit(width, tables, bucket, total, used)
        low, width, position = _put(out, low, width, position, unit * (start - used), unit * (end - start))
    return low, width, position, bucket + 1 if is_last else bucket, 0 if is_last else end


@part
def _get_id(
    data: Array, code: int, width: int, position: int, tables: IdTables, num_left: int, first: int, used: int
) -> tuple[int, int, int, int, int, int]:
    """The id that _put_id put, then the state, `first` and `used`."""
    draws = _int(_CLASS_OF[_at(min(num_left, _LAST_CLASS))])
    starts = tables.next_start[_at(first), _at(draws)]
    unit = width >> NEXT_BITS
    target = min(_quotient(code, unit), (1 << NEXT_BITS) - 1)
    bucket = _int(tables.next_slot[_at(first), _at(draws), _at(target >> (NEXT_BITS - SLOT_BITS))])
    while _int(starts[_at(bucket + 1)]) <= target:
        bucket += 1
    start, end = _int(starts[_at(bucket)]), _int(starts[_at(bucket + 1)])
    code, width, position = _more(data, code - unit * start, unit * (end - start), position)
    _prefetch_next(tables, num_left - 1, bucket)
    used = used if bucket == first else 0
    total = _int(tables.inner_total[_at(bucket)])
    token_id = _int(tables.bucket_start[_at(bucket)])
    last = _int(tables.bucket_start[_at(bucket + 1)]) - 1
    if token_id == last:
        return token_id, code, width, position, bucket + 1, 0
    unit = _unit(width, tables, bucket, total, used)
    target = min(_quotient(code, unit), total - used - 1) + used
    if len(tables.bucket_of) == 0:
        token_id += target
        start, end = target, target + 1
    else:
        slot = _int(tables.slot_start[_at(bucket)]) + (target >> _int(tables.slot_shift[_at(bucket)]))
        token_id += _int(tables.inner_slot[_at(slot)])
        while token_id < last and _int(tables.inner_start[_at(token_id + 1)]) <= target:
            token_id += 1
        start = _int(tables.inner_start[_at(token_id)])
        end = total if token_id == last else _int(tables.inner_start[_at(token_id + 1)])
    if total - used > end - start:
        code, width, position = _more(data, code - unit * (start - used), unit * (end - start), position)
    if token_id == last:
        return token_id, code, width, position, bucket + 1, 0
    return token_id, code, width, position, bucket, end


@part
def _prefetch_next(tables: IdTables, num_left: int, first: int) -> None:
    """What the next bucket will be looked up in, as nothing else can be done until it is there."""
    draws = _int(_CLASS_OF[_at(min(num_left, _LAST_CLASS))])
    starts, slots = tables.next_start[_at(first), _at(draws)], tables.next_slot[_at(first), _at(draws)]
    for i in range(0, 2 * 32, 32):
        prefetch(starts, first + i)
    for i in range(0, 1 << SLOT_BITS, 64):
        prefetch(slots, i)


@part
def _put_count(
    out: Array, low: int, width: int, position: int, contexts: Array, num_left: int, excess: int, count: int
) -> State:
    """A count of a row whose num_left entries, this one included, have `excess` more than one each; -1: of any row."""
    if excess < 0:
        low, width, position = _put_bit(out, low, width, position, contexts, _IS_TAIL, int(count == 0))
        if count > 0:
            low, width, position = _put_value(out, low, width, position, contexts, _PLAIN, count - 1)
    elif excess > 0 and num_left > 1:
        context = _int(_CONTEXT[_at(256 * min(num_left, 31) + min(excess, 255))])
        more = count - 1
        low, width, position = _put_bit(out, low, width, position, contexts, _HAS_MORE + context, int(more > 0))
        if more > 0:
            takes_all = int(more == excess)
            low, width, position = _put_bit(out, low, width, position, contexts, _TAKES_ALL + context, takes_all)
            if not takes_all:
                low, width, position = _put_value(out, low, width, position, contexts, _EXCESS, more - 1)
    return low, width, position


@part
def _get_count(
    data: Array, code: int, width: int, position: int, contexts: Array, num_left: int, excess: int
) -> Decoded:
    if excess < 0:
        is_tail, code, width, position = _get_bit(data, code, width, position, contexts, _IS_TAIL)
        if is_tail:
            return 0, code, width, position
        more, code, width, position = _get_value(data, code, width, position, contexts, _PLAIN)
        return more + 1, code, width, position
    if excess == 0 or num_left == 1:
        return 1 + excess, code, width, position
    context = _int(_CONTEXT[_at(256 * min(num_left, 31) + min(excess, 255))])
    more, code, width, position = _get_bit(data, code, width, position, contexts, _HAS_MORE + context)
    if more:
        takes_all, code, width, position = _get_bit(data, code, width, position, contexts, _TAKES_ALL + context)
        if takes_all:
            return 1 + excess, code, width, position
        more, code, width, position = _get_value(data, code, width, position, contexts, _EXCESS)
        more += 1
    return 1 + more, code, width, position


@kernel
def encode_block(out: Array, lengths: Array, token_ids: Array, counts: Array, row_sum: int, tables: IdTables) -> int:
    """One block's rows into `out`; row_sum: what the counts of each row sum to, or -1. The number of bytes written."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int32)
    low, width, position, entry = 0, _MASK, 0, 0
    for row in range(len(lengths)):
        length = int(lengths[row])
        low, width, position = _put_value(out, low, width, position, contexts, _LENGTH, length)
        first, used, excess = 0, 0, row_sum - length if row_sum >= 0 else -1
        for num_left in range(length, 0, -1):
            token_id, count = int(token_ids[entry]), int(counts[entry])
            low, width, position, first, used = _put_id(
                out, low, width, position, tables, num_left, first, used, token_id
            )
            low, width, position = _put_count(out, low, width, position, contexts, num_left, excess, count)
            if excess >= 0:
                excess -= count - 1
            entry += 1
    return _finish(out, low, width, position)


@kernel
def row_kind(row_offsets: Array, token_ids: Array, counts: Array, vocab_size: int, row_sum: int) -> int:
    """-1 where these are no rows of rising ids below vocab_size with counts; 1 where all counts are positive and those
    of each row that has any sum to row_sum; else 0.
    """
    if len(row_offsets) < 1 or row_offsets[0] != 0 or len(counts) != len(token_ids):
        return -1
    for row in range(len(row_offsets) - 1):
        if not row_offsets[row] <= row_offsets[row + 1] <= len(token_ids):
            return -1
    if row_offsets[-1] != len(token_ids):
        return -1
    sums_up = len(token_ids) > 0
    for row in range(len(row_offsets) - 1):
        previous, total = _int(-1), _int(0)
        for i in range(row_offsets[row], row_offsets[row + 1]):
            token_id, count = _int(token_ids[i]), _int(counts[i])
            if token_id <= previous or count < 0:
                return -1
            sums_up = sums_up and count > 0
            previous = token_id
            total += count
        if previous >= vocab_size:
            return -1
        sums_up = sums_up and (total == row_sum or previous < 0)
    return int(sums_up)


@kernel
def decode_block(data: Array, lengths: Array, token_ids: Array, counts: Array, row_sum: int, tables: IdTables) -> bool:
    """What encode_block wrote, into arrays as long as the rows and entries are; whether the bytes hold just that."""
    contexts = np.full(_NUM_CONTEXTS, _UNSEEN, np.int32)
    padded = np.zeros(len(data) + 8, np.uint8)
    padded[: len(data)] = data
    code, width, position, entry = 0, _MASK, 6, 0
    for i in range(position):
        code = (code << 8) | _int(padded[i])
    for row in range(len(lengths)):
        length, code, width, position = _get_value(padded, code, width, position, contexts, _LENGTH)
        if length > len(token_ids) - entry or (row_sum >= 0 and length > row_sum):
            return False
        lengths[row] = length
        first, used, excess = 0, 0, row_sum - length if row_sum >= 0 else -1
        for num_left in range(length, 0, -1):
            if first >= len(tables.inner_total):
                return False
            token_id, code, width, position, first, used = _get_id(
                padded, code, width, position, tables, num_left, first, used
            )
            count, code, width, position = _get_count(padded, code, width, position, contexts, num_left, excess)
            if excess >= 0:
                excess -= count - 1
                if excess < 0:
                    return False
            if count > MAX_COUNT:
                return False
            token_ids[entry], counts[entry] = token_id, count
            entry += 1
    return entry == len(token_ids)
