"""The inline PTX that decodes weights, executed in Python statement by statement, on every combination of indices it looks up at once."""

import re

import numpy as np
import pytest
import triton.language as tl
from oracles import packed_bytes

from kmq_kernels.triton_kernels import decode


def plain(function, *arguments):
    """The Python value of a constexpr function."""
    value = getattr(function, "fn", function)(*arguments)
    return getattr(value, "value", value)


def prmt(a, b, selector):
    """PTX prmt.b32 in its default mode: nibble i of the selector picks byte i; its fourth bit repeats the sign of that byte."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pool >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * i)
    return out


def lop3(a, b, c, table):
    """PTX lop3.b32: bit i of the result is bit (4 a_i + 2 b_i + c_i) of the table."""
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


OPS = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mul.lo.u32": lambda a, b: a * b,
    "mov.b32": lambda a: a,
}


def execute(ptx, operands):
    """Runs straight-line PTX; operands: {number: uint32 array}. Returns them with what was written."""
    registers = {f"${number}": value for number, value in operands.items()}
    some = next(iter(operands.values()))

    def read(name):
        return registers[name] if name in registers else np.full_like(some, int(name, 0))

    statements = [one.strip() for one in ptx.strip(" {}").split(";") if one.strip()]
    assert statements[0].startswith(".reg .b32")
    for statement in statements[1:]:
        name, rest = statement.split(None, 1)
        to, *sources = re.split(r"\s*,\s*", rest)
        registers[to] = OPS[name](*map(read, sources))
    return registers


def sixteen_bits(bits, seed):
    """A codebook of 16-bit patterns whose low bytes differ from each other, and whose high bytes do."""
    generator = np.random.default_rng(seed)
    low, high = generator.permutation(256)[: 2**bits], generator.permutation(256)[: 2**bits]
    return (low | high << 8).astype(np.uint32)


def words(book, bits):
    """The registers that `table` builds from a codebook."""
    if bits == 1:
        return [book[0] * 0x10001, (book[0] ^ book[1]) * 0x10001]
    four = book.reshape(-1, 4)
    shifts = 8 * np.arange(4, dtype=np.uint32)
    low, high = ((four & 255) << shifts).sum(1), ((four >> 8) << shifts).sum(1)
    return [*low, *high]


def lanes_of(indices, bits):
    """Plane registers of `pack` lanes; indices (N, pack, 8): of each lane, its 8 fields. Taken from packed bytes of the drawing."""
    count, pack, _ = indices.shape
    block = np.zeros((count, 8, 16), np.uint8)
    block[:, :, :pack] = indices.transpose(0, 2, 1)
    stored = packed_bytes(block.reshape(count, 128), bits)
    if bits == 4:
        return [stored[:, 4 * lane : 4 * lane + 4].copy().view(np.uint32)[:, 0] for lane in range(2)]
    registers = []
    if bits >= 2:
        registers += [stored[:, 4 * pair : 4 * pair + 4].copy().view(np.uint32)[:, 0] for pair in range(pack // 2)]
    if bits % 2:
        registers.append(stored[:, 32 if bits == 3 else 0 :][:, :4].copy().view(np.uint32)[:, 0])
    return registers


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("field", range(8))
def test_every_combination(bits, field):
    """Lanes that share a look-up take every combination of indices in its fields; all other fields are random."""
    pack = plain(decode.pack_of, bits)
    generator = np.random.default_rng(8 * bits + field)
    together = {1: 1, 2: 2, 3: 2, 4: 2}[bits]  # fields of a lane in one selector
    partner = field ^ (1 if bits == 4 else 2)
    combinations = np.arange(2 ** (2 * together * bits), dtype=np.uint32)
    indices = generator.integers(0, 2**bits, (len(combinations), pack, 8))
    for first in range(0, pack, 2):  # lanes first and first + 1 are looked up at once
        digits = generator.permutation(combinations)
        for lane in (first, first + 1):
            for at in (field, partner)[:together]:
                indices[:, lane, at] = digits & 2**bits - 1
                digits = digits >> bits
    books = [sixteen_bits(bits, 1), sixteen_bits(bits, 2)]  # rows of lanes 0, 1 and of lanes 2, 3 may differ
    constraints = plain(decode.constraints, bits).split(",")
    outputs = sum(one.startswith("=") for one in constraints)
    operands, number = {}, outputs
    for register in lanes_of(indices, bits):
        operands[number], number = register, number + 1
    for pair in zip(words(books[0], bits), words(books[1], bits), strict=True):
        for element in range(pack):
            operands[number], number = np.full(len(indices), pair[element // 2], np.uint32), number + 1
    assert number == len(constraints)
    done = execute(plain(decode.recipe, bits, field), operands)
    for element in range(pack):
        got = done[f"${element // 2}"] >> np.uint32(16 * (element % 2)) & np.uint32(0xFFFF)
        assert np.array_equal(got, books[element // 2][indices[:, element, field]])


def test_which_weights_have_a_recipe():
    for dtype in (tl.float16, tl.bfloat16):
        assert [plain(decode.has_recipe, bits, dtype) for bits in range(1, 9)] == [True] * 4 + [False] * 4
    assert not plain(decode.has_recipe, 4, tl.float32)


def test_emulated_instructions():
    one = lambda *values: [np.array([value], np.uint32) for value in values]  # noqa: E731
    assert prmt(*one(0x03020100, 0x87060504, 0x7F40))[0] == 0x87FF0400
    assert lop3(*one(0b1100, 0b1010, 0b0110, 0xE4))[0] == (0b1100 & 0b0110 | 0b1010 & ~0b0110)
