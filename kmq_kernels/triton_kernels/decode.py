"""Packed indices to weights inside a kernel: what the Triton kernels share. The bit layout is drawn in packing.py.

A kernel loads the planes of one block (128 columns) of R rows as tiles [R, 16], a lane an element: int32 for a 4-bit plane, int16
for a 2-bit plane, int8 for a 1-bit plane. Field j of the tiles is columns 16 * j to 16 * j + 15 of the block.

Two decoders give the same bits. The twin extracts the index and loads from the codebook; it runs anywhere. `recipe` is inline
PTX for 16-bit weights of 1 to 4 bits. PRMT selects 4 of 8 bytes by 3-bit selectors that lie in nibbles: with the low bytes of a
codebook in two registers, and the high bytes in two, it looks up 4 indices of 3 bits at once. The recipe takes `pack_of`
neighbouring elements of a tile, lanes a, b (and c, d), and gives their weights in one field.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)


@triton.constexpr_function
def has_recipe(bits: int, dtype: tl.dtype) -> bool:
    """Whether `recipe` decodes indices of `bits` bits to weights of `dtype`."""
    return bits <= 4 and dtype.primitive_bitwidth == 16


@triton.constexpr_function
def pack_of(bits: int) -> int:
    """Neighbouring elements that one run of the recipe takes: those that fill a register of the narrowest plane, at most 4."""
    return 4 if bits % 2 else 2


@triton.constexpr_function
def table_words(bits: int) -> int:
    """Registers that the table of the recipe takes."""
    return {1: 2, 2: 2, 3: 4, 4: 8}[bits]


@triton.constexpr_function
def constraints(bits: int) -> str:
    """Outputs, plane registers and table registers of `recipe`; a table word comes once for each of the `pack` elements."""
    pack = 4 if bits % 2 else 2
    planes = {1: 1, 2: 1, 3: 3, 4: 2}[bits]
    words = {1: 2, 2: 2, 3: 4, 4: 8}[bits]
    return ",".join(["=r"] * (pack // 2) + ["r"] * (planes + words * pack))


@triton.constexpr_function
def recipe(bits: int, field: int) -> str:
    """PTX that decodes one field; operands as in `constraints`, table words as `byte_table` orders them.

    Written once for each field; ptxas finds the steps that fields share.
    """
    odd, upper = field % 2, field // 4
    pair = "0x7351" if field % 4 > 1 else "0x6240"  # bytes of the field's two weights among the four looked up
    if bits == 1:  # table: codebook[0] twice, codebook[0] ^ codebook[1] twice; PRMT spreads the sign bit of a byte
        shift = f"shl.b32 c, $2, {7 - field};" if field < 7 else "mov.b32 c, $2;"
        return (
            "{ .reg .b32 c, p, q;" + shift + "prmt.b32 p, c, c, 0x9988; prmt.b32 q, c, c, 0xBBAA;"
            "lop3.b32 $0, p, $7, $3, 0x6A; lop3.b32 $1, q, $9, $5, 0x6A; }"
        )
    if bits == 2:  # table: low bytes of the 4 entries, high bytes
        return (
            "{ .reg .b32 t, lo, hi; prmt.b32 t, $1, $1, 0x3120;"
            + ("shr.u32 t, t, 2;" if odd else "")
            + "and.b32 t, t, 0x33333333;"
            + ("shr.u32 t, t, 16;" if upper else "")
            + f"prmt.b32 lo, $2, $2, t; prmt.b32 hi, $4, $4, t; prmt.b32 $0, lo, hi, {pair}; }}"
        )
    if bits == 3:  # table: low bytes of entries 0-3, 4-7, high bytes of 0-3, 4-7. The third bit comes from the 1-bit plane:
        # bits 0 and 2 (odd fields: 1 and 3) of each byte, multiplied so that they land on bits 2 and 6.
        third = ("0x0A0A0A0A", "10") if odd else ("0x05050505", "20")
        lookups = "".join(
            f"prmt.b32 lo, ${5 + e}, ${9 + e}, s; prmt.b32 hi, ${13 + e}, ${17 + e}, s; prmt.b32 ${e // 2}, lo, hi, {pair};"
            + ("" if e else "shr.u32 s, s, 16;")
            for e in (0, 2)
        )
        return (
            "{ .reg .b32 s, c, lo, hi;"
            + f"prmt.b32 s, $2, $3, {'0x7531' if upper else '0x6420'};"
            + ("shr.u32 s, s, 2;" if odd else "")
            + ("shr.u32 c, $4, 4;" if upper else "mov.b32 c, $4;")
            + f"and.b32 c, c, {third[0]}; mul.lo.u32 c, c, {third[1]}; lop3.b32 s, s, c, 0x33333333, 0xE4;"
            + lookups
            + "}"
        )
    # 4 bits. Table: low bytes of entries 0-3, 4-7, 8-11, 12-15, then high bytes. Two levels: the low 3 bits of an index select
    # among entries 0-7 and among 8-15, the fourth bit between the two.
    pair = "0x7351" if odd else "0x6240"
    return (
        "{ .reg .b32 t, m, s, a, b, lo, hi;"
        + f"prmt.b32 t, $1, $2, {'0x7362' if upper else '0x5140'};"
        + "shr.u32 s, t, 1; lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA; and.b32 m, t, 0x77777777;"
        + ("shr.u32 m, m, 16; shr.u32 s, s, 16;" if field % 4 > 1 else "")
        + "prmt.b32 a, $3, $5, m; prmt.b32 b, $7, $9, m; prmt.b32 lo, a, b, s;"
        + "prmt.b32 a, $11, $13, m; prmt.b32 b, $15, $17, m; prmt.b32 hi, a, b, s;"
        + f"prmt.b32 $0, lo, hi, {pair}; }}"
    )


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
    lo = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)
    hi = (a >> 8) | ((b >> 8) << 8) | ((c >> 8) << 16) | ((d >> 8) << 24)
    return lo, hi


@triton.jit
def table(book, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """What `decode` looks values up in. book: pointer to the codebook, or [R, 1] pointers to that of each row."""
    if not PTX:
        return (book,)
    elif BITS == 1:
        zero = _bits16(book, 0, DTYPE)
        both = zero ^ _bits16(book, 1, DTYPE)
        return zero | (zero << 16), both | (both << 16)
    elif BITS == 2:
        return _byte_words(book, 0, DTYPE)
    elif BITS == 3:
        l0, h0 = _byte_words(book, 0, DTYPE)
        l1, h1 = _byte_words(book, 4, DTYPE)
        return l0, l1, h0, h1
    else:
        l0, h0 = _byte_words(book, 0, DTYPE)
        l1, h1 = _byte_words(book, 4, DTYPE)
        l2, h2 = _byte_words(book, 8, DTYPE)
        l3, h3 = _byte_words(book, 12, DTYPE)
        return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def load_planes(block, BITS: tl.constexpr):
    """Tiles [R, 16] of the planes of one block. block: [R, 1] pointers to its first byte in each row."""
    lane = tl.arange(0, LANES)[None, :]
    if BITS == 8:
        word = block.to(tl.pointer_type(tl.int32)) + lane
        return tl.load(word), tl.load(word + LANES)
    elif BITS == 7:
        half = (block + 64).to(tl.pointer_type(tl.int16)) + lane
        byte = (block + 96).to(tl.pointer_type(tl.int8)) + lane
        return tl.load(block.to(tl.pointer_type(tl.int32)) + lane), tl.load(half), tl.load(byte)
    elif BITS == 6:
        half = (block + 64).to(tl.pointer_type(tl.int16)) + lane
        return tl.load(block.to(tl.pointer_type(tl.int32)) + lane), tl.load(half)
    elif BITS == 5:
        byte = (block + 64).to(tl.pointer_type(tl.int8)) + lane
        return tl.load(block.to(tl.pointer_type(tl.int32)) + lane), tl.load(byte)
    elif BITS == 4:
        return (tl.load(block.to(tl.pointer_type(tl.int32)) + lane),)
    elif BITS == 3:
        byte = (block + 32).to(tl.pointer_type(tl.int8)) + lane
        return tl.load(block.to(tl.pointer_type(tl.int16)) + lane), tl.load(byte)
    elif BITS == 2:
        return (tl.load(block.to(tl.pointer_type(tl.int16)) + lane),)
    else:
        return (tl.load(block.to(tl.pointer_type(tl.int8)) + lane),)


@triton.jit
def _field(plane, j: tl.constexpr, WIDTH: tl.constexpr):
    return (plane.to(tl.int32) >> (j * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def index(planes, j: tl.constexpr, BITS: tl.constexpr):
    """Indices [R, 16] of field j, int32."""
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
def decode(planes, table, j: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Weights [R, 16] of field j in DTYPE, with what `table` returned."""
    if not PTX:
        return tl.load(table[0] + index(planes, j, BITS)).to(DTYPE)
    else:
        weight = tl.full((), 0, DTYPE).dtype  # inline_asm_elementwise takes no constexpr here
        if BITS <= 2:
            operands = [planes[0], table[0], table[1]]
        elif BITS == 3:
            operands = [planes[0], planes[1], table[0], table[1], table[2], table[3]]
        else:
            operands = [planes[0], table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]]
        return tl.inline_asm_elementwise(
            recipe(BITS, j), constraints(BITS), operands, dtype=weight, is_pure=True, pack=pack_of(BITS)
        )


@triton.jit
def columns4(a, b, c, d):
    """Four fields [R, 16] side by side, [R, 64]."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [R, lane, high bit of the field, low bit]
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), (a.shape[0], 4 * LANES))


@triton.jit
def half_block(planes, table, FIRST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Weights [R, 64] of fields FIRST to FIRST + 3: half a block."""
    return columns4(
        decode(planes, table, FIRST, BITS, DTYPE, PTX),
        decode(planes, table, FIRST + 1, BITS, DTYPE, PTX),
        decode(planes, table, FIRST + 2, BITS, DTYPE, PTX),
        decode(planes, table, FIRST + 3, BITS, DTYPE, PTX),
    )
