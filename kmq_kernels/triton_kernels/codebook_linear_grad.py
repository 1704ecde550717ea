"""codebook_linear_grad: a GEMM whose epilogue reduces each tile of the weight gradient into the codebook.

A program computes one tile of grad_output.T @ input over one piece of the batch, in registers, and sums it by index: into (K,)
where one codebook serves all rows, else into (rows of the tile, K). These partial sums are all that it writes. They are linear in
the weight gradient, so pieces of the batch need not be put together first. A sum of fixed order adds them up.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .decode import NATIVE, index, load_planes
from .dequantize import aligned, on_device


class Tile(NamedTuple):
    """Tile of the weight gradient (rows, columns), step along the batch, and how a kernel with it is compiled."""

    rows: int
    cols: int
    step: int
    num_warps: int
    num_stages: int


TILE = Tile(128, 128, 64, 8, 3)
TILE_GROUPED = Tile(64, 64, 64, 4, 3)  # sums of rows need more registers
TILE_SMALL = Tile(64, 64, 32, 8, 3)  # fp32, and matrices whose rows are loaded element by element
PIECE = 512  # rows of the batch that a piece has at least: an epilogue must be worth its tile


@triton.jit
def index_tile(block, first, FIELDS: tl.constexpr, BITS: tl.constexpr):
    """Indices [R, 16 * FIELDS], int32, of the fields from `first` on; block: [R, 1] pointers to a packed block of each row."""
    fields = index(load_planes(block, BITS, False), first + tl.arange(0, FIELDS)[:, None, None], BITS)
    return tl.reshape(tl.permute(fields, (1, 0, 2)), (block.shape[0], 16 * FIELDS))


@triton.jit
def linear_grad_kernel(
    grad, input, packed, partial, M, OUT, IN, rows_per_piece,
    BITS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (pieces, column tiles, row tiles, K) with SHARED, else (pieces, column tiles, OUT, K)"""
    tile_out = tl.program_id(0)
    tile_in = tl.program_id(1)
    piece = tl.program_id(2).to(tl.int64)
    K: tl.constexpr = 2**BITS
    n = tile_out * ROWS + tl.arange(0, ROWS)
    c = tile_in * COLS + tl.arange(0, COLS)
    first = piece * rows_per_piece
    last = tl.minimum(first + rows_per_piece, M)
    steps = tl.cdiv(last - first, STEP).to(tl.int32)
    m = first + tl.arange(0, STEP)
    grad_ptr = grad + m[:, None] * OUT + n[None, :]
    input_ptr = input + m[:, None] * IN + c[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(steps):
        # Outside of the matrix both operands are zero: an element there then has gradient 0, and its index does not matter.
        g = tl.load(grad_ptr, mask=(m < last)[:, None] & (n < OUT)[None, :], other=0.0)
        x = tl.load(input_ptr, mask=(m < last)[:, None] & (c < IN)[None, :], other=0.0)
        if WIDEN:  # Triton's interpreter computes bf16 wrongly
            g = g.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        m += STEP
        grad_ptr += STEP * OUT
        input_ptr += STEP * IN
    # Elements past the end are 0 * value, which is NaN where the value is: they must not count.
    acc = tl.where((n < OUT)[:, None] & (c < IN)[None, :], acc, 0.0)
    # A tile lies in one block of a packed row, and a block is whole even where the row ends within.
    block = tl.minimum(n, OUT - 1).to(tl.int64) * tl.cdiv(IN, 128) + tile_in * COLS // 128
    members = index_tile(packed + block[:, None] * (16 * BITS), tile_in * COLS % 128 // 16, COLS // 16, BITS).to(tl.uint8)
    if NATIVE:
        # Brings the indices to the layout of acc, once. The compiler would carry each comparison there.
        members = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r,r", [members, acc], tl.uint8, is_pure=True, pack=4)
    tiles_in = tl.num_programs(1)
    if SHARED:
        to = partial + ((piece * tiles_in + tile_in) * tl.num_programs(0) + tile_out) * K
        for k in range(K):
            tl.store(to + k, tl.sum(tl.where(members == k, acc, 0.0)))
    else:
        to = partial + ((piece * tiles_in + tile_in) * OUT + n) * K
        for k in range(K):
            tl.store(to + k, tl.sum(tl.where(members == k, acc, 0.0), 1), mask=n < OUT)


def _pieces(M: int, tiles: int, device: torch.device) -> int:
    """Into how many pieces to cut the batch so that `tiles` tiles occupy the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(min(triton.cdiv(processors, tiles), M // PIECE), 1)


def fused_linear_grad(
    grad: Tensor, x: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int, tile: Tile, pieces: int
) -> Tensor:
    """grad (M, OUT) and x (M, IN), contiguous and of one dtype -> (G, K) fp32, by the fused kernel with this tile."""
    M, OUT = grad.shape
    IN, shared = x.shape[1], num_codebooks == 1
    tiles_out, tiles_in = triton.cdiv(OUT, tile.rows), triton.cdiv(IN, tile.cols)
    rows_per_piece = triton.cdiv(triton.cdiv(M, pieces), tile.step) * tile.step
    pieces = triton.cdiv(M, rows_per_piece)
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows = tiles_out if shared else OUT
    partial = torch.empty(pieces * tiles_in, rows, num_centroids, device=grad.device, dtype=torch.float32)
    linear_grad_kernel[(tiles_out, tiles_in, pieces)](
        grad, x, packed, partial, M, OUT, IN, rows_per_piece,
        BITS=num_centroids.bit_length() - 1, SHARED=shared, ROWS=tile.rows, COLS=tile.cols, STEP=tile.step,
        WIDEN=not grad.is_cuda, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if shared:
        return partial.sum((0, 1), dtype=torch.float64).float()[None]
    sums = F.pad(partial.sum(0, dtype=torch.float64), (0, 0, 0, num_codebooks * group_rows - OUT))
    return sums.view(num_codebooks, group_rows, num_centroids).sum(1).float()


def codebook_linear_grad(
    grad_output: Tensor, input: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int
) -> Tensor:
    """codebook_grad of grad_output.T @ input, which is never stored; see `kmq_kernels.reference.codebook_linear_grad`.

    Accumulated in fp32; bitwise the same on every run.
    """
    dtype = torch.promote_types(grad_output.dtype, input.dtype)
    grad = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype).contiguous()
    x = input.reshape(-1, input.shape[-1]).to(dtype).contiguous()
    if grad.numel() == 0 or x.numel() == 0:
        return torch.zeros(num_codebooks, num_centroids, device=input.device)
    small = dtype == torch.float32 or grad.shape[1] % 16 != 0 or x.shape[1] % 16 != 0
    tile = TILE_SMALL if small else TILE if num_codebooks == 1 else TILE_GROUPED
    tiles = triton.cdiv(grad.shape[1], tile.rows) * triton.cdiv(x.shape[1], tile.cols)
    pieces = _pieces(grad.shape[0], tiles, x.device)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        return fused_linear_grad(grad, x, aligned(packed), num_codebooks, num_centroids, group_rows, tile, pieces)
