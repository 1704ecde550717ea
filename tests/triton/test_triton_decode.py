"""The decoders that the Triton kernels share, and the instructions that they are built of."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from oracles import packed_bytes

from kmq_kernels.triton_kernels import decode


@triton.jit
def prmt_kernel(a, b, selector, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, decode.prmt(tl.load(a + at), tl.load(b + at), tl.load(selector + at)))


@triton.jit
def select_kernel(mask, a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, decode.select(tl.load(mask + at), tl.load(a + at), tl.load(b + at)))


@triton.jit
def half_block_kernel(packed, codebook, out, BITS: tl.constexpr, SHARED: tl.constexpr, LOOKUP: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    book = codebook if SHARED else codebook + (row * 2**BITS)[:, None]
    DTYPE: tl.constexpr = codebook.dtype.element_ty
    table = decode.load_table(book, BITS, DTYPE, LOOKUP)
    planes = decode.load_planes(packed + row[:, None] * (16 * BITS), BITS, LOOKUP)
    to = out + row[:, None] * 128 + tl.arange(0, 64)[None, :]
    tl.store(to, decode.half_block(planes, table, 0, BITS, DTYPE, LOOKUP))
    tl.store(to + 64, decode.half_block(planes, table, 1, BITS, DTYPE, LOOKUP))


def bits_of(numbers, device):
    return torch.from_numpy(np.asarray(numbers, np.uint32).view(np.int32)).to(device)


def numbers_of(tensor):
    return tensor.cpu().numpy().view(np.uint32)


def test_prmt_is_what_the_ptx_manual_says(device):
    """Mode default of prmt.b32: byte i is the byte that nibble i of the selector names, or eight copies of its sign."""
    generator = np.random.default_rng(0)
    a, b, selector = generator.integers(0, 2**32, (3, 4096), dtype=np.uint64)
    selector[:16] = [0x11111111 * nibble for nibble in range(16)]
    pool = [(number >> (8 * i)) & 255 for number in (a, b) for i in range(4)]
    expected = np.zeros(4096, np.uint64)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = np.choose((nibble & 7).astype(int), pool)
        expected |= np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint64) << np.uint64(8 * i)
    out = torch.empty(4096, dtype=torch.int32, device=device)
    prmt_kernel[(1,)](*(bits_of(each, device) for each in (a, b, selector)), out, N=4096)
    assert np.array_equal(numbers_of(out), expected.astype(np.uint32))


def test_select_is_lop3_with_table_ca(device):
    """Bit i of lop3.b32 is bit 4 a_i + 2 b_i + c_i of the table; 0xCA takes b where a is 1, c elsewhere."""
    assert [0xCA >> (4 * a + 2 * b + c) & 1 for a in (0, 1) for b in (0, 1) for c in (0, 1)] == [0, 1, 0, 1, 0, 0, 1, 1]
    mask, a, b = np.random.default_rng(0).integers(0, 2**32, (3, 1024), dtype=np.uint64)
    out = torch.empty(1024, dtype=torch.int32, device=device)
    select_kernel[(1,)](*(bits_of(each, device) for each in (mask, a, b)), out, N=1024)
    assert np.array_equal(numbers_of(out), (a & mask | b & ~mask).astype(np.uint32))


def decoded(index, books, bits, dtype, lookup, device):
    """The bits of the weights (rows, 128) that a kernel decodes; books (1 or rows, K) uint16."""
    packed = torch.from_numpy(packed_bytes(index, bits)).to(device)
    codebook = torch.from_numpy(books.view(np.int16)).to(device).view(dtype)
    out = torch.empty(index.shape, dtype=dtype, device=device)
    rows = min(len(index), 4096 if device == "cpu" else 64)  # of a program; the interpreter likes few large ones
    half_block_kernel[(len(index) // rows,)](packed, codebook, out, BITS=bits, SHARED=len(books) == 1, LOOKUP=lookup, ROWS=rows)
    return out.view(torch.int16).cpu().numpy().view(np.uint16)


def different_bytes(bits, rows):
    """Codebooks (rows, K) uint16 in which no byte occurs twice in the low half, nor in the high half: a wrong byte is seen."""
    generator = np.random.default_rng(bits)
    low, high = generator.permutation(256)[: 2**bits], generator.permutation(256)[: 2**bits]
    return np.stack([np.roll(low, row) | np.roll(high, row) << 8 for row in range(rows)]).astype(np.uint16)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_combination_of_indices_that_are_looked_up_together(bits, device):
    """A PRMT looks up four indices, two fields of two neighbouring lanes: all 2 ** (4 bits) combinations, in all field pairs."""
    combinations = np.random.default_rng(bits).permutation(2 ** (4 * bits))
    rows = max(len(combinations) // 8, 2)  # 8 pairs of lanes in a row
    index = np.zeros((rows, 8, 16), np.uint8)
    for f, g in [(0, 1), (2, 3), (4, 5), (6, 7)] if bits == 4 else [(0, 2), (1, 3), (4, 6), (5, 7)]:
        values = np.roll(combinations, 11 * f + g).reshape(rows, 8)
        for place, (field, lane) in enumerate([(f, 0), (g, 0), (f, 1), (g, 1)]):
            index[:, field, lane::2] = values >> (bits * place) & 2**bits - 1
    index, books = index.reshape(rows, 128), different_bytes(bits, 1)
    assert np.array_equal(decoded(index, books, bits, torch.float16, True, device), books[0][index])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 64])
def test_decoders_agree(bits, rows, device):
    """A codebook for all rows, or one for each; fp16 and bf16; both decoders."""
    index, books = np.random.default_rng(bits).integers(0, 2**bits, (64, 128)).astype(np.uint8), different_bytes(bits, rows)
    expected = np.stack([books[row % rows][index[row]] for row in range(64)])
    for dtype in (torch.float16, torch.bfloat16):
        for lookup in (True, False)[bits > 4 :]:
            assert np.array_equal(decoded(index, books, bits, dtype, lookup, device), expected)


def test_which_weights_have_a_lookup():
    function = getattr(decode.has_lookup, "fn", decode.has_lookup)
    for dtype in (tl.float16, tl.bfloat16):
        assert [bool(function(bits, dtype)) for bits in range(1, 9)] == [True] * 4 + [False] * 4
    assert not function(4, tl.float32)
