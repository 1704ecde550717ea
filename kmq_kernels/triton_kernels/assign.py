"""Nearest centroids: a descent through the tree of midpoints, written as bytes or as packed bits.

The pivots of a problem lie in the order of a heap: node h has its children at 2h and 2h + 1, the root is node 1, and the K
leaves are the centroids. So each level is a run of neighbouring words, and the upper three levels sit in registers.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK, row_bytes
from . import worklist
from .dequantize import on_device
from .worklist import ALIGNED, COLS, COUNT, OUT, VALUES, WEIGHT, address, number

TILE = 4096  # values that one program labels
BLOCKS = TILE // BLOCK


@triton.jit
def _below(node, pivot, x):
    """The child of a node of the heap: 2 * node, plus the sign bit of pivot - x, which is 1 where x > pivot.

    The difference has the right sign for every x but NaN; a pivot that is NaN sends all to the left. Shift and sign are one
    funnel shift of (node, difference).
    """
    return (node << 1) | ((pivot - x).to(tl.uint32, bitcast=True) >> 31)


@triton.jit
def nearest(x, pivots_ptr, LEVELS: tl.constexpr):
    """The index of the nearest centroid of each x (fp32): bit by bit from the top, x > pivot of the node."""
    p1 = tl.load(pivots_ptr + 1)
    if LEVELS == 1:
        return (x > p1).to(tl.int32)
    else:
        right = x > p1
        node = tl.where(right, 3, 2).to(tl.uint32)
        pivot = tl.where(right, tl.load(pivots_ptr + 3), tl.load(pivots_ptr + 2))
        lower = x > pivot
        node = (node << 1) | lower.to(tl.uint32)
        if LEVELS >= 3:
            left = tl.where(right, tl.load(pivots_ptr + 6), tl.load(pivots_ptr + 4))
            pivot = tl.where(lower, tl.where(right, tl.load(pivots_ptr + 7), tl.load(pivots_ptr + 5)), left)
            node = _below(node, pivot, x)
            for _ in tl.static_range(3, LEVELS):
                node = _below(node, tl.load(pivots_ptr + node), x)
        return node.to(tl.int32) - (1 << LEVELS)


@triton.jit
def label_flat(
    table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, ERROR: tl.constexpr, WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile as bytes; returns its weighted squared error. WHOLE: all of the tile lies inside, at 16-byte addresses."""
    values_ptr = address(table_ptr, problem, VALUES, DTYPE, WHOLE)
    out_ptr = address(table_ptr, problem, OUT, tl.uint8, WHOLE)
    weight_ptr = address(table_ptr, problem, WEIGHT, tl.float32, WHOLE)
    count = number(table_ptr, problem, COUNT)
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    if WHOLE:
        inside = tl.full((TILE,), True, tl.int1)
        x = tl.load(values_ptr + at, eviction_policy="evict_first").to(tl.float32)
    else:
        inside = at < count
        x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = nearest(x, pivots_ptr, LEVELS)
    if WHOLE:
        tl.store(out_ptr + at, k.to(tl.uint8))
    else:
        tl.store(out_ptr + at, k.to(tl.uint8), mask=inside)
    error = tl.zeros((1,), tl.float64)
    if ERROR:
        off = (x - tl.load(centroids_ptr + k)) * per_unit
        square = off * off
        if WEIGHTED:
            if WHOLE:
                square *= tl.load(weight_ptr + at, eviction_policy="evict_first")
            else:
                square *= tl.load(weight_ptr + at, mask=inside, other=0.0)
        error += tl.sum(tl.where(inside, square, 0.0), 0).to(tl.float64)
    return error


@triton.jit
def label_packed(
    table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, BLOCKS: tl.constexpr, ERROR: tl.constexpr, WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of 128 columns as packed bits (the layout is drawn in packing.py); returns their weighted squared error.

    Field j of all 16 lanes is 16 neighbouring columns, so a lane's integer is put together in one register.
    """
    values_ptr = address(table_ptr, problem, VALUES, DTYPE, WHOLE)
    out_ptr = address(table_ptr, problem, OUT, tl.uint8, WHOLE)
    weight_ptr = address(table_ptr, problem, WEIGHT, tl.float32, WHOLE)
    count, cols = number(table_ptr, problem, COUNT), number(table_ptr, problem, COLS)
    block = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 16)
    in_row = (cols + 127) // 128
    if WHOLE:
        start, left = block * 128, tl.full((BLOCKS,), 128, tl.int64)
        exists = block >= 0
    else:
        row = block // in_row
        start, left = row * cols + block % in_row * 128, cols - block % in_row * 128
        exists = row * cols < count
    low = tl.zeros((BLOCKS, 16), tl.int32)  # the 4-bit plane, then the 2-bit and the 1-bit plane
    high = tl.zeros((BLOCKS, 16), tl.int32)
    two = tl.zeros((BLOCKS, 16), tl.int32)
    one = tl.zeros((BLOCKS, 16), tl.int32)
    errors = tl.zeros((BLOCKS, 16), tl.float32)
    for j in tl.static_range(8):
        at = start[:, None] + (16 * j + lane)[None, :]
        if WHOLE:
            inside = exists[:, None] & (lane >= 0)[None, :]
            x = tl.load(values_ptr + at, eviction_policy="evict_first").to(tl.float32)
        else:
            inside = exists[:, None] & ((16 * j + lane)[None, :] < left[:, None])
            x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        k = nearest(x, pivots_ptr, LEVELS)
        if ERROR:
            off = (x - tl.load(centroids_ptr + k)) * per_unit
            square = off * off
            if WEIGHTED:
                if WHOLE:
                    square *= tl.load(weight_ptr + at, eviction_policy="evict_first")
                else:
                    square *= tl.load(weight_ptr + at, mask=inside, other=0.0)
            if WHOLE:
                errors += square
            else:
                errors += tl.where(inside, square, 0.0)
        if not WHOLE:
            k = tl.where(inside, k, 0)
        if LEVELS >= 4:
            low |= (k & 15) << (4 * j)
        if LEVELS == 8:
            high |= (k >> 4) << (4 * j)
        if (LEVELS & 2) != 0:
            two |= ((k >> (LEVELS & 4)) & 3) << (2 * j)
        if (LEVELS & 1) != 0:
            one |= (k >> (LEVELS - 1)) << j
    to = out_ptr + (block * (16 * LEVELS))[:, None]
    stored = exists[:, None] & (lane >= 0)[None, :]
    if LEVELS >= 4:
        words = to.to(tl.pointer_type(tl.int32)) + lane[None, :]
        if WHOLE:
            tl.store(words, low)
        else:
            tl.store(words, low, mask=stored)
        if LEVELS == 8:
            if WHOLE:
                tl.store(words + 16, high)
            else:
                tl.store(words + 16, high, mask=stored)
    if (LEVELS & 2) != 0:
        halves = (to + 16 * (LEVELS & 4)).to(tl.pointer_type(tl.int16)) + lane[None, :]
        tl.store(halves, two.to(tl.int16), mask=stored)
    if (LEVELS & 1) != 0:
        tl.store(to + 16 * (LEVELS - 1) + lane[None, :], one.to(tl.uint8), mask=stored)
    return tl.zeros((1,), tl.float64) + tl.sum(tl.sum(errors, 1).to(tl.float64), 0)


@triton.jit
def assign_kernel(
    table_ptr, problem_ptr, tile_ptr, pivots_ptr, centroids_ptr, unit_ptr, error_ptr, K,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr, ERROR: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Labels one tile of one problem.

    pivots (P, 2**LEVELS) fp32. With ERROR: centroids (P, K) fp32, unit (P,) fp32, error (T,) fp64 <- squared error of the
    tile, where the errors are taken times unit.
    """
    i = tl.program_id(0).to(tl.int64)
    problem, tile = tl.load(problem_ptr + i).to(tl.int64), tl.load(tile_ptr + i)
    pivots_ptr += problem * (1 << LEVELS)
    per_unit = 1.0
    if ERROR:
        per_unit = tl.load(unit_ptr + problem)
        centroids_ptr += problem * K
    count = number(table_ptr, problem, COUNT)
    aligned = (number(table_ptr, problem, ALIGNED) != 0) & ((tile + 1).to(tl.int64) * TILE <= count)
    if PACKED:
        aligned = aligned & (number(table_ptr, problem, COLS) % 128 == 0)
        if aligned:
            error = label_packed(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
                DTYPE, LEVELS, TILE // 128, ERROR, WEIGHTED, True,
            )  # fmt: skip
        else:
            error = label_packed(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
                DTYPE, LEVELS, TILE // 128, ERROR, WEIGHTED, False,
            )  # fmt: skip
    else:
        if aligned:
            error = label_flat(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
                DTYPE, LEVELS, TILE, ERROR, WEIGHTED, True,
            )  # fmt: skip
        else:
            error = label_flat(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit,
                DTYPE, LEVELS, TILE, ERROR, WEIGHTED, False,
            )  # fmt: skip
    if ERROR:
        tl.store(error_ptr + i + tl.arange(0, 1), error)


def levels_of(num_centroids: int) -> int:
    return max(1, (num_centroids - 1).bit_length())


@cache
def _heap_order(num_centroids: int, device: torch.device) -> Tensor:
    """For each node of the heap, the midpoint in it; K - 1 (NaN) where there is none."""
    levels = levels_of(num_centroids)
    order = [num_centroids - 1]
    for level in range(levels):
        order += [min((2 * k + 1 << levels - 1 - level) - 1, num_centroids - 1) for k in range(1 << level)]
    return torch.tensor(order, device=device)


def pivots_of(centroids: Tensor) -> Tensor:
    """centroids (P, K) ascending -> pivots (P, 2**levels) fp32 in heap order."""
    middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
    end = middle.new_full((len(centroids), 1), torch.nan)  # all go to the left of it
    return torch.cat([middle, end], 1)[:, _heap_order(centroids.shape[1], centroids.device)].float().contiguous()


def _launch(work: worklist.WorkList, centroids: Tensor, dtype: torch.dtype, packed: bool) -> None:
    if work.tiles == 0:
        return
    pivots = pivots_of(centroids)
    with on_device(pivots):
        assign_kernel[(work.tiles,)](
            work.table, work.problem, work.tile, pivots, pivots, pivots, pivots, centroids.shape[1],
            DTYPE=worklist.DTYPES[dtype], LEVELS=levels_of(centroids.shape[1]), TILE=TILE, PACKED=packed, ERROR=False,
            WEIGHTED=False, num_warps=4 if packed else 8,
        )  # fmt: skip


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each value, (B, N) uint8: values (B, N) fp32, bf16 or fp16, centroids (B, K) fp32 ascending."""
    out = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)
    kept = values.contiguous()
    _launch(worklist.build_batch(kept, out, None, TILE), centroids, values.dtype, False)
    return out


def assign_ragged(values: Sequence[Tensor], centroids: Tensor, *, packed: bool = False) -> list[Tensor]:
    """Nearest centroids for a list of tensors in one launch.

    values: P contiguous tensors (rows, cols) or of any shape when not packed, one dtype, one device, empty ones too; centroids
    (P, K) fp32 ascending, for `packed` K a power of two from 2 on. Returns uint8 tensors of the same shapes, or packed rows.
    """
    num_centroids = centroids.shape[1]
    bits = levels_of(num_centroids)
    if packed and (num_centroids != 1 << bits or any(tensor.dim() != 2 for tensor in values)):
        raise ValueError(f"packed: expected matrices and a power of two of centroids, got {num_centroids} centroids")
    if not values:
        return []
    sizes = torch.tensor([tensor.numel() for tensor in values])
    cols = torch.tensor([tensor.shape[-1] if packed else tensor.numel() for tensor in values])
    if packed:
        outs = [tensor.new_empty((len(tensor), row_bytes(tensor.shape[1], bits)), dtype=torch.uint8) for tensor in values]
        tiles = torch.tensor([-(-(out.numel() // (16 * bits)) // BLOCKS) for out in outs])
    else:
        outs = [torch.empty_like(tensor, dtype=torch.uint8) for tensor in values]
        tiles = -(-sizes // TILE)
    none = torch.zeros(len(values), dtype=torch.int64)
    work = worklist.build(values, outs, None, sizes, cols, torch.arange(len(values)), none, none, tiles)
    _launch(work, centroids, values[0].dtype, packed)
    return outs
