"""From the histogram of a problem to its centroids, and marks on those that may have no member."""

import triton
import triton.language as tl

from ..assign import nearest
from ..worklist import COUNT, FIRST, VALUES, address, number
from .histogram import ROUNDS, UNRESOLVED, WEIGHTS_ZERO, ends_of, fill_points, weight_of
from .solve import MOST_EXACT, solve_points, write_centroids


@triton.jit
def solve_kernel(
    frame_ptr, status_ptr, bins_ptr, ends_ptr, zoom_ptr, low_ptr, width_ptr,
    points_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr,
    centroids_ptr, pivots_ptr, unit_ptr, doubt_ptr, check_ptr, iterations_ptr, bins, K, count, stride_cells, max_iter,
    DTYPE: tl.constexpr, BITS: tl.constexpr, WEIGHTED: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Solves one problem on its bins: centroids (P, K) fp32, pivots (P, 2**LEVELS) fp32, iterations (P,) int64.

    points (P, 4, bins + 16) fp64 and the others are workspace, see solve_points. doubt (P, K), check (P,) mark centroids that may
    have no member.
    """
    KP: tl.constexpr = 1 << LEVELS
    problem = tl.program_id(0).to(tl.int64)
    status = tl.load(status_ptr + problem)
    if status == 0:
        bins_ptr += problem * bins * (2 if WEIGHTED else 1)
        rounds = 0
        if tl.float32 == DTYPE:
            ends_ptr += problem * 2 * bins
            low_ptr += problem * bins
            width_ptr += problem * bins
            rounds = tl.load(zoom_ptr + problem)
        stride = bins + 16
        y_ptr = points_ptr + problem * 4 * stride
        w_ptr, s_ptr, q_ptr = y_ptr + stride, y_ptr + 2 * stride, y_ptr + 3 * stride
        cells_ptr += problem * stride_cells
        cell_ptr += problem * 5 * stride_cells
        grown_ptr += problem * (GROUPS + 16)
        bounds_ptr += problem * (2 * (KP + 2))
        choice_ptr += problem * ((KP + 1) * (stride_cells if KP <= MOST_EXACT else WIDTH))
        best_ptr += problem * WIDTH
        c_ptr += problem * KP
        if tl.float32 == DTYPE:
            origin, scale = tl.load(frame_ptr + 2 * problem), tl.load(frame_ptr + 2 * problem + 1)
        else:
            origin, scale = tl.full((), 0, tl.float32), tl.full((), 1, tl.float32)

        # What there is: total weight, mean, occupied bins, whether all of them hold one value each.
        none = tl.full((), 0, tl.float64)
        total, first = none, none
        blurred = 0
        for start in range(0, bins, CHUNK):
            i = start + tl.arange(0, CHUNK)
            inside = i < bins
            x, w, single = fill_points(
                bins_ptr, ends_ptr, low_ptr, width_ptr, rounds > 1, origin, scale, tl.minimum(i, bins - 1), bins,
                DTYPE, BITS, WEIGHTED,
            )  # fmt: skip
            w = tl.where(inside, w, 0.0)
            total += tl.sum(w, 0)
            first += tl.sum(w * x, 0)
            blurred += tl.sum(((w > 0) & (single == 0)).to(tl.int32), 0)
        if total == 0:
            status |= WEIGHTS_ZERO
        else:
            exact = blurred == 0
            # A power of two as unit: dividing by it is exact, and errors neither overflow nor vanish in fp32.
            mean = first / total
            unit = scale.to(tl.float64)
            if tl.float32 != DTYPE:
                spread = none
                for start in range(0, bins, CHUNK):
                    i = start + tl.arange(0, CHUNK)
                    x, w, _ = fill_points(
                        bins_ptr, ends_ptr, low_ptr, width_ptr, rounds > 1, origin, scale, tl.minimum(i, bins - 1), bins,
                        DTYPE, BITS, WEIGHTED,
                    )  # fmt: skip
                    spread += tl.sum(tl.where(i < bins, w * tl.abs(x - mean), 0.0), 0)
                size = tl.maximum(spread / total, 1e-30)
                unit = ((size.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)
            per_unit = 1.0 / unit
            mean = mean * per_unit
            w0, s0, q0, largest = none, none, none, none
            tl.store(w_ptr, none)
            tl.store(s_ptr, none)
            tl.store(q_ptr, none)
            for start in range(0, bins, CHUNK):
                i = start + tl.arange(0, CHUNK)
                inside = i < bins
                x, w, _ = fill_points(
                    bins_ptr, ends_ptr, low_ptr, width_ptr, rounds > 1, origin, scale, tl.minimum(i, bins - 1), bins,
                    DTYPE, BITS, WEIGHTED,
                )  # fmt: skip
                y = x * per_unit
                w = tl.where(inside, w / total, 0.0)
                off = y - mean
                largest = tl.maximum(largest, tl.max(tl.where(w > 0, tl.abs(off), 0.0), 0))
                w_sum, s_sum, q_sum = tl.cumsum(w, 0), tl.cumsum(w * off, 0), tl.cumsum(w * off * off, 0)
                tl.store(y_ptr + i, y, mask=inside)
                tl.store(w_ptr + i + 1, w0 + w_sum, mask=inside)
                tl.store(s_ptr + i + 1, s0 + s_sum, mask=inside)
                tl.store(q_ptr + i + 1, q0 + q_sum, mask=inside)
                w0 += tl.sum(w, 0)
                s0 += tl.sum(w * off, 0)
                q0 += tl.sum(w * off * off, 0)
            tl.debug_barrier()
            if largest > 1e15:
                status |= UNRESOLVED
            inside = none
            if rounds > ROUNDS:  # the error that makes what splitting bins once more could take off it a share that matters
                for start in range(0, bins, CHUNK):
                    i = start + tl.arange(0, CHUNK)
                    at = tl.minimum(i, bins - 1)
                    least, most, noted = ends_of(ends_ptr, bins, at)
                    wide = (most.to(tl.float64) - least.to(tl.float64)) * per_unit
                    w = weight_of(bins_ptr, at, WEIGHTED) / total
                    inside += tl.sum(tl.where((i < bins) & noted, w * wide * wide, 0.0), 0)
                inside = inside / tl.where(K <= 16, 6e-4, 1.2e-2)  # a bin has w * wide**2 / 12
            if status == 0:
                iterations, distinct, error = solve_points(
                    y_ptr, w_ptr, s_ptr, q_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr, bins,
                    mean, K, count, stride_cells, max_iter, KP, WIDTH, GROUPS, CHUNK, SPLITS, PART, False,
                )  # fmt: skip
                if inside > error:
                    status |= UNRESOLVED
                if iterations < 0:
                    status |= UNRESOLVED
                tl.store(iterations_ptr + problem, tl.maximum(iterations, 0).to(tl.int64))
                write_centroids(
                    c_ptr, y_ptr, w_ptr, centroids_ptr + problem * K, pivots_ptr + problem * KP, unit_ptr + problem,
                    doubt_ptr + problem * K,
                    check_ptr + problem, unit, per_unit, bins, K, (distinct > K), exact, LEVELS,
                )  # fmt: skip
        if status != 0:
            tl.atomic_or(status_ptr + problem, status)


@triton.jit
def mark_kernel(
    table_ptr, problem_ptr, tile_ptr, pivots_ptr, doubt_ptr, used_ptr, check_ptr, K,
    DTYPE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """used (P, K) <- 1 for centroids in doubt that have a member, in the problems that have such centroids."""
    i = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_ptr + i).to(tl.int64)
    if tl.load(check_ptr + problem) != 0:
        at = tl.load(tile_ptr + i).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < number(table_ptr, problem, COUNT)
        x = tl.load(address(table_ptr, problem, VALUES, DTYPE) + at, mask=inside, other=0.0).to(tl.float32)
        k = nearest(x, pivots_ptr + problem * (1 << LEVELS), LEVELS)
        tl.store(used_ptr + problem * K + k, 1, mask=inside & (tl.load(doubt_ptr + problem * K + k) != 0))


@triton.jit
def finish_kernel(
    table_ptr, unit_ptr, error_ptr, status_ptr, doubt_ptr, used_ptr, check_ptr, inertia_ptr, bound_ptr, K, problems, tiles,
    KP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds the errors of a problem's tiles in their order; a centroid that turned out to have no member makes it unresolved."""
    problem = tl.program_id(0).to(tl.int64)
    begin, end = number(table_ptr, problem, FIRST), tl.full((), tiles, tl.int64)  # `tiles` is a plain 1 where it is 1
    if problem + 1 < problems:
        end = number(table_ptr, problem + 1, FIRST)
    lanes = tl.zeros((CHUNK,), tl.float64)
    for start in range(begin, end, CHUNK):
        i = start + tl.arange(0, CHUNK)
        lanes += tl.load(error_ptr + i, mask=i < end, other=0.0)
    per_unit = tl.load(unit_ptr + problem).to(tl.float64)
    inertia = tl.sum(lanes, 0) / (per_unit * per_unit)
    tl.store(inertia_ptr + problem, inertia)
    tl.store(bound_ptr + problem, tl.where(inertia == 0, 1.0, float("inf")))
    if tl.load(check_ptr + problem) != 0:
        k = tl.arange(0, KP)
        doubt = tl.load(doubt_ptr + problem * K + k, mask=k < K, other=0)
        used = tl.load(used_ptr + problem * K + k, mask=k < K, other=1)
        if tl.max(((doubt != 0) & (used == 0)).to(tl.int32), 0) > 0:
            tl.atomic_or(status_ptr + problem, UNRESOLVED)
