"""codebook_linear and codebook_linear_input_grad: GEMMs that decode the packed weight on its way to the tensor cores.

Three regimes, chosen by M from `PLANS`:

    small M    bound by memory: narrow tiles, and the reduction cut into pieces (split-K) so that all multiprocessors have work.
               Each piece writes fp32 partial sums; a second kernel adds them in a fixed order, so results repeat bit for bit.
    middle M   the same kernel with wider tiles. It computes Y^T = W X^T: the weight is the left operand, which Hopper's tensor
               cores take from registers.
    large M    the weight is decoded once, and cuBLAS does the rest.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK
from .decode import half_block, has_lookup, load_planes, load_table
from .dequantize import aligned, decode_rows, interpreted_bf16, kernel_dtype, on_device

HALF = tl.constexpr(64)  # columns of half a block: what one tl.dot takes


class Tile(NamedTuple):
    """Tile (rows of the weight, rows of the input), and how a kernel with it is compiled. splits: thread blocks wanted for each
    multiprocessor, by cutting the reduction. registers: most of a thread. None leaves that to the compiler, which on Blackwell
    spills for the sake of thread blocks that shared memory, or the size of the grid, does not let run side by side."""

    weight_rows: int
    input_rows: int
    num_warps: int
    num_stages: int
    splits: int
    registers: int | None = None


# Compute capability (the newest that is not newer than the device) -> largest M of a tile. M above the last is for cuBLAS. From
# counted instructions and bytes, see results/linear_gpu_code.md; `make gpu` times both sides of every limit. (8, 6) and (12, 0)
# have 99 KB of shared memory for a thread block.
#
# (10, 0) has twice Hopper's bytes a clock for each multiprocessor, so more must be under way, and the same ALUs: a decoded weight
# takes as long as some 180 rows of product, where decoding it for two tiles of input costs more than decoding it once. Its
# products accumulate in tensor memory, so wide tiles leave registers, and the weight goes to the tensor core by shared memory.
# (12, 0) has a third of Hopper's bytes and an eighth of its products a clock, without wgmma: a decoded weight costs an eighth of
# its product with 128 rows, and what decoding first would write and read costs more. Two stages leave room for 8 bits.
_LITTLE_SHARED = {16: Tile(64, 16, 4, 3, 2), 32: Tile(64, 32, 4, 3, 2), 128: Tile(64, 64, 4, 2, 1)}
PLANS: dict[tuple[int, int], dict[int, Tile]] = {
    (8, 0): {16: Tile(64, 16, 4, 3, 2), 32: Tile(64, 32, 4, 4, 2), 64: Tile(64, 64, 4, 3, 1), 256: Tile(128, 128, 8, 3, 1)},
    (8, 6): _LITTLE_SHARED,
    (9, 0): {16: Tile(64, 16, 4, 5, 2), 32: Tile(64, 32, 4, 4, 2), 64: Tile(64, 64, 4, 4, 1), 512: Tile(128, 128, 8, 3, 1)},
    (10, 0): {
        16: Tile(64, 16, 4, 6, 3, 255),
        32: Tile(64, 32, 4, 5, 3, 255),
        64: Tile(64, 64, 4, 4, 2, 255),
        256: Tile(128, 128, 8, 3, 1, 255),
    },
    (12, 0): {16: Tile(64, 16, 4, 4, 2, 255), 32: Tile(64, 32, 4, 3, 2), 64: Tile(64, 64, 4, 3, 1), 512: Tile(128, 128, 8, 2, 1)},
}
# fp32 without TF32 runs on the ordinary ALUs, where a decoded weight must be reused little to be worth it.
PLAN_FP32 = {16: Tile(64, 16, 4, 3, 2)}
PLAN_INPUT_GRAD = {16: Tile(64, 16, 4, 3, 2), 64: Tile(64, 64, 4, 3, 1)}
PLAN_INPUT_GRAD_FP32 = {16: Tile(32, 16, 4, 3, 2)}  # more rows of the weight would spill


@triton.jit
def store_transposed(acc, out, bias, n, m, OUT, M, piece, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr):
    """Stores acc [n, m] transposed: as a partial sum of `piece` in fp32, or finished."""
    inside = (n[:, None] < OUT) & (m[None, :] < M)
    at = m.to(tl.int64)[None, :] * OUT + n[:, None]
    if PARTIAL:
        tl.store(out + piece * M * OUT + at, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    input, packed, codebook, bias, out, M, OUT, IN, stride, blocks_per_piece, group_rows,
    BITS: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, TAIL: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, INPUT_ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """out (M, OUT) = input (M, IN) @ weight.T + bias, or piece p of it in fp32 to out (pieces, M, OUT).

    stride: of the rows of input. SHARED: one codebook for all rows. TAIL: IN is no multiple of 128. DTYPE: of both operands.
    """
    n = tl.program_id(0) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    m = tl.program_id(1) * INPUT_ROWS + tl.arange(0, INPUT_ROWS)
    piece = tl.program_id(2).to(tl.int64)
    # Rows past the end repeat the last one; what they give is not stored.
    row = tl.minimum(n, OUT - 1).to(tl.int64)
    blocks = tl.cdiv(IN, 128)
    K: tl.constexpr = 2**BITS
    book = codebook if SHARED else codebook + (row // group_rows * K)[:, None]
    table = load_table(book, BITS, DTYPE, LOOKUP)
    k = tl.arange(0, HALF)
    block_ptr = packed + row[:, None] * (blocks * (16 * BITS))
    input_ptr = input + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride + k[:, None]
    first = piece * blocks_per_piece
    last = tl.minimum(first + blocks_per_piece, blocks).to(tl.int32)
    first = first.to(tl.int32)
    whole = last
    if TAIL:
        whole = tl.minimum(last, blocks - 1)
    acc = tl.zeros((WEIGHT_ROWS, INPUT_ROWS), tl.float32)
    for block in range(first, whole):
        planes = load_planes(block_ptr + block * (16 * BITS), BITS, LOOKUP)
        for half in tl.static_range(2):
            weight = half_block(planes, table, half, BITS, DTYPE, LOOKUP)
            x = tl.load(input_ptr + (block * 128 + half * HALF)).to(DTYPE)
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
    if TAIL:  # columns past the end are index 0 in the packed weight: whatever value that is, it must not count
        for block in range(whole, last):
            planes = load_planes(block_ptr + block * (16 * BITS), BITS, LOOKUP)
            for half in tl.static_range(2):
                start = block * 128 + half * HALF
                weight = half_block(planes, table, half, BITS, DTYPE, LOOKUP)
                weight = tl.where((start + k < IN)[None, :], weight, 0.0)
                x = tl.load(input_ptr + start, mask=(start + k < stride)[:, None], other=0.0).to(DTYPE)
                acc = tl.dot(weight, x, acc, input_precision=PRECISION)
    store_transposed(acc, out, bias, n, m, OUT, M, piece, HAS_BIAS, PARTIAL)


@triton.jit
def input_grad_kernel(
    grad, packed, codebook, out, M, OUT, IN, rows_per_piece, group_rows,
    BITS: tl.constexpr, SHARED: tl.constexpr, PARTIAL: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, INPUT_ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """out (M, IN) = grad (M, OUT) @ weight, a block of columns in each program, or piece p of it to out (pieces, M, IN)."""
    block = tl.program_id(0)
    m = tl.program_id(1) * INPUT_ROWS + tl.arange(0, INPUT_ROWS)
    piece = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(IN, 128)
    K: tl.constexpr = 2**BITS
    grad_ptr = grad + tl.minimum(m, M - 1).to(tl.int64)[:, None] * OUT
    block_ptr = packed + block.to(tl.int64) * (16 * BITS)
    first = (piece * rows_per_piece).to(tl.int32)
    last = tl.minimum(first + rows_per_piece, OUT).to(tl.int32)
    low = tl.zeros((INPUT_ROWS, HALF), tl.float32)
    high = tl.zeros((INPUT_ROWS, HALF), tl.float32)
    if SHARED:
        table = load_table(codebook, BITS, DTYPE, LOOKUP)
    for start in range(first, last, WEIGHT_ROWS):
        n = start + tl.arange(0, WEIGHT_ROWS)
        row = tl.minimum(n, OUT - 1).to(tl.int64)
        if not SHARED:
            table = load_table(codebook + (row // group_rows * K)[:, None], BITS, DTYPE, LOOKUP)
        planes = load_planes(block_ptr + row[:, None] * (blocks * (16 * BITS)), BITS, LOOKUP)
        # Rows past the end repeat the last one: neither operand may count there, for 0 * Inf is NaN.
        g = tl.load(grad_ptr + n[None, :], mask=(n < last)[None, :], other=0.0).to(DTYPE)
        weight = tl.where((n < last)[:, None], half_block(planes, table, 0, BITS, DTYPE, LOOKUP), 0.0)
        low = tl.dot(g, weight, low, input_precision=PRECISION)
        weight = tl.where((n < last)[:, None], half_block(planes, table, 1, BITS, DTYPE, LOOKUP), 0.0)
        high = tl.dot(g, weight, high, input_precision=PRECISION)
    at = m.to(tl.int64)[:, None] * IN + block * 128 + tl.arange(0, HALF)[None, :]
    if PARTIAL:
        at += piece * M * IN
    column = block * 128 + tl.arange(0, HALF)[None, :]
    inside = m[:, None] < M
    tl.store(out + at, low.to(out.dtype.element_ty), mask=inside & (column < IN))
    tl.store(out + at + HALF, high.to(out.dtype.element_ty), mask=inside & (column + HALF < IN))


@triton.jit
def sum_pieces_kernel(partial, bias, out, numel, OUT, pieces, HAS_BIAS: tl.constexpr, TILE: tl.constexpr):
    """out[i] = sum over pieces of partial[piece, i], first to last, plus bias[i % OUT]."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < numel
    total = tl.zeros((TILE,), tl.float32)
    piece_ptr = partial + at
    for _ in range(pieces):
        total += tl.load(piece_ptr, mask=inside, other=0.0)
        piece_ptr += numel
    if HAS_BIAS:
        total += tl.load(bias + at % OUT, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def plan_for(M: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile | None:
    """The tile of the fused kernel for M rows of input on this compute capability; None where decoding first is better."""
    tiles = PLANS[max((known for known in PLANS if known <= capability), default=min(PLANS))]
    if dtype == torch.float32:  # twice the bytes: the widest tiles do not fit
        tiles = {limit: tile for limit, tile in tiles.items() if limit <= 32} if _tf32() else PLAN_FP32
    return next((tile for limit, tile in tiles.items() if limit >= M), None)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; of a CPU, where the interpreter runs the kernels, the oldest that has a plan."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else min(PLANS)


def _tf32() -> bool:
    """Whether torch lets fp32 products of matrices use TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def pieces_for(tile: Tile, tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """(pieces, steps of each): cuts `steps` steps of the reduction so that `tiles` tiles occupy the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(max(tile.splits * processors // max(tiles, 1), 1), max(steps, 1))
    each = max(triton.cdiv(steps, wanted), 1)
    return max(triton.cdiv(steps, each), 1), each


@contextlib.contextmanager
def launching(tensor: Tensor) -> Iterator[None]:
    """On the tensor's device, with autocast off: dtypes have been decided."""
    with on_device(tensor), torch.autocast(tensor.device.type, enabled=False):
        yield


def sum_pieces(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    tile = 1024
    sum_pieces_kernel[(triton.cdiv(out.numel(), tile),)](
        partial, bias, out, out.numel(), out.shape[1], partial.shape[0], HAS_BIAS=bias is not None, TILE=tile
    )


def fused_linear(
    x: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int, tile: Tile, lookup: bool | None = None
) -> Tensor:
    """x (M, IN) contiguous -> (M, OUT) by the fused kernel with this tile; lookup: the decoder, by default the faster one."""
    M, IN = x.shape
    OUT, blocks = packed.shape[0], triton.cdiv(IN, BLOCK)
    bits = codebook.shape[1].bit_length() - 1
    grid = triton.cdiv(OUT, tile.weight_rows), triton.cdiv(M, tile.input_rows)
    pieces, blocks_per_piece = pieces_for(tile, grid[0] * grid[1], blocks, x.device)
    dtype = kernel_dtype(x.dtype)
    if lookup is None:
        lookup = has_lookup(bits, dtype)
    if IN % 16:  # rows that do not begin at multiples of 16 bytes would be loaded one element at a time
        x = F.pad(x, (0, -IN % 16))
    out = x.new_empty(M, OUT)
    to = out if pieces == 1 else torch.empty(pieces, M, OUT, device=x.device, dtype=torch.float32)
    linear_kernel[(*grid, pieces)](
        x, packed, codebook, bias, to, M, OUT, IN, x.shape[1], blocks_per_piece, group_rows,
        BITS=bits, SHARED=codebook.shape[0] == 1, HAS_BIAS=bias is not None, PARTIAL=pieces > 1, TAIL=IN % BLOCK != 0,
        WEIGHT_ROWS=tile.weight_rows, INPUT_ROWS=tile.input_rows, DTYPE=dtype, PRECISION="tf32" if _tf32() else "ieee",
        LOOKUP=lookup, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
    )  # fmt: skip
    if pieces > 1:
        sum_pieces(to, bias, out)
    return out


def codebook_linear(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> Tensor:
    """input (..., IN) @ weight.T + bias -> (..., OUT); see `kmq_kernels.ops.codebook_linear`.

    A codebook wider than the input is rounded to the input's dtype, as torch.autocast rounds a weight. Sums are in fp32.
    """
    *batch, IN = input.shape
    M, OUT = math.prod(batch), packed.shape[0]
    if M == 0 or OUT == 0:
        return input.new_empty(*batch, OUT)
    if interpreted_bf16(input):
        return codebook_linear(input.float(), packed, codebook, bias, group_rows).to(input.dtype)
    x = input.reshape(M, IN).contiguous()
    packed, codebook = aligned(packed), codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    with launching(x):
        tile = plan_for(M, x.dtype, capability(x.device))
        if tile is not None:
            return fused_linear(x, packed, codebook, bias, group_rows, tile).view(*batch, OUT)
        weight = decode_rows(None, packed, codebook, IN, group_rows, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).view(*batch, OUT)


def fused_input_grad(
    grad: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, tile: Tile, lookup: bool | None = None
) -> Tensor:
    """grad (M, OUT) contiguous -> (M, cols) by the fused kernel with this tile."""
    M, OUT = grad.shape
    bits = codebook.shape[1].bit_length() - 1
    grid = triton.cdiv(cols, BLOCK), triton.cdiv(M, tile.input_rows)
    pieces, steps = pieces_for(tile, grid[0] * grid[1], triton.cdiv(OUT, tile.weight_rows), grad.device)
    dtype = kernel_dtype(grad.dtype)
    if lookup is None:
        lookup = has_lookup(bits, dtype)
    out = grad.new_empty(M, cols)
    to = out if pieces == 1 else torch.empty(pieces, M, cols, device=grad.device, dtype=torch.float32)
    input_grad_kernel[(*grid, pieces)](
        grad, packed, codebook, to, M, OUT, cols, steps * tile.weight_rows, group_rows,
        BITS=bits, SHARED=codebook.shape[0] == 1, PARTIAL=pieces > 1, WEIGHT_ROWS=tile.weight_rows, INPUT_ROWS=tile.input_rows,
        DTYPE=dtype, PRECISION="tf32" if _tf32() else "ieee", LOOKUP=lookup, num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )  # fmt: skip
    if pieces > 1:
        sum_pieces(to, None, out)
    return out


def codebook_linear_input_grad(grad_output: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    """grad_output (..., OUT) @ weight -> (..., IN). Training has a large M: only a small one is worth the fused kernel."""
    *batch, OUT = grad_output.shape
    M = math.prod(batch)
    if M == 0 or cols == 0:
        return grad_output.new_empty(*batch, cols)
    if interpreted_bf16(grad_output):
        return codebook_linear_input_grad(grad_output.float(), packed, codebook, cols, group_rows).to(grad_output.dtype)
    grad = grad_output.reshape(M, OUT).contiguous()
    packed, codebook = aligned(packed), codebook.contiguous()
    with launching(grad):
        plan = PLAN_INPUT_GRAD_FP32 if grad.dtype == torch.float32 else PLAN_INPUT_GRAD
        tile = next((tile for limit, tile in plan.items() if limit >= M), None)
        if tile is not None:
            return fused_input_grad(grad, packed, codebook, cols, group_rows, tile).view(*batch, cols)
        return (grad @ decode_rows(None, packed, codebook, cols, group_rows, grad.dtype)).view(*batch, cols)
