"""fp8_linear: its byte decoder, its rounding and its product in the interpreter (or on a device), beside the values upcast."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from oracles import linear64, packed_bytes, relative_rms, weight64
from test_dequantize import problem

from kmq_kernels.triton_kernels import fp8_decode, fp8_linear
from kmq_kernels.triton_kernels.codebook_linear import Tile

E4M3 = torch.float8_e4m3fn


@triton.jit
def decode_kernel(packed, table, out, BITS: tl.constexpr, SHARED: tl.constexpr, LOOKUP: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    WORDS: tl.constexpr = 2**BITS // 4 if BITS > 2 else 1
    book = table if SHARED else table + (row * WORDS)[:, None]
    words = fp8_decode.load_table8(book, BITS, LOOKUP)
    planes = fp8_decode.load_planes8(packed + row[:, None] * (16 * BITS), BITS)
    to = out + row[:, None] * 128
    k = tl.arange(0, 64)[None, :]
    for half in tl.static_range(2):
        tl.store(to + fp8_decode.column_of(half * 64 + k, BITS), fp8_decode.half_block8(planes, words, half, BITS, LOOKUP))


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, fp8_linear.e4m3_bytes(tl.load(x + at)))


@triton.jit
def value_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, fp8_linear.e4m3_values(tl.load(x + at), tl.float32).to(tl.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 64])
def test_every_index_gives_its_byte_at_its_column(bits, rows, device):
    """All indices in all fields and lanes, a codebook for all rows or one for each; column_of names each column once."""
    generator = np.random.default_rng(bits)
    index = generator.integers(0, 2**bits, (64, 128)).astype(np.uint8)
    index[:32] = (np.arange(32)[:, None] * 8 + np.arange(128)[None, :] // 16 + np.arange(128)[None, :] % 16 * 3) % 2**bits
    books = np.stack([np.roll(generator.permutation(256)[: 2**bits], row) for row in range(rows)]).astype(np.uint8)
    expected = np.stack([books[row % rows][index[row]] for row in range(64)])
    padded = np.pad(books, ((0, 0), (0, max(4 - 2**bits, 0))))
    table = torch.from_numpy(padded).to(device).view(torch.int32)
    packed = torch.from_numpy(packed_bytes(index, bits)).to(device)
    for lookup in (True, False) if bits in (7, 8) else (True,):
        if lookup and bits > 6:
            continue
        out = torch.zeros(64, 128, dtype=torch.int8, device=device)
        decode_kernel[(1,)](packed, table, out, BITS=bits, SHARED=rows == 1, LOOKUP=lookup, ROWS=64)
        assert np.array_equal(out.cpu().numpy().view(np.uint8), expected)


def test_rounding_is_that_of_torch(device):
    """Every E4M3 value, what lies between two neighbours, ties, subnormals, zeros; NaN, and what is beyond the largest."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    finite = every[every.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([torch.nextafter(middle, finite[1:]), torch.nextafter(middle, finite[:-1])])
    x = torch.cat([finite, middle, near, torch.linspace(-448, 448, 3000), torch.randn(200) / 100])
    x = torch.nn.functional.pad(x, (0, 4096 - len(x)))
    out = torch.zeros(4096, dtype=torch.int8, device=device)
    round_kernel[(1,)](x.to(device), out, N=4096)
    assert torch.equal(out.cpu().view(E4M3).float(), x.to(E4M3).float())
    odd = torch.tensor([torch.nan, 1e9, -1e9, 460.0])
    out = torch.zeros(4, dtype=torch.int8, device=device)
    round_kernel[(1,)](odd.to(device), out, N=4)
    got = out.cpu().view(E4M3).float()
    assert got[0].isnan()
    assert got[1:].tolist() == [448.0, -448.0, 448.0]
    back = torch.zeros(256, device=device)
    value_kernel[(1,)](torch.arange(256, dtype=torch.uint8).view(torch.int8).to(device), back, N=256)
    assert torch.equal(back.cpu().nan_to_num(nan=1e9), every.nan_to_num(nan=1e9))


def test_a_codebook_is_rounded_with_the_scale_of_least_error():
    """Beside every scale of the octave tried one by one; entries that a power of two scales into E4M3 stay exact."""
    torch.manual_seed(0)
    book = torch.randn(3, 16)
    table, scale = fp8_linear.round_codebook(book)
    assert (table.shape, table.dtype, scale.shape) == ((3, 16), torch.uint8, (1,))
    rounded = table.view(E4M3).double() * scale.double()
    errors = []
    for step in range(64):
        factor = float(book.abs().max()) / 448 * 2 ** (step / 64)
        errors.append(float(((book.double() / factor).to(E4M3).double() * factor - book.double()).square().sum()))
    assert float((rounded - book.double()).square().sum()) <= min(errors) * (1 + 1e-5)
    assert float((rounded - book.double()).abs().max()) <= float(book.abs().max()) / 16
    exact = torch.tensor([[-448.0, -1.0, 0.25, 448.0]]) / 64
    table, scale = fp8_linear.round_codebook(exact)
    assert torch.equal(table.view(E4M3).float() * scale, exact)
    for bits in (1, 2):  # a word has four entries
        assert fp8_linear.round_codebook(torch.randn(2, 2**bits))[0].shape == (2, 4)
    zeros, scale = fp8_linear.round_codebook(torch.zeros(1, 8))
    assert torch.equal(zeros.view(E4M3).float() * scale, torch.zeros(1, 8))
    assert fp8_linear.round_codebook(torch.zeros(0, 16))[0].shape == (0, 16)


def expected_of(x, index, table, scale, bits, group_rows, bias):
    """float64 of the values that were rounded: rows of x by their own scale, the codebook by its."""
    largest = x.float().abs().amax(1, keepdim=True)
    rows = (x.float() * (448.0 / largest)).to(E4M3).double() * (largest.double() / 448)
    book = table[:, : 2**bits].view(E4M3).double() * scale.double()
    return linear64(rows, weight64(index, book, group_rows), bias)


@pytest.mark.parametrize("bits", range(1, 9))
def test_against_the_values_upcast_and_without_rounding(bits, device):
    """One element; tails in every direction; a codebook for each row. What rounding costs is stated: 2 to 4 per cent."""
    for M, OUT, IN, group_rows, dtype in (
        (1, 1, 1, 1, torch.float32),
        (5, 37, 200, 37, torch.float32),
        (3, 20, 130, 8, torch.float16),
        (17, 16, 256, 1, torch.float32),
    ):
        index, packed, codebook = problem(OUT, IN, bits, group_rows, torch.float32)
        table, scale = fp8_linear.round_codebook(codebook)
        x, bias = torch.randn(M, IN).to(dtype), torch.randn(OUT) if M != 3 else None
        arguments = [None if t is None else t.to(device) for t in (x, packed, table, scale, bias)]
        out = fp8_linear.fp8_linear(*arguments, bits, group_rows).cpu()
        assert out.dtype == dtype
        upcast = expected_of(x, index, table, scale, bits, group_rows, bias)
        # The scale of a row is a quotient in fp32: an element on a tie may round to its other neighbour.
        assert relative_rms(out, upcast) <= 2e-3, (M, OUT, IN)
        if M * OUT > 100:
            exact = linear64(x, weight64(index, codebook, group_rows), bias)
            assert relative_rms(out, exact) <= 0.06, (M, OUT, IN)


@pytest.mark.parametrize("splits", [1, 3, 1000])
def test_pieces_are_added_in_a_fixed_order(splits, device):
    index, packed, codebook = problem(20, 400, 4, 8, torch.float32)
    table, scale = fp8_linear.round_codebook(codebook)
    x, bias = torch.randn(4, 400), torch.randn(20)
    rows, row_scale = fp8_linear.quantize_rows(x.to(device), 4)
    arguments = (rows, row_scale, *(t.to(device) for t in (packed, table, scale, bias)), 400, 4, 8, Tile(16, 16, 4, 3, splits))
    outs = [fp8_linear.fused_fp8_linear(*arguments, torch.float32) for _ in range(2)]
    assert torch.equal(*outs)
    assert relative_rms(outs[0].cpu(), expected_of(x, index, table, scale, 4, 8, bias)) <= 2e-3


def test_rows_of_zeros_and_of_nan_and_empty_inputs(device):
    _, packed, codebook = problem(7, 40, 3, 7, torch.float32)
    table, scale = (t.to(device) for t in fp8_linear.round_codebook(codebook))
    x = torch.randn(5, 40)
    x[1], x[2, 3] = 0.0, torch.nan
    x[4] *= 1e-38  # what 448 is divided by
    out = fp8_linear.fp8_linear(x.to(device), packed.to(device), table, scale, None, 3, 7).cpu()
    assert not out[[1, 4]].any()
    assert out[2].isnan().all()
    assert out[[0, 3]].isfinite().all()
    for shape in ((0, 40), (2, 0, 40), (40,), (2, 3, 40)):
        got = fp8_linear.fp8_linear(torch.randn(shape).to(device), packed.to(device), table, scale, None, 3, 7)
        assert got.shape == (*shape[:-1], 7)


def test_plans_take_every_size():
    for capability in ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        tiles = [fp8_linear.plan_for(M, capability) for M in (1, 16, 17, 64, 65, 100_000)]
        assert tiles[0] == tiles[1] != tiles[2] == tiles[3] != tiles[4] == tiles[5]


def test_a_device_without_e4m3_is_refused_in_a_sentence(monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True

    _, packed, codebook = problem(4, 40, 4, 4, torch.float32)
    table, scale = fp8_linear.round_codebook(codebook)
    monkeypatch.setattr(fp8_linear, "capability", lambda _: (8, 6))
    x = torch.randn(2, 40).as_subclass(OnCuda)
    with pytest.raises(ValueError, match=r'compute: "fp8" needs compute capability 8\.9 or newer, and .* has 8\.6'):
        fp8_linear.fp8_linear(x, packed, table, scale, None, 4, 4)
