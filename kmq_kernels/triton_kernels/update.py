"""Sums of weight * value and of weight per cluster, for assignments that are given or, in one read, for nearest centroids.

Each tile writes its sums, a second kernel adds the tiles of a problem in their order: the same bits on every run. Up to 16
clusters are summed under masks. More would cost an operation a cluster and value; instead the index is split into two digits
of 16, and sum[a, b] = sum over i of [high digit of i is a] * [low digit of i is b] * x_i, a product of two matrices for the
tensor cores (three TF32 products stand in for fp32, good to 2**-21 of each value).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import worklist
from .assign import levels_of, nearest, pivots_of
from .dequantize import on_device
from .worklist import COUNT, FIRST, OUT, VALUES, WEIGHT, address, number

TILE = 4096  # values that one program sums
LANES = 512  # of them at a time under masks
DEPTH = 32  # of them at a time by matrices


@triton.jit
def update_kernel(
    table_ptr, problem_ptr, tile_ptr, pivots_ptr, sums_ptr,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WEIGHTED: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """sums (T, 2, 2**LEVELS) fp64 <- sums of weight * value and of weight of the tile; FUSED: writes the assignments as well."""
    KP: tl.constexpr = 1 << LEVELS
    i = tl.program_id(0).to(tl.int64)
    problem, tile = tl.load(problem_ptr + i).to(tl.int64), tl.load(tile_ptr + i)
    values_ptr, count = address(table_ptr, problem, VALUES, DTYPE), number(table_ptr, problem, COUNT)
    labels_ptr, weight_ptr = address(table_ptr, problem, OUT, tl.uint8), address(table_ptr, problem, WEIGHT, tl.float32)
    pivots_ptr += problem * KP
    cluster = tl.arange(0, KP)
    digit = tl.arange(0, 16)
    if LEVELS <= 4:
        sums, weights = tl.zeros((KP, STEP), tl.float32), tl.zeros((KP, STEP), tl.float32)
    else:
        sums, weights = tl.zeros((16, 16), tl.float32), tl.zeros((16, 16), tl.float32)
    for start in range(0, TILE, STEP):
        at = tile.to(tl.int64) * TILE + start + tl.arange(0, STEP)
        inside = at < count
        x = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if FUSED:
            k = nearest(x, pivots_ptr, LEVELS)
            tl.store(labels_ptr + at, k.to(tl.uint8), mask=inside)
        else:
            k = tl.load(labels_ptr + at, mask=inside, other=0).to(tl.int32)
        if WEIGHTED:
            w = tl.load(weight_ptr + at, mask=inside, other=0.0)
            x = tl.where(w != 0, x * w, 0.0)
        else:
            w = inside.to(tl.float32)
        if LEVELS <= 4:
            member = cluster[:, None] == k[None, :]
            sums += tl.where(member, x[None, :], 0.0)
            weights += tl.where(member, w[None, :], 0.0)
        else:
            high = (digit[:, None] == (k >> 4)[None, :]).to(tl.float32)
            low = (k & 15)[:, None] == digit[None, :]
            sums = tl.dot(high, tl.where(low, x[:, None], 0.0), sums, input_precision="tf32x3")
            weights = tl.dot(high, tl.where(low, w[:, None], 0.0), weights, input_precision="tf32x3")
    out = sums_ptr + i * 2 * KP
    if LEVELS <= 4:
        tl.store(out + cluster, tl.sum(sums.to(tl.float64), 1))
        tl.store(out + KP + cluster, tl.sum(weights.to(tl.float64), 1))
    else:
        at = 16 * digit[:, None] + digit[None, :]
        tl.store(out + at, sums.to(tl.float64), mask=at < KP)
        tl.store(out + KP + at, weights.to(tl.float64), mask=at < KP)


@triton.jit
def add_tiles_kernel(table_ptr, sums_ptr, out_ptr, weights_ptr, K, problems, tiles, KP: tl.constexpr, DEPTH: tl.constexpr):
    """out, weights (P, K) fp64: the sums of all tiles of a problem, in their order."""
    problem = tl.program_id(0).to(tl.int64)
    begin, end = number(table_ptr, problem, FIRST), tiles.to(tl.int64)
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
            DTYPE=worklist.DTYPES[dtype], LEVELS=levels, TILE=TILE, STEP=LANES if levels <= 4 else DEPTH, WEIGHTED=weighted,
            FUSED=pivots is not None, num_warps=4 if levels <= 4 else 1,
        )  # fmt: skip
        add_tiles_kernel[(problems,)](
            work.table, parts, sums, weights, num_centroids, problems, work.tiles, KP=1 << levels, DEPTH=16, num_warps=4
        )
    return sums, weights


def _batch(values: Tensor, labels: Tensor, sample_weight: Tensor | None) -> worklist.WorkList:
    return worklist.build_batch(values, labels, sample_weight, TILE)


def update(
    values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of weight * value and of weight per cluster, (B, K) fp64; values (B, N) fp32, bf16 or fp16, assignments (B, N) uint8.

    Products and the sums of a tile are fp32, what is beyond is fp64.
    """
    weight = None if sample_weight is None else sample_weight.float().contiguous()
    work = _batch(values.contiguous(), assignments.contiguous(), weight)
    return _sum(work, None, num_centroids, values.dtype, weight is not None)


def step(values: Tensor, centroids: Tensor, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A Lloyd step in one read: assignments (B, N) uint8 to centroids (B, K) fp32 ascending, their sums and weights (B, K)."""
    labels = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)
    weight = None if sample_weight is None else sample_weight.float().contiguous()
    kept = values.contiguous()
    work = _batch(kept, labels, weight)
    return labels, *_sum(work, pivots_of(centroids), centroids.shape[1], values.dtype, weight is not None)


def step_ragged(
    values: Sequence[Tensor], centroids: Tensor, sample_weight: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`step` for a list of contiguous tensors of one dtype, any shapes, empty ones too, in one launch: P problems, (P, K)."""
    labels = [torch.empty_like(tensor, dtype=torch.uint8) for tensor in values]
    if not values:
        none = centroids.new_zeros(centroids.shape, dtype=torch.float64)
        return labels, none, none.clone()
    sizes = torch.tensor([tensor.numel() for tensor in values])
    none = torch.zeros_like(sizes)
    weights = None if sample_weight is None else [weight.float().contiguous() for weight in sample_weight]
    work = worklist.build(values, labels, weights, sizes, sizes, torch.arange(len(values)), none, none, -(-sizes // TILE))
    return labels, *_sum(work, pivots_of(centroids), centroids.shape[1], values[0].dtype, weights is not None)
