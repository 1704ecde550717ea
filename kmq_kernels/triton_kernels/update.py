"""Sums of weight * value and of weight per cluster, for assignments that are given or, in one read, for nearest centroids.

Each tile writes its sums, a second kernel adds the tiles of a problem in their order: the same bits on every run. The index of a
cluster is split into two digits. Up to 16 clusters a value is masked by its low digit and added under its high digit; how many
there are is counted in fields of 4 bits. More clusters are left to the tensor cores: sum[a, b] = sum over i of [high digit of i
is a] * [low digit of i is b] * x_i is a product of two matrices. There a value is three pieces of 8 bits, which bf16 holds
exactly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import worklist
from .assign import label_flat, levels_of, pivots_of
from .decode import NATIVE
from .dequantize import on_device
from .worklist import ALIGNED, COUNT, FIRST, OUT, VALUES, WEIGHT, address, number

TILE = 16384  # values that one program sums
PART: tl.constexpr = tl.constexpr(4096)  # of them are labelled before they are summed, from the first-level cache
LANES: tl.constexpr = tl.constexpr(128)  # summed at a time under masks
RUN: tl.constexpr = tl.constexpr(8)  # how often before fields of 4 bits are emptied
DEPTH: tl.constexpr = tl.constexpr(256)  # summed at a time by matrices, half of them with weights
PIECE: tl.constexpr = tl.constexpr(tl.bfloat16 if NATIVE.value else tl.float32)  # the interpreter has no arithmetic for bf16


@triton.jit
def _load(values_ptr, labels_ptr, weight_ptr, at, count, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr):
    """What clusters grow by, weight * value and weight (1 where all weigh alike), and which; nothing beyond count."""
    inside = at < count
    x = (tl.load(values_ptr + at) if WHOLE else tl.load(values_ptr + at, mask=inside, other=0.0)).to(tl.float32)
    k = (tl.load(labels_ptr + at) if WHOLE else tl.load(labels_ptr + at, mask=inside, other=0)).to(tl.int32)
    if WEIGHTED:
        w = tl.load(weight_ptr + at) if WHOLE else tl.load(weight_ptr + at, mask=inside, other=0.0)
        return tl.where(w != 0, x * w, 0.0), w, k
    else:
        return x, tl.full(x.shape, 1.0, tl.float32) if WHOLE else tl.where(inside, 1.0, 0.0), k


@triton.jit
def _sum_masked(
    values_ptr, labels_ptr, weight_ptr, first, end, count, sums, weights,
    LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds values [first, end) for up to 16 clusters: sums (KP >> LOW, 1 << LOW, LANES), weights like it or (KP, LANES) int32."""
    LOW: tl.constexpr = (LEVELS + 1) // 2
    high = tl.arange(0, 1 << (LEVELS - LOW))[:, None, None]
    low = tl.arange(0, 1 << LOW)[:, None]
    for start in range(first, end, LANES * RUN):
        lower, upper = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32)
        for j in tl.static_range(RUN):
            at = start + j * LANES + tl.arange(0, LANES)
            x, w, k = _load(values_ptr, labels_ptr, weight_ptr, at, count, WEIGHTED, WHOLE)
            here = high == (k >> LOW)[None, None, :]
            mine = low == (k & ((1 << LOW) - 1))[None, :]
            sums = tl.where(here, sums + tl.where(mine, x[None, :], 0.0)[None, :, :], sums)
            if WEIGHTED:
                weights = tl.where(here, weights + tl.where(mine, w[None, :], 0.0)[None, :, :], weights)
            else:
                one = 1 << (4 * (k & 7))
                if not WHOLE:
                    one = tl.where(at < count, one, 0)
                lower += tl.where(k < 8, one, 0)
                upper += tl.where(k < 8, 0, one)
        if not WEIGHTED:
            number = tl.arange(0, 1 << LEVELS)[:, None]
            weights += (tl.where(number < 8, lower[None, :], upper[None, :]) >> (4 * (number & 7))) & 15
    return sums, weights


@triton.jit
def _pieces(x, last):
    """x (N,) fp32 as the sum of three numbers of 8 bits, and `last`: (N, 1, 4) in PIECE."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return tl.join(tl.join(high, rest - middle), tl.join(middle, last)).to(PIECE).reshape(x.shape[0], 1, 4)


@triton.jit
def _sum_by_matrices(
    values_ptr, labels_ptr, weight_ptr, first, end, count, sums, weights,
    LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds values [first, end) for 17 to 256 clusters: sums (16, 64), weights like it; if not WEIGHTED, in the last piece."""
    SIZE: tl.constexpr = DEPTH // 2 if WEIGHTED else DEPTH
    digit = tl.arange(0, 16)
    for start in range(first, end, SIZE):
        at = start + tl.arange(0, SIZE)
        x, w, k = _load(values_ptr, labels_ptr, weight_ptr, at, count, WEIGHTED, WHOLE)
        high = (digit[:, None] == (k >> 4)[None, :]).to(PIECE)
        low = ((k & 15)[:, None] == digit[None, :])[:, :, None]
        columns = tl.where(low, _pieces(x, w), 0.0).to(PIECE).reshape(SIZE, 64)
        sums = tl.dot(high, columns, sums, input_precision="ieee")
        if WEIGHTED:
            columns = tl.where(low, _pieces(w, tl.zeros_like(w)), 0.0).to(PIECE).reshape(SIZE, 64)
            weights = tl.dot(high, columns, weights, input_precision="ieee")
    return sums, weights


@triton.jit
def _sum_tile(
    table_ptr, problem, tile, pivots_ptr, out_ptr, count,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr, FUSED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile; WHOLE: all of it lies inside, at 16-byte addresses."""
    KP: tl.constexpr = 1 << LEVELS
    LOW: tl.constexpr = (LEVELS + 1) // 2
    values_ptr, labels_ptr = address(table_ptr, problem, VALUES, DTYPE), address(table_ptr, problem, OUT, tl.uint8)
    weight_ptr = address(table_ptr, problem, WEIGHT, tl.float32)
    first = tile.to(tl.int64) * TILE
    if LEVELS <= 4:
        sums = tl.zeros((KP >> LOW, 1 << LOW, LANES), tl.float32)
        weights = tl.zeros((KP >> LOW, 1 << LOW, LANES), tl.float32) if WEIGHTED else tl.zeros((KP, LANES), tl.int32)
    else:
        sums, weights = tl.zeros((16, 64), tl.float32), tl.zeros((16, 64), tl.float32)
    for part in range(TILE // PART if WHOLE else (tl.minimum(count - first, TILE) + PART - 1) // PART):
        begin = first + part * PART
        if FUSED:
            label_flat(
                table_ptr, problem, tile.to(tl.int64) * (TILE // PART) + part, pivots_ptr, pivots_ptr, 1.0, 1,
                DTYPE, LEVELS, PART, False, False, WHOLE,
            )  # fmt: skip
            tl.debug_barrier()
        if LEVELS <= 4:
            sums, weights = _sum_masked(
                values_ptr, labels_ptr, weight_ptr, begin, begin + PART, count, sums, weights, LEVELS, WEIGHTED, WHOLE
            )
        else:
            sums, weights = _sum_by_matrices(
                values_ptr, labels_ptr, weight_ptr, begin, begin + PART, count, sums, weights, LEVELS, WEIGHTED, WHOLE
            )
    if LEVELS <= 4:
        cluster = tl.arange(0, KP)
        tl.store(out_ptr + cluster, tl.sum(sums.to(tl.float64), 2).reshape(KP))
        if WEIGHTED:
            tl.store(out_ptr + KP + cluster, tl.sum(weights.to(tl.float64), 2).reshape(KP))
        else:
            tl.store(out_ptr + KP + cluster, tl.sum(weights, 1).to(tl.float64))
    else:
        cluster, piece = 16 * tl.arange(0, 16)[:, None] + tl.arange(0, 16)[None, :], tl.arange(0, 4)[None, None, :]
        sums64 = sums.reshape(16, 16, 4).to(tl.float64)
        tl.store(out_ptr + cluster, tl.sum(tl.where(piece < 3, sums64, 0.0), 2), mask=cluster < KP)
        weights64 = weights.reshape(16, 16, 4).to(tl.float64) if WEIGHTED else tl.where(piece == 3, sums64, 0.0)
        tl.store(out_ptr + KP + cluster, tl.sum(weights64, 2), mask=cluster < KP)


@triton.jit
def update_kernel(
    table_ptr, problem_ptr, tile_ptr, pivots_ptr, sums_ptr,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """sums (T, 2, 2**LEVELS) fp64 <- sums of weight * value and of weight of the tile; FUSED: writes the assignments as well."""
    i = tl.program_id(0).to(tl.int64)
    problem, tile = tl.load(problem_ptr + i).to(tl.int64), tl.load(tile_ptr + i)
    count = number(table_ptr, problem, COUNT)
    pivots_ptr += problem * (1 << LEVELS)
    sums_ptr += i * (2 << LEVELS)
    if ((tile + 1).to(tl.int64) * TILE <= count) & (number(table_ptr, problem, ALIGNED) != 0):
        _sum_tile(table_ptr, problem, tile, pivots_ptr, sums_ptr, count, DTYPE, LEVELS, TILE, WEIGHTED, FUSED, True)
    else:
        _sum_tile(table_ptr, problem, tile, pivots_ptr, sums_ptr, count, DTYPE, LEVELS, TILE, WEIGHTED, FUSED, False)


@triton.jit
def add_tiles_kernel(table_ptr, sums_ptr, out_ptr, weights_ptr, K, problems, tiles, KP: tl.constexpr, DEPTH: tl.constexpr):
    """out, weights (P, K) fp64: the sums of all tiles of a problem, in their order."""
    problem = tl.program_id(0).to(tl.int64)
    begin, end = number(table_ptr, problem, FIRST), tl.full((), tiles, tl.int64)  # `tiles` is a plain 1 where it is 1
    if problem + 1 < problems:
        end = number(table_ptr, problem + 1, FIRST)
    k = tl.arange(0, KP)
    sums, weights = tl.zeros((DEPTH, KP), tl.float64), tl.zeros((DEPTH, KP), tl.float64)
    for start in range(begin, end, DEPTH):
        i = start + tl.arange(0, DEPTH)
        at = i[:, None] * (2 * KP) + k[None, :]
        sums += tl.load(sums_ptr + at, mask=(i < end)[:, None], other=0.0)
        weights += tl.load(sums_ptr + KP + at, mask=(i < end)[:, None], other=0.0)
    tl.store(out_ptr + problem * K + k, tl.sum(sums, 0), mask=k < K)
    tl.store(weights_ptr + problem * K + k, tl.sum(weights, 0), mask=k < K)


def _sum(
    work: worklist.WorkList, pivots: Tensor | None, num_centroids: int, dtype: torch.dtype, weighted: bool
) -> tuple[Tensor, Tensor]:
    problems, levels = len(work.table), levels_of(num_centroids)
    sums = torch.zeros(problems, num_centroids, dtype=torch.float64, device=work.table.device)
    weights = torch.zeros_like(sums)
    if work.tiles == 0:
        return sums, weights
    parts = sums.new_empty(work.tiles, 2, 1 << levels)
    with on_device(parts):
        update_kernel[(work.tiles,)](
            work.table, work.problem, work.tile, parts if pivots is None else pivots, parts,
            DTYPE=worklist.DTYPES[dtype], LEVELS=levels, TILE=TILE, WEIGHTED=weighted,
            FUSED=pivots is not None, num_warps=4, maxnreg=255,
        )  # fmt: skip
        add_tiles_kernel[(problems,)](
            work.table, parts, sums, weights, num_centroids, problems, work.tiles, KP=1 << levels, DEPTH=16, num_warps=4
        )
    return sums, weights


def _batch(values: Tensor, labels: Tensor, sample_weight: Tensor | None) -> worklist.WorkList:
    return worklist.build_batch(values, labels, sample_weight, TILE)


def update(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of weight * value and of weight per cluster, (B, K) fp64; values (B, N) fp32, bf16 or fp16, assignments (B, N) uint8.

    Products and the sums of a tile are fp32, what is beyond is fp64.
    """
    weight = None if sample_weight is None else sample_weight.float().contiguous()
    kept, labels = values.contiguous(), assignments.contiguous()  # the work list has their addresses only
    work = _batch(kept, labels, weight)
    return _sum(work, None, num_centroids, values.dtype, weight is not None)


def step(values: Tensor, centroids: Tensor, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A Lloyd step in one read: assignments (B, N) uint8 to centroids (B, K) fp32 ascending, their sums and weights (B, K)."""
    labels = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)
    weight = None if sample_weight is None else sample_weight.float().contiguous()
    kept = values.contiguous()
    work = _batch(kept, labels, weight)
    return labels, *_sum(work, pivots_of(centroids), centroids.shape[1], values.dtype, weight is not None)


def _list(values: Sequence[Tensor], labels: Sequence[Tensor], weights: Sequence[Tensor] | None) -> worklist.WorkList:
    """The work list of a list of contiguous tensors, which it does not keep alive."""
    sizes = torch.tensor([tensor.numel() for tensor in values])
    none = torch.zeros_like(sizes)
    return worklist.build(values, labels, weights, sizes, sizes, torch.arange(len(values)), none, none, -(-sizes // TILE))


def update_ragged(
    values: Sequence[Tensor],
    assignments: Sequence[Tensor],
    num_centroids: int,
    sample_weight: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`update` for a list of P contiguous tensors of one dtype, any shapes, empty ones too, in one launch: (P, K)."""
    if not values:
        none = torch.zeros(0, num_centroids, dtype=torch.float64)
        return none, none.clone()
    labels = [one.contiguous() for one in assignments]
    weights = None if sample_weight is None else [weight.float().contiguous() for weight in sample_weight]
    return _sum(_list(values, labels, weights), None, num_centroids, values[0].dtype, weights is not None)


def step_ragged(
    values: Sequence[Tensor], centroids: Tensor, sample_weight: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`step` for a list of contiguous tensors of one dtype, any shapes, empty ones too, in one launch: P problems, (P, K)."""
    labels = [torch.empty_like(tensor, dtype=torch.uint8) for tensor in values]
    if not values:
        none = centroids.new_zeros(centroids.shape, dtype=torch.float64)
        return labels, none, none.clone()
    weights = None if sample_weight is None else [weight.float().contiguous() for weight in sample_weight]
    work = _list(values, labels, weights)
    return labels, *_sum(work, pivots_of(centroids), centroids.shape[1], values[0].dtype, weights is not None)
