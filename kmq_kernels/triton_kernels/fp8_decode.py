"""Packed indices to E4M3 weights inside a kernel, by byte look-ups, and the order of columns that comes out of it.

A weight is one byte, and a PRMT looks four of them up: from two words of four codebook entries, by the low three bits of four
indices that lie in nibbles. Each further bit of the index chooses between two such results by another PRMT. So K entries take
K / 4 registers and (K / 4 - 1) / 4 PRMTs a weight; no weight passes through 16 bits. From 7 bits on that is more than a load.

A word of four weights belongs to four neighbouring places of the reduction. Which columns stand there is free, as long as the
input has the same order; it is written anew for its scales anyway. A half of a block of 128 columns (16 lanes, fields 0 to 7) is

    1 bit         natural order: fields 4 half to 4 half + 3, each with its 16 lanes
    2 bits        lane by lane, fields half, half + 2, half + 4, half + 6: what a mask of every other pair of bits leaves
    3 bits        by two lanes, fields f and f + 2 of the one and of the other; of four lanes f = 4 half for both twos, then f + 1
    from 4 bits   lane by lane, fields 4 half to 4 half + 3
"""

import triton
import triton.language as tl

from .decode import LANES, prmt, select


@triton.constexpr_function
def has_lookup8(bits: int) -> bool:
    """Whether a codebook of 2**bits bytes is kept in registers; larger ones are looked up byte by byte in memory."""
    return bits <= 6


@triton.jit
def column_of(place, BITS: tl.constexpr):
    """The column of a block (0 to 127) that stands at a place of the reduction."""
    if BITS == 1:
        return place
    else:
        half, word, i = place // 64, place % 64 // 4, place % 4
        if BITS == 2:
            return 16 * (half + 2 * i) + word
        elif BITS == 3:
            return 16 * (4 * half + word % 4 // 2 + 2 * (i % 2)) + word // 4 * 4 + word % 2 * 2 + i // 2
        else:
            return 16 * (4 * half + i) + word


@triton.jit
def load_table8(book, BITS: tl.constexpr, LOOKUP: tl.constexpr):
    """The codebook as words of four entries; book: pointer to its first word, or [R, 1] pointers, a row each."""
    if not LOOKUP:
        return (book,)
    elif BITS <= 2:
        return (tl.load(book),)
    elif BITS == 3:
        return tl.load(book), tl.load(book + 1)
    elif BITS == 4:
        return tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3)
    elif BITS == 5:
        return (
            tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3),
            tl.load(book + 4), tl.load(book + 5), tl.load(book + 6), tl.load(book + 7),
        )  # fmt: skip
    else:
        return (
            tl.load(book), tl.load(book + 1), tl.load(book + 2), tl.load(book + 3),
            tl.load(book + 4), tl.load(book + 5), tl.load(book + 6), tl.load(book + 7),
            tl.load(book + 8), tl.load(book + 9), tl.load(book + 10), tl.load(book + 11),
            tl.load(book + 12), tl.load(book + 13), tl.load(book + 14), tl.load(book + 15),
        )  # fmt: skip


@triton.jit
def _plane(block, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    return tl.load(block.to(tl.pointer_type(DTYPE)) + tl.arange(0, COUNT)[None, :])


@triton.jit
def load_planes8(block, BITS: tl.constexpr):
    """The planes of one block of R rows: int32, a lane an element [R, 16]; up to 3 bits words of as many lanes as they hold."""
    if BITS == 1:
        return (_plane(block, tl.int32, 4),)
    elif BITS == 2:
        return (_plane(block, tl.int32, 8),)
    elif BITS == 3:
        even, odd = tl.split(tl.reshape(_plane(block, tl.int32, 8), (block.shape[0], 4, 2)))
        return even, odd, _plane(block + 32, tl.int32, 4)  # lanes 0, 1 of four; lanes 2, 3; the 1-bit plane of all four
    elif BITS == 4:
        return (_plane(block, tl.int32, LANES),)
    elif BITS == 5:
        return _plane(block, tl.int32, LANES), _plane(block + 64, tl.int8, LANES).to(tl.int32)
    elif BITS == 6:
        return _plane(block, tl.int32, LANES), _plane(block + 64, tl.int16, LANES).to(tl.int32)
    elif BITS == 7:
        return (
            _plane(block, tl.int32, LANES), _plane(block + 64, tl.int16, LANES).to(tl.int32),
            _plane(block + 96, tl.int8, LANES).to(tl.int32),
        )  # fmt: skip
    else:
        return _plane(block, tl.int32, LANES), _plane(block + 64, tl.int32, LANES)


@triton.jit
def _side_by_side(a, b):
    """Words [R, n] and [R, n] alternating, [R, 2 n]."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _eight(table, i: tl.constexpr, low):
    return prmt(table[2 * i], table[2 * i + 1], low)


@triton.jit
def _sixteen(table, i: tl.constexpr, low, third):
    return prmt(_eight(table, 2 * i, low), _eight(table, 2 * i + 1, low), third)


@triton.jit
def _chooser(bits):
    """From bit 0 of four nibbles, PRMT's selector of byte i of the first word, or of the second where the bit is 1."""
    return (bits << 2) | 0x3210


@triton.jit
def _spread_pairs(bits):
    """The low 8 bits as four pairs -> a pair in each of the low four nibbles."""
    bits = bits & 0xFF
    bits = (bits | (bits << 4)) & 0x0F0F
    return (bits | (bits << 2)) & 0x3333


@triton.jit
def _spread_bits(bits):
    """The low 4 bits -> bit 0 of each of the low four nibbles."""
    bits = bits & 0xF
    bits = (bits | (bits << 6)) & 0x0303
    return (bits | (bits << 3)) & 0x1111


@triton.jit
def _from_registers(planes, table, HALF: tl.constexpr, BITS: tl.constexpr):
    """Words [R, 16] of four weights."""
    if BITS == 2:
        pairs = (planes[0] >> (2 * HALF)) & 0x33333333
        return _side_by_side(prmt(table[0], table[0], pairs), prmt(table[0], table[0], pairs >> 16))
    elif BITS == 3:
        two = prmt(planes[0], planes[1], 0x7531 if HALF else 0x6420)  # fields 0 to 3, 2 bits each, of lanes a, b, c, d
        one = planes[2] >> 4 if HALF else planes[2]  # bits 0 to 3 of each byte: fields 0 to 3
        even = select(0x33333333, two, (one & 0x05050505) * 0x14)  # bits 0 and 2 also land on bits 2 and 6
        odd = select(0x33333333, two >> 2, (one & 0x0A0A0A0A) * 0x0A)  # bits 1 and 3 on bits 2 and 6
        first = tl.join(_eight(table, 0, even), _eight(table, 0, odd))
        second = tl.join(_eight(table, 0, even >> 16), _eight(table, 0, odd >> 16))
        return tl.reshape(tl.join(first, second), (two.shape[0], 16))  # [R, 4, even or odd, first or second two lanes]
    else:
        # Both halves are prepared at once: PRMT reads the low four nibbles of a selector.
        low = (planes[0] & 0x77777777) >> (16 * HALF)
        third = (((planes[0] >> 1) & 0x44444444) | 0x32103210) >> (16 * HALF)
        if BITS == 4:
            return _sixteen(table, 0, low, third)
        elif BITS == 5:
            fourth = _chooser(_spread_bits(planes[1] >> (4 * HALF)))
            return prmt(_sixteen(table, 0, low, third), _sixteen(table, 1, low, third), fourth)
        else:
            pairs = _spread_pairs(planes[1] >> (8 * HALF))
            fourth, fifth = _chooser(pairs & 0x1111), _chooser((pairs >> 1) & 0x1111)
            first = prmt(_sixteen(table, 0, low, third), _sixteen(table, 1, low, third), fourth)
            second = prmt(_sixteen(table, 2, low, third), _sixteen(table, 3, low, third), fourth)
            return prmt(first, second, fifth)


@triton.jit
def _ones(plane, table, j: tl.constexpr):
    """Words [R, 4] of field j of four neighbouring lanes: PRMT's sign mode spreads a bit over its byte."""
    signs = plane << (7 - j)
    mask = prmt(signs, signs, 0xBA98)
    zero, one = prmt(table[0], table[0], 0x0000), prmt(table[0], table[0], 0x1111)
    return select(mask, one, zero)


@triton.jit
def _looked_up(planes, book, j: tl.constexpr, BITS: tl.constexpr):
    """Bytes [R, 16] of field j, as int32 up to 255, from a codebook in memory."""
    index = (planes[0] >> (4 * j)) & 15
    if BITS == 7:
        index |= ((planes[1] >> (2 * j)) & 3) << 4
        index |= ((planes[2] >> j) & 1) << 6
    elif BITS == 8:
        index |= ((planes[1] >> (4 * j)) & 15) << 4
    return tl.load(book.to(tl.pointer_type(tl.uint8)) + index).to(tl.int32)


@triton.jit
def _bytes(words):
    """Words [R, n] of four bytes -> bytes [R, 4 n]."""
    low = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    high = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))  # [R, n, bit 1 of the byte, bit 0]


@triton.jit
def half_block8(planes, table, HALF: tl.constexpr, BITS: tl.constexpr, LOOKUP: tl.constexpr):
    """E4M3 bytes [R, 64], int8, of one half of a block, in the order of `column_of`."""
    if not LOOKUP:
        a, b = _looked_up(planes, table[0], 4 * HALF, BITS), _looked_up(planes, table[0], 4 * HALF + 1, BITS)
        c, d = _looked_up(planes, table[0], 4 * HALF + 2, BITS), _looked_up(planes, table[0], 4 * HALF + 3, BITS)
        return _bytes(a | (b << 8) | (c << 16) | (d << 24))
    elif BITS == 1:
        a, b = _ones(planes[0], table, 4 * HALF), _ones(planes[0], table, 4 * HALF + 1)
        c, d = _ones(planes[0], table, 4 * HALF + 2), _ones(planes[0], table, 4 * HALF + 3)
        joined = tl.join(tl.join(a, c), tl.join(b, d))  # [R, 4, high bit of the field, low bit]
        return _bytes(tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (a.shape[0], 16)))
    else:
        return _bytes(_from_registers(planes, table, HALF, BITS))
