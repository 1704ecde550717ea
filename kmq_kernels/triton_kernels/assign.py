"""Nearest centroids: a descent through the tree of midpoints, written as bytes or as packed bits.

The pivots of a problem lie in the order of a heap: node h has its children at 2h and 2h + 1, the root is node 1, and the K
leaves are the centroids. So each level is a run of neighbouring words, and the upper levels sit in registers.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK, row_bytes
from . import worklist
from .decode import prmt, select
from .dequantize import on_device
from .worklist import ALIGNED, COLS, COUNT, OUT, VALUES, WEIGHT, address, number

TILE = 4096  # values that one program labels
BLOCKS = TILE // BLOCK


@triton.jit
def _below(k, pivot, x):
    """The place in the next level of the heap: 2 * k, plus the sign bit of pivot - x, which is 1 where x > pivot.

    The difference has the right sign for every x; where it is NaN (a pivot that is not there, or x is NaN) all go to the left,
    because the NaN that a GPU computes has no sign. Shift and sign are one funnel shift of (k, difference).
    """
    return (k << 1) | ((pivot - x).to(tl.uint32, bitcast=True) >> 31)


@triton.jit
def _looked_up(table, index):
    """table[index], of the shape of index."""
    return tl.gather(table, tl.ravel(index).to(tl.int32), 0).reshape(index.shape)


@triton.jit
def nearest(x, pivots_ptr, LEVELS: tl.constexpr):
    """The index of the nearest centroid of each x (fp32, any shape): bit by bit from the top, x > pivot of the node."""
    p1 = tl.load(pivots_ptr + 1)
    if LEVELS == 1:
        return (x > p1).to(tl.int32)
    else:
        right = x > p1
        k = right.to(tl.uint32)
        pivot = tl.where(right, tl.load(pivots_ptr + 3), tl.load(pivots_ptr + 2))
        if LEVELS == 3:
            lower = x > pivot
            left = tl.where(right, tl.load(pivots_ptr + 6), tl.load(pivots_ptr + 4))
            last = tl.where(lower, tl.where(right, tl.load(pivots_ptr + 7), tl.load(pivots_ptr + 5)), left)
            k = _below(_below(k, pivot, x), last, x)
        else:
            k = _below(k, pivot, x)
        if LEVELS >= 4:  # by way of shared memory, which an index reaches in fewer instructions than global memory
            pivots = tl.load(pivots_ptr + tl.arange(0, 1 << LEVELS))
            for level in tl.static_range(2, LEVELS):
                k = _below(k, _looked_up(pivots, k + (1 << level)), x)
        return k.to(tl.int32)


@triton.jit
def _offsets(x, k, centroids_ptr, per_unit, K, LEVELS: tl.constexpr):
    """(x - centroid k) * per_unit, where per_unit is a power of two."""
    entry = tl.arange(0, 1 << LEVELS)
    centroids = tl.load(centroids_ptr + entry, mask=entry < K, other=0.0) * per_unit
    return x * per_unit - _looked_up(centroids, k)


@triton.jit
def label_flat(
    table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
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
        off = _offsets(x, k, centroids_ptr, per_unit, K, LEVELS)
        square = off * off
        if WEIGHTED:
            if WHOLE:
                square *= tl.load(weight_ptr + at, eviction_policy="evict_first")
            else:
                square *= tl.load(weight_ptr + at, mask=inside, other=0.0)
        error += tl.sum(tl.where(inside, square, 0.0), 0).to(tl.float64)
    return error


@triton.jit
def fields_of(k):
    """The 8 tensors (BLOCKS, 16) that k (8, BLOCKS, 16) consists of."""
    even, odd = tl.split(k.reshape(2, 2, 2, k.shape[1], 16).permute(3, 4, 0, 1, 2))
    k04, k26 = tl.split(even)
    k15, k37 = tl.split(odd)
    k0, k4 = tl.split(k04)
    k1, k5 = tl.split(k15)
    k2, k6 = tl.split(k26)
    k3, k7 = tl.split(k37)
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def _bytes(fields, first: tl.constexpr):
    """The low bytes of fields first, first + 2, first + 4 and first + 6 as one integer."""
    low = prmt(fields[first], fields[first + 2], 0x0040)
    return prmt(low, prmt(fields[first + 4], fields[first + 6], 0x0040), 0x5410)


@triton.jit
def label_packed(
    table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
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
    col = 16 * tl.arange(0, 8)[:, None, None] + lane[None, None, :]
    if WHOLE:
        exists, inside = block >= 0, tl.full((8, BLOCKS, 16), True, tl.int1)
        at = (block * 128)[None, :, None] + col
        x = tl.load(values_ptr + at, eviction_policy="evict_first").to(tl.float32)
    else:
        in_row = (cols + 127) // 128
        row = block // in_row
        exists = row * cols < count
        inside = exists[None, :, None] & (col < (cols - block % in_row * 128)[None, :, None])
        at = (row * cols + block % in_row * 128)[None, :, None] + col
        x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = nearest(x, pivots_ptr, LEVELS)
    error = tl.zeros((1,), tl.float64)
    if ERROR:
        off = _offsets(x, k, centroids_ptr, per_unit, K, LEVELS)
        if not WHOLE:
            off = tl.where(inside, off, 0.0)
        squares = tl.zeros((BLOCKS, 16), tl.float32)
        offsets = fields_of(off)
        if WEIGHTED:
            if WHOLE:
                weights = fields_of(tl.load(weight_ptr + at, eviction_policy="evict_first"))
            else:
                weights = fields_of(tl.load(weight_ptr + at, mask=inside, other=0.0))
            for j in tl.static_range(8):
                squares += offsets[j] * offsets[j] * weights[j]
        else:
            for j in tl.static_range(8):
                squares += offsets[j] * offsets[j]
        error += tl.sum(tl.ravel(squares), 0).to(tl.float64)
    if not WHOLE:
        k = tl.where(inside, k, 0)
    to = out_ptr + (block * (16 * LEVELS))[:, None]
    stored = exists[:, None] & (lane >= 0)[None, :]
    fields = fields_of(k)
    if LEVELS >= 4:
        words = to.to(tl.pointer_type(tl.int32)) + lane[None, :]
        even, odd = _bytes(fields, 0), _bytes(fields, 1)
        low = select(0x0F0F0F0F, even, odd << 4)
        if WHOLE:
            tl.store(words, low)
        else:
            tl.store(words, low, mask=stored)
        if LEVELS == 8:
            high = select(0x0F0F0F0F, even >> 4, odd)
            if WHOLE:
                tl.store(words + 16, high)
            else:
                tl.store(words + 16, high, mask=stored)
    if (LEVELS & 2) != 0:
        two = tl.zeros((BLOCKS, 16), tl.int32)
        for j in tl.static_range(8):
            two |= ((fields[j] >> (LEVELS & 4)) & 3) << (2 * j)
        halves = (to + 16 * (LEVELS & 4)).to(tl.pointer_type(tl.int16)) + lane[None, :]
        tl.store(halves, two.to(tl.int16), mask=stored)
    if (LEVELS & 1) != 0:
        one = tl.zeros((BLOCKS, 16), tl.int32)
        for j in tl.static_range(8):
            one |= (fields[j] >> (LEVELS - 1)) << j
        tl.store(to + 16 * (LEVELS - 1) + lane[None, :], one.to(tl.uint8), mask=stored)
    return error


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
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
                DTYPE, LEVELS, TILE // 128, ERROR, WEIGHTED, True,
            )  # fmt: skip
        else:
            error = label_packed(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
                DTYPE, LEVELS, TILE // 128, ERROR, WEIGHTED, False,
            )  # fmt: skip
    else:
        if aligned:
            error = label_flat(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
                DTYPE, LEVELS, TILE, ERROR, WEIGHTED, True,
            )  # fmt: skip
        else:
            error = label_flat(
                table_ptr, problem, tile, pivots_ptr, centroids_ptr, per_unit, K,
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
    above, below = centroids[:, 1:], centroids[:, :-1]
    middle = (above + below) / 2
    middle = torch.where(middle.isinf(), above / 2 + below / 2, middle)
    end = middle.new_full((len(centroids), 1), torch.nan)  # all go to the left of it
    return torch.cat([middle, end], 1)[:, _heap_order(centroids.shape[1], centroids.device)].float().contiguous()


def options(packed: bool) -> dict[str, int]:
    """How to compile the kernel: packed labels hold 32 values a thread, more than ptxas gives registers to by itself."""
    return {"num_warps": 4, "maxnreg": 224} if packed else {"num_warps": 8}


def _launch(work: worklist.WorkList, centroids: Tensor, dtype: torch.dtype, packed: bool) -> None:
    if work.tiles == 0:
        return
    pivots = pivots_of(centroids)
    with on_device(pivots):
        assign_kernel[(work.tiles,)](
            work.table, work.problem, work.tile, pivots, pivots, pivots, pivots, centroids.shape[1],
            DTYPE=worklist.DTYPES[dtype], LEVELS=levels_of(centroids.shape[1]), TILE=TILE, PACKED=packed, ERROR=False,
            WEIGHTED=False, **options(packed),
        )  # fmt: skip


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each value, (B, N) uint8, NaN to 0: values (B, N) fp32, bf16, fp16, centroids (B, K) fp32 ascending."""
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
