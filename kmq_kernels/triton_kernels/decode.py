"""Packed indices to weights inside a kernel: what the Triton kernels share. The bit layout is drawn in packing.py.

Two decoders give the same bits. The plain one extracts each index and loads from the codebook; it does every width and dtype. The
other, for 16-bit weights of 1 to 4 bits (`has_lookup`), keeps the codebook in registers. PRMT selects 4 of 8 bytes by 3-bit
selectors that lie in nibbles: with the low bytes of 8 entries in two registers, the high bytes in two, it looks up 4 indices.
All it handles are 32-bit words: of indices, of eight selectors, of two weights (one field of two neighbouring lanes).

PRMT and LOP3 are inline PTX. Triton's interpreter, which runs no PTX, gets the same bits from plain integer operations.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.constexpr_function
def has_lookup(bits: int, dtype: tl.dtype) -> bool:
    """Whether the decoder with the codebook in registers has weights of `dtype` with `bits` bits an index."""
    return bits <= 4 and dtype.primitive_bitwidth == 16


@triton.jit
def _picked_byte(pool, selector, i: tl.constexpr):
    nibble = (selector >> (4 * i)).to(tl.int64) & 15
    byte = (pool >> ((nibble & 7) * 8)) & 255
    byte = tl.where(nibble > 7, tl.where(byte > 127, 255, 0), byte)
    return byte << (8 * i)


@triton.jit
def prmt(a, b, selector):
    """PTX prmt.b32: byte i of the result is the byte of (a, b) that nibble i of the selector names; bit 3 repeats its sign."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        selector = selector + tl.zeros_like(a)
        pool = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
        low = _picked_byte(pool, selector, 0) | _picked_byte(pool, selector, 1)
        return (low | _picked_byte(pool, selector, 2) | _picked_byte(pool, selector, 3)).to(tl.int32)


@triton.jit
def select(mask, a, b):
    """Bits of a where the mask has 1, of b elsewhere, as one LOP3."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [mask, a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (a & mask) | (b & ~mask)


@triton.jit
def _bits16(book, i: tl.constexpr, DTYPE: tl.constexpr):
    """The 16 bits of entry i of a codebook, as int32."""
    return tl.load(book + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _byte_words(book, i: tl.constexpr, DTYPE: tl.constexpr):
    """The low bytes and the high bytes of entries i to i + 3."""
    a = _bits16(book, i, DTYPE)
    b = _bits16(book, i + 1, DTYPE)
    c = _bits16(book, i + 2, DTYPE)
    d = _bits16(book, i + 3, DTYPE)
    low = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)
    high = (a >> 8) | ((b >> 8) << 8) | ((c >> 8) << 16) | ((d >> 8) << 24)
    return low, high


@triton.jit
def load_table(book, BITS: tl.constexpr, DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
    """What `half_block` looks values up in. book: pointer to the codebook, or [R, 1] pointers to that of each row."""
    if not LOOKUP:
        return (book,)
    elif BITS == 1:
        zero = _bits16(book, 0, DTYPE)
        change = zero ^ _bits16(book, 1, DTYPE)
        return zero | (zero << 16), change | (change << 16)
    elif BITS == 2:
        return _byte_words(book, 0, DTYPE)
    elif BITS == 3:
        low0, high0 = _byte_words(book, 0, DTYPE)
        low1, high1 = _byte_words(book, 4, DTYPE)
        return low0, low1, high0, high1
    else:
        low0, high0 = _byte_words(book, 0, DTYPE)
        low1, high1 = _byte_words(book, 4, DTYPE)
        low2, high2 = _byte_words(book, 8, DTYPE)
        low3, high3 = _byte_words(book, 12, DTYPE)
        return low0, low1, low2, low3, high0, high1, high2, high3


@triton.jit
def _load(plane, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    return tl.load(plane.to(tl.pointer_type(DTYPE)) + tl.arange(0, COUNT)[None, :])


@triton.jit
def _halves(words):
    """[R, 2 n] -> the even and the odd columns, [R, n] each."""
    return tl.split(tl.reshape(words, (words.shape[0], words.shape[1] // 2, 2)))


@triton.jit
def load_planes(block, BITS: tl.constexpr, LOOKUP: tl.constexpr):
    """The planes of one block (128 columns) of R rows; block: [R, 1] pointers to its first byte in each row.

    For the plain decoder tiles [R, 16], a lane an element: int32 for a 4-bit plane, int16 for 2 bits, int8 for 1 bit. With LOOKUP
    int32 words: for 2 and 4 bits [R, 8], a pair of lanes an element; for 1 and 3 bits [R, 4], four lanes an element.
    """
    if LOOKUP:
        if BITS == 4:
            return _halves(_load(block, tl.int32, 16))  # even lanes, odd lanes
        elif BITS == 3:
            even, odd = _halves(_load(block, tl.int32, 8))
            return even, odd, _load(block + 32, tl.int32, 4)  # lanes 0, 1 of four; lanes 2, 3; the 1-bit plane of all four
        elif BITS == 2:
            return (_load(block, tl.int32, 8),)
        else:
            return (_load(block, tl.int32, 4),)
    elif BITS == 8:
        return _load(block, tl.int32, LANES), _load(block + 64, tl.int32, LANES)
    elif BITS == 7:
        return _load(block, tl.int32, LANES), _load(block + 64, tl.int16, LANES), _load(block + 96, tl.int8, LANES)
    elif BITS == 6:
        return _load(block, tl.int32, LANES), _load(block + 64, tl.int16, LANES)
    elif BITS == 5:
        return _load(block, tl.int32, LANES), _load(block + 64, tl.int8, LANES)
    elif BITS == 4:
        return (_load(block, tl.int32, LANES),)
    elif BITS == 3:
        return _load(block, tl.int16, LANES), _load(block + 32, tl.int8, LANES)
    elif BITS == 2:
        return (_load(block, tl.int16, LANES),)
    else:
        return (_load(block, tl.int8, LANES),)


@triton.jit
def _field(plane, j, WIDTH: tl.constexpr):
    return (plane.to(tl.int32) >> (j * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def index(planes, j, BITS: tl.constexpr):
    """Indices [R, 16] of field j, int32: columns 16 * j to 16 * j + 15 of the block. From j [n, 1, 1] indices [n, R, 16]."""
    if BITS == 8:
        return _field(planes[0], j, 4) | (_field(planes[1], j, 4) << 4)
    elif BITS == 7:
        return _field(planes[0], j, 4) | (_field(planes[1], j, 2) << 4) | (_field(planes[2], j, 1) << 6)
    elif BITS == 6:
        return _field(planes[0], j, 4) | (_field(planes[1], j, 2) << 4)
    elif BITS == 5:
        return _field(planes[0], j, 4) | (_field(planes[1], j, 1) << 4)
    elif BITS == 3:
        return _field(planes[0], j, 2) | (_field(planes[1], j, 1) << 2)
    else:
        return _field(planes[0], j, BITS)


@triton.jit
def _couples(low, high):
    """Low and high bytes of four weights w, x, y, z -> the words (w, y) and (x, z)."""
    return prmt(low, high, 0x6240), prmt(low, high, 0x7351)


@triton.jit
def _lookup4(selectors, fourth, table):
    """4-bit indices in the low four nibbles: bits 0 to 2 select among entries 0-7 and among 8-15, bit 3 between the two."""
    low = prmt(prmt(table[0], table[1], selectors), prmt(table[2], table[3], selectors), fourth)
    high = prmt(prmt(table[4], table[5], selectors), prmt(table[6], table[7], selectors), fourth)
    return _couples(low, high)


@triton.jit
def _fields4(planes, table, HALF: tl.constexpr):
    """Fields 4 * HALF to 4 * HALF + 3 of 4-bit indices, words [R, 8] of lanes (2 i, 2 i + 1)."""
    nibbles = prmt(planes[0], planes[1], 0x7362 if HALF else 0x5140)  # lane a: fields 0, 1; lane b: 0, 1; a: 2, 3; b: 2, 3
    fourth = (nibbles >> 1) & 0x44444444
    fourth = fourth | 0x32103210  # byte i of the first look-up, or byte i of the second
    nibbles = nibbles & 0x77777777
    f0, f1 = _lookup4(nibbles, fourth, table)
    f2, f3 = _lookup4(nibbles >> 16, fourth >> 16, table)
    return f0, f1, f2, f3


@triton.jit
def _fields3(planes, table, HALF: tl.constexpr):
    """The same of 3-bit indices. The third bits, one of each byte for each field, are multiplied to where they belong."""
    two = prmt(planes[0], planes[1], 0x7531 if HALF else 0x6420)  # fields 0 to 3, 2 bits each, of lanes a, b, c, d
    one = planes[2] >> 4 if HALF else planes[2]  # bits 0 to 3 of each byte: fields 0 to 3
    even = select(0x33333333, two, (one & 0x05050505) * 0x14)  # bits 0 and 2 also land on bits 2 and 6
    odd = select(0x33333333, two >> 2, (one & 0x0A0A0A0A) * 0x0A)  # bits 1 and 3 on bits 2 and 6
    f0, f2 = _couples(prmt(table[0], table[1], even), prmt(table[2], table[3], even))
    f1, f3 = _couples(prmt(table[0], table[1], odd), prmt(table[2], table[3], odd))
    even = even >> 16
    odd = odd >> 16
    g0, g2 = _couples(prmt(table[0], table[1], even), prmt(table[2], table[3], even))
    g1, g3 = _couples(prmt(table[0], table[1], odd), prmt(table[2], table[3], odd))
    return _pairs(f0, g0), _pairs(f1, g1), _pairs(f2, g2), _pairs(f3, g3)


@triton.jit
def _pairs(first, second):
    """Words [R, 4] of lanes (4 i, 4 i + 1) and of lanes (4 i + 2, 4 i + 3) -> words [R, 8] of lanes (2 i, 2 i + 1)."""
    return tl.reshape(tl.join(first, second), (first.shape[0], 8))


@triton.jit
def _fields2(planes, table, HALF: tl.constexpr):
    two = prmt(planes[0], planes[0], 0x3120)  # lane a: fields 0 to 3; b: 0 to 3; a: 4 to 7; b: 4 to 7
    even = (two & 0x33333333) >> (16 * HALF)
    odd = ((two >> 2) & 0x33333333) >> (16 * HALF)
    f0, f2 = _couples(prmt(table[0], table[0], even), prmt(table[1], table[1], even))
    f1, f3 = _couples(prmt(table[0], table[0], odd), prmt(table[1], table[1], odd))
    return f0, f1, f2, f3


@triton.jit
def _field1(plane, table, j: tl.constexpr):
    """A bit spread over a weight by PRMT's sign mode switches between the two entries."""
    signs = plane << (7 - j)
    first = (prmt(signs, signs, 0x9988) & table[1]) ^ table[0]
    second = (prmt(signs, signs, 0xBBAA) & table[1]) ^ table[0]
    return _pairs(first, second)


@triton.jit
def _columns4(a, b, c, d):
    """Four fields [R, n] side by side, [R, 4 n]."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [R, n, high bit of the field, low bit]
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def _weights(words, DTYPE: tl.constexpr):
    """Words [R, n] of two weights -> [R, 2 n]."""
    low = words.to(tl.int16).to(DTYPE, bitcast=True)
    high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def decode(planes, book, j: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [R, 16] of field j in DTYPE, by the plain decoder."""
    return tl.load(book + index(planes, j, BITS)).to(DTYPE)


@triton.jit
def half_block(planes, table, HALF: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
    """Weights [R, 64] of columns 64 * HALF to 64 * HALF + 63 of the block, from `load_planes` and `load_table`."""
    if not LOOKUP:
        return _columns4(
            decode(planes, table[0], 4 * HALF, BITS, DTYPE),
            decode(planes, table[0], 4 * HALF + 1, BITS, DTYPE),
            decode(planes, table[0], 4 * HALF + 2, BITS, DTYPE),
            decode(planes, table[0], 4 * HALF + 3, BITS, DTYPE),
        )
    else:
        if BITS == 4:
            f0, f1, f2, f3 = _fields4(planes, table, HALF)
        elif BITS == 3:
            f0, f1, f2, f3 = _fields3(planes, table, HALF)
        elif BITS == 2:
            f0, f1, f2, f3 = _fields2(planes, table, HALF)
        else:
            f0 = _field1(planes[0], table, 4 * HALF)
            f1 = _field1(planes[0], table, 4 * HALF + 1)
            f2 = _field1(planes[0], table, 4 * HALF + 2)
            f3 = _field1(planes[0], table, 4 * HALF + 3)
        return _columns4(_weights(f0, DTYPE), _weights(f1, DTYPE), _weights(f2, DTYPE), _weights(f3, DTYPE))
