"""Small problems, such as the rows of a matrix: one program sorts the values on chip and does the whole solve."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import worklist
from ..worklist import COUNT, VALUES, WEIGHT, address, number
from .solve import MOST_EXACT, of_sort_key, solve_points, sort_key, write_centroids

SMALL = 16384  # values that one program sorts
ON_CHIP: tl.constexpr = tl.constexpr(4096)  # of them in registers at a time; what does not fit lies in the first-level cache
PROGRAMS = 512  # at a time; each has its workspace
SPLITS = 8  # places where splitting a cluster is tried
PART = 16  # places of one window that are compared with all of the next at a time; other blocks are in proportion

# Bits of a status, as in kmeans.py.
VALUES_NOT_FINITE: tl.constexpr = tl.constexpr(1)
WEIGHTS_NOT_FINITE: tl.constexpr = tl.constexpr(2)
WEIGHTS_NEGATIVE: tl.constexpr = tl.constexpr(4)
WEIGHTS_ZERO: tl.constexpr = tl.constexpr(8)
UNRESOLVED: tl.constexpr = tl.constexpr(16)


@triton.jit
def _merge(x, begin, run, stride, SIZE: tl.constexpr):
    """The exchanges of a bitonic sort from `stride` down, through shared memory; x stands at `begin` of the whole."""
    i = tl.arange(0, SIZE)
    while stride > 0:
        other = tl.gather(x, i ^ stride, 0)
        smaller = ((i & stride) == 0) == (((begin + i) & run) == 0)
        x = tl.where(smaller, tl.minimum(x, other), tl.maximum(x, other))
        stride = stride // 2
    return x


@triton.jit
def bitonic_sort(x, begin, SIZE: tl.constexpr):
    """x (SIZE,) sorted; ascending where `begin`, its place in the whole, is an even multiple of SIZE."""
    run = 2
    while run <= SIZE:
        x = _merge(x, begin, run, run // 2, SIZE)
        run = run * 2
    return x


@triton.jit
def merge_blocks(item_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Merges sorted blocks, ascending and descending in turn, into SIZE sorted items; in memory where a stride leaves a block."""
    run = BLOCK * 2
    while run <= SIZE:
        stride = run // 2
        while stride >= BLOCK:
            tl.debug_barrier()
            for start in range(0, SIZE // 2, CHUNK):
                pair = start + tl.arange(0, CHUNK)
                at = 2 * pair - (pair & (stride - 1))
                one, two = tl.load(item_ptr + at), tl.load(item_ptr + at + stride)
                rising = (at & run) == 0
                tl.store(item_ptr + at, tl.where(rising, tl.minimum(one, two), tl.maximum(one, two)))
                tl.store(item_ptr + at + stride, tl.where(rising, tl.maximum(one, two), tl.minimum(one, two)))
            stride = stride // 2
        tl.debug_barrier()
        for begin in range(0, SIZE, BLOCK):  # the stride is now half a block
            at = begin + tl.arange(0, BLOCK)
            tl.store(item_ptr + at, _merge(tl.load(item_ptr + at), begin, run, stride, BLOCK))
        run = run * 2


@triton.jit
def _item(item_ptr, at, n, WEIGHTED: tl.constexpr):
    """Value and weight (fp64) of sorted items; weight 0 beyond the end."""
    here = at < n
    item = tl.load(item_ptr + at, mask=here, other=0)
    x = tl.where(here, of_sort_key(item >> 31), 0.0).to(tl.float64)
    if WEIGHTED:
        return x, tl.where(here, (item & 0x7FFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), 0.0).to(tl.float64)
    else:
        return x, here.to(tl.float64)


@triton.jit
def rows_kernel(
    table_ptr, status_ptr, points_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr, centroids_ptr,
    pivots_ptr,
    unit_ptr, doubt_ptr, check_ptr, iterations_ptr, problems, K, count, stride_cells, max_iter,
    DTYPE: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Solves problems of at most SIZE values, see solve_kernel in kmeans.py; workspace is per program."""
    KP: tl.constexpr = 1 << LEVELS
    program = tl.program_id(0).to(tl.int64)
    y_ptr = points_ptr + program * 4 * (SIZE + 16)
    w_ptr, s_ptr, q_ptr = y_ptr + (SIZE + 16), y_ptr + 2 * (SIZE + 16), y_ptr + 3 * (SIZE + 16)
    cells_ptr += program * stride_cells
    cell_ptr += program * 5 * stride_cells
    grown_ptr += program * (GROUPS + 16)
    bounds_ptr += program * (2 * (KP + 2))
    choice_ptr += program * ((KP + 1) * (stride_cells if KP <= MOST_EXACT else WIDTH))
    best_ptr += program * WIDTH
    c_ptr += program * KP
    BLOCK: tl.constexpr = min(SIZE, ON_CHIP)
    i = tl.arange(0, BLOCK)
    none = tl.full((), 0, tl.float64)
    for turn in range(tl.program_id(0), problems, tl.num_programs(0)):
        problem = none.to(tl.int64) + turn
        count_here = number(table_ptr, problem, COUNT)
        item_ptr = q_ptr.to(tl.pointer_type(tl.int64))
        status, n = 0, 0
        for begin in range(0, SIZE, BLOCK):
            at = begin + i
            inside = at < count_here
            x = tl.load(address(table_ptr, problem, VALUES, DTYPE) + at, mask=inside, other=0.0).to(tl.float32)
            finite = tl.abs(x) <= 3.4028234e38
            status |= tl.max(tl.where(finite, 0, VALUES_NOT_FINITE), 0)
            used = inside & finite
            bits = tl.full((BLOCK,), 0, tl.int64)
            if WEIGHTED:
                weight = tl.load(address(table_ptr, problem, WEIGHT, tl.float32) + at, mask=inside, other=0.0)
                status |= tl.max(tl.where(tl.abs(weight) <= 3.4028234e38, 0, WEIGHTS_NOT_FINITE), 0)
                status |= tl.max(tl.where(weight < 0, WEIGHTS_NEGATIVE, 0), 0)
                used = used & (weight > 0)
                bits = tl.where(used, weight.to(tl.int32, bitcast=True), 0).to(tl.int64)
            n += tl.sum(used.to(tl.int32), 0)
            # The values and, below them, their weights; what is not used goes to the end.
            item = tl.where(used, (sort_key(x) << 31) | bits, 0x7FFFFFFFFFFFFFFF)
            tl.store(item_ptr + at, bitonic_sort(item, begin, BLOCK))
        if SIZE > BLOCK:  # Triton 3.6 cannot compile the dead loops of a single block
            merge_blocks(item_ptr, SIZE, BLOCK, CHUNK)
        tl.debug_barrier()
        if (n == 0) & (status == 0):
            status |= WEIGHTS_ZERO
        if status == 0:
            total, first, spread, largest = none, none, none, none
            for start in range(0, n, CHUNK):
                at = start + tl.arange(0, CHUNK)
                x64, w = _item(item_ptr, at, n, WEIGHTED)
                total += tl.sum(w, 0)
                first += tl.sum(w * x64, 0)
            mean = first / total
            for start in range(0, n, CHUNK):
                at = start + tl.arange(0, CHUNK)
                x64, w = _item(item_ptr, at, n, WEIGHTED)
                spread += tl.sum(w * tl.abs(x64 - mean), 0)
            # A power of two as unit: dividing by it is exact, and errors neither overflow nor vanish in fp32.
            size = tl.maximum(spread / total, 2.0**-200)
            unit = ((size.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)
            per_unit = 1.0 / unit
            mean = mean * per_unit
            w0, s0, q0 = none, none, none
            for start in range(0, n, CHUNK):
                at = start + tl.arange(0, CHUNK)
                here = at < n
                x64, w = _item(item_ptr, at, n, WEIGHTED)
                y = x64 * per_unit
                w = w / total
                off = tl.where(here, y - mean, 0.0)
                largest = tl.maximum(largest, tl.max(tl.abs(off), 0))
                tl.debug_barrier()  # the second moments take the place of the items
                tl.store(y_ptr + at, y, mask=here)
                tl.store(w_ptr + at, w0 + tl.cumsum(w, 0) - w, mask=here)
                tl.store(s_ptr + at, s0 + tl.cumsum(w * off, 0) - w * off, mask=here)
                tl.store(q_ptr + at, q0 + tl.cumsum(w * off * off, 0) - w * off * off, mask=here)
                w0 += tl.sum(w, 0)
                s0 += tl.sum(w * off, 0)
                q0 += tl.sum(w * off * off, 0)
            tl.store(w_ptr + n, w0)
            tl.store(s_ptr + n, s0)
            tl.store(q_ptr + n, q0)
            if largest > 1e15:
                status |= UNRESOLVED
            tl.debug_barrier()
            if status == 0:
                iterations, distinct, _ = solve_points(
                    y_ptr, w_ptr, s_ptr, q_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr, n, mean,
                    K, count,
                    stride_cells, max_iter, KP, WIDTH, GROUPS, CHUNK, SPLITS, PART, True,
                )  # fmt: skip
                if iterations < 0:
                    status |= UNRESOLVED
                tl.store(iterations_ptr + problem, tl.maximum(iterations, 0).to(tl.int64))
                write_centroids(
                    c_ptr, y_ptr, w_ptr, centroids_ptr + problem * K, pivots_ptr + problem * KP, unit_ptr + problem,
                    doubt_ptr + problem * K,
                    check_ptr + problem, unit, per_unit, n, K, distinct > K, True, LEVELS,
                )  # fmt: skip
        tl.store(status_ptr + problem, status)
        tl.debug_barrier()


def part_for(part: int, tensor: Tensor) -> int:
    """`part`, but larger in the interpreter, where an operation costs about the same for any block; no result depends on it."""
    return part if tensor.is_cuda else 512


def launch_rows(
    table: Tensor, status: Tensor, centroids: Tensor, pivots: Tensor, unit: Tensor, doubt: Tensor, check: Tensor,
    iterations: Tensor, scratch: dict[str, Tensor], *, dtype: torch.dtype, weighted: bool, num_centroids: int,
    size: int, count: int, most_cells: int,
    width: int, max_iter: int,
) -> None:  # fmt: skip
    """Solves the problems of a table, all of at most `size` values."""
    work = [scratch[name] for name in ("points", "cells", "cell", "grown", "bounds", "choice", "best", "c")]
    levels = pivots.shape[1].bit_length() - 1
    rows_kernel[(len(work[0]),)](
        table, status, *work, centroids, pivots, unit, doubt, check, iterations, len(table), num_centroids, count, most_cells,
        max_iter,
        DTYPE=worklist.DTYPES[dtype], WEIGHTED=weighted, SIZE=size, LEVELS=levels, WIDTH=width, GROUPS=max(2, size // 16),
        CHUNK=min(size, 1024), SPLITS=SPLITS, PART=part_for(PART, table), num_warps=8, maxnreg=255,
    )  # fmt: skip
