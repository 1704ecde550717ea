"""fp8_linear: the linear layer on 8-bit tensor cores, with a codebook and activations rounded to E4M3.

    codebook  rounded once, one scale for all of it: K bytes a codebook
    input     rounded at each call, a scale for each row, columns in the order in which weights come out of their decoder
    product   E4M3 x E4M3, sums in fp32, times the scale of the row and that of the codebook

Tensor cores take E4M3 at twice the rate of fp16, and a weight is decoded to one byte (fp8_decode.py): less to decode, half the
way to the tensor core, half the registers. So one kernel serves every M, where fp16 decodes first and leaves large M to cuBLAS.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK
from .codebook_linear import Tile, capability, launching, pieces_for, store_transposed, sum_pieces
from .decode import NATIVE
from .dequantize import aligned, on_device
from .fp8_decode import column_of, half_block8, has_lookup8, load_planes8, load_table8

LARGEST = 448.0  # of E4M3
NEEDED = (8, 9)  # compute capability: the first whose tensor cores take E4M3
CANDIDATES = 64  # scales that are tried for a codebook, an octave
# Hopper's tensor cores keep 14 bits of a sum of E4M3 products. Each half of a block is added up there, and then in fp32.
TENSOR_SUM = tl.constexpr(64)

# As PLANS in codebook_linear.py. Half the bytes of fp16 stand for a tile of input, and the largest M has no limit.
_ANY = 1 << 40
PLANS: dict[tuple[int, int], dict[int, Tile]] = {
    (8, 9): {16: Tile(64, 16, 4, 4, 2), 64: Tile(64, 64, 4, 3, 1), _ANY: Tile(128, 128, 8, 2, 1)},
    (9, 0): {16: Tile(64, 16, 4, 5, 2), 64: Tile(64, 64, 4, 4, 1), _ANY: Tile(128, 128, 8, 3, 1)},
    (10, 0): {16: Tile(64, 16, 4, 6, 3), 64: Tile(64, 64, 4, 4, 2), _ANY: Tile(128, 128, 8, 3, 1)},
    (12, 0): {16: Tile(64, 16, 4, 4, 2), 64: Tile(64, 64, 4, 3, 1), _ANY: Tile(128, 128, 8, 2, 1)},
}


@triton.jit
def e4m3_bytes(x):
    """The bytes, int8, of x (fp32) rounded to E4M3, nearest even; beyond 448 becomes 448, NaN stays."""
    if NATIVE:  # not by a cast, which on sm_89 cuts to fp16 first, so that 400.2 becomes 384 instead of 416
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:  # the interpreter rounds 127.5 to 64
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        steps = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # multiples of 2**-9, below the normal numbers
        code = tl.where(size < 0.015625, steps, normal)
        code = tl.where(x != x, 0x7F, code)
        return tl.where(x < 0, code | 0x80, code).to(tl.int8)


@triton.jit
def e4m3_values(bytes, DTYPE: tl.constexpr):
    """E4M3 from its bytes, int8; in the interpreter, which has no arithmetic for it, as fp32."""
    if NATIVE:
        return bytes.to(tl.float8e4nv, bitcast=True)
    else:  # the interpreter takes NaN for 480
        value = bytes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
        return tl.where((bytes & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def quantize_rows_kernel(input, out, scale, IN, stride, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Row r of input (M, IN) as E4M3 bytes, in whole blocks of 128 columns in the decoder's order; scale[r] = largest / 448.

    A row with nothing from 1e-30 up becomes zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    input += row * IN
    out += row * stride
    place = tl.arange(0, BLOCKS * 128)
    most = tl.zeros((BLOCKS * 128,), tl.float32)
    for start in range(0, IN, BLOCKS * 128):
        x = tl.load(input + start + place, mask=start + place < IN, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.reduce(most, 0, _larger)
    largest = tl.where(largest < 1e-30, 448.0, largest)  # a row of zeros, or next to them: 448 / largest would be Inf
    per_scale = 448.0 / largest
    tl.store(scale + row, largest / 448.0)
    column = place // 128 * 128 + column_of(place % 128, BITS)
    for start in range(0, stride, BLOCKS * 128):
        x = tl.load(input + start + column, mask=start + column < IN, other=0.0).to(tl.float32) * per_scale
        tl.store(out + start + place, e4m3_bytes(x), mask=start + place < stride)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fp8_linear_kernel(
    input, packed, table, input_scale, table_scale, bias, out, M, OUT, IN, stride, blocks_per_piece, group_rows,
    BITS: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    INPUT_ROWS: tl.constexpr, DTYPE: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """out (M, OUT) = scaled input (M, stride) @ weight.T + bias, or piece p of it in fp32 to out (pieces, M, OUT).

    table: words of four entries, max(K / 4, 1) a codebook. DTYPE: what stands for E4M3 in the interpreter.
    """
    n = tl.program_id(0) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    m = tl.program_id(1) * INPUT_ROWS + tl.arange(0, INPUT_ROWS)
    piece = tl.program_id(2).to(tl.int64)
    row = tl.minimum(n, OUT - 1).to(tl.int64)
    blocks = tl.cdiv(IN, 128)
    WORDS: tl.constexpr = 2**BITS // 4 if BITS > 2 else 1
    book = table if SHARED else table + (row // group_rows * WORDS)[:, None]
    words = load_table8(book, BITS, LOOKUP)
    k = tl.arange(0, 64)
    block_ptr = packed + row[:, None] * (blocks * (16 * BITS))
    input_ptr = input + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride + k[:, None]
    first = piece * blocks_per_piece
    last = tl.minimum(first + blocks_per_piece, blocks).to(tl.int32)
    acc = tl.zeros((WEIGHT_ROWS, INPUT_ROWS), tl.float32)
    # Columns past the end are index 0 in the weight and 0 in the input: they do not count.
    for block in range(first.to(tl.int32), last):
        planes = load_planes8(block_ptr + block * (16 * BITS), BITS)
        for half in tl.static_range(2):
            weight = e4m3_values(half_block8(planes, words, half, BITS, LOOKUP), DTYPE)
            x = e4m3_values(tl.load(input_ptr + (block * 128 + half * 64)), DTYPE)
            acc = tl.dot(weight, x, acc, max_num_imprecise_acc=TENSOR_SUM)
    factor = tl.load(input_scale + m, mask=m < M, other=0.0) * tl.load(table_scale)
    store_transposed(acc * factor[None, :], out, bias, n, m, OUT, M, piece, HAS_BIAS, PARTIAL)


def round_codebook(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """codebook (G, K) -> table (G, max(K, 4)) uint8, its entries in E4M3, and their scale (1,) fp32: codebook ~ scale * table.

    Of 64 scales in the octave below largest / 224, the one with the least squared error over all entries. Nothing is asked of the
    host. A codebook with NaN or Inf gives NaN.
    """
    wide = codebook.float()
    largest = wide.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) if wide.numel() else wide.new_ones(())
    steps = torch.arange(CANDIDATES, device=wide.device, dtype=torch.float32) / CANDIDATES
    scales = largest / LARGEST * torch.exp2(steps)
    rounded = (wide / scales[:, None, None]).to(torch.float8_e4m3fn).float() * scales[:, None, None]
    scale = scales.index_select(0, (rounded - wide).square().sum((1, 2)).argmin(0, keepdim=True))
    table = (wide / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.nn.functional.pad(table, (0, max(4 - table.shape[1], 0))).contiguous(), scale


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (M, IN) contiguous -> E4M3 bytes (M, IN up to whole blocks of 128) in the decoder's order for `bits`, and scales (M,)."""
    M, IN = x.shape
    out = torch.empty(M, triton.cdiv(IN, BLOCK) * BLOCK, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if out.numel():
        with on_device(x):
            quantize_rows_kernel[(M,)](
                x, out, scale, IN, out.shape[1], BITS=bits, BLOCKS=min(8, triton.next_power_of_2(out.shape[1] // BLOCK))
            )
    return out, scale


def plan_for(M: int, device: tuple[int, int]) -> Tile:
    """The tile for M rows of input on this compute capability."""
    tiles = PLANS[max((known for known in PLANS if known <= device), default=min(PLANS))]
    return next(tile for limit, tile in tiles.items() if limit >= M)


def fused_fp8_linear(
    x: Tensor, scale: Tensor, packed: Tensor, table: Tensor, table_scale: Tensor, bias: Tensor | None, cols: int, bits: int,
    group_rows: int, tile: Tile, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x, scale as `quantize_rows` gives them -> (M, OUT) in `dtype`, by the fused kernel with this tile."""
    M, OUT = x.shape[0], packed.shape[0]
    grid = triton.cdiv(OUT, tile.weight_rows), triton.cdiv(M, tile.input_rows)
    pieces, blocks_per_piece = pieces_for(tile, grid[0] * grid[1], triton.cdiv(cols, BLOCK), x.device)
    out = torch.empty(M, OUT, device=x.device, dtype=dtype)
    to = out if pieces == 1 else torch.empty(pieces, M, OUT, device=x.device, dtype=torch.float32)
    fp8_linear_kernel[(*grid, pieces)](
        x, packed, table.view(torch.int32), scale, table_scale, bias, to, M, OUT, cols, x.shape[1], blocks_per_piece, group_rows,
        BITS=bits, SHARED=table.shape[0] == 1, HAS_BIAS=bias is not None, PARTIAL=pieces > 1, WEIGHT_ROWS=tile.weight_rows,
        INPUT_ROWS=tile.input_rows, DTYPE=tl.float32, LOOKUP=bool(has_lookup8(bits)),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
    )  # fmt: skip
    if pieces > 1:
        sum_pieces(to, bias, out)
    return out


def expect_fp8(device: torch.device) -> None:
    """Raises ValueError where the tensor cores of a CUDA device do not take E4M3."""
    if (have := capability(device)) < NEEDED:
        needed = ".".join(map(str, NEEDED))
        raise ValueError(f'compute: "fp8" needs compute capability {needed} or newer, and {device} has {have[0]}.{have[1]}')


def fp8_linear(
    input: Tensor, packed: Tensor, table: Tensor, table_scale: Tensor, bias: Tensor | None, bits: int, group_rows: int
) -> Tensor:
    """input (..., IN) @ weight.T + bias -> (..., OUT) in the input's dtype, for inference; table, table_scale: `round_codebook`.

    Raises ValueError on a device before compute capability 8.9, whose tensor cores do not take E4M3. A row of input with NaN or
    Inf gives a row of NaN.
    """
    *batch, IN = input.shape
    M, OUT = math.prod(batch), packed.shape[0]
    if M == 0 or OUT == 0:
        return input.new_empty(*batch, OUT)
    if input.is_cuda:
        expect_fp8(input.device)
    x = input.reshape(M, IN).contiguous()
    with launching(x):
        rows, scale = quantize_rows(x, bits)
        tile = plan_for(M, capability(x.device))
        bias = None if bias is None else bias.contiguous()
        out = fused_fp8_linear(rows, scale, aligned(packed), table, table_scale, bias, IN, bits, group_rows, tile, x.dtype)
    return out.view(*batch, OUT)
