"""All problems of a model at once: histogram, solve, labels, in a fixed number of launches and without a word to the host.

A problem of more than SMALL values is counted in a histogram; a smaller one is sorted by one program (kmeans_rows.py). Both end
in kmeans_solve.py, on points. The histogram is the CPU engine's: its key of y = value - origin is the bit pattern of
|y| + scale without its low bits, with a sample's median and size as origin and scale: 2**bits bins up to `scale` and in each of
the next four octaves, then 8 an octave to the end of fp32. The low bits (8 of them) are summed beside the count in one 64-bit
integer, so a bin knows the mean of its members; for weights there are two such integers in fixed point. 16-bit values count
under their own bits. All sums of the histogram are integers: the order of the atomics does not matter.

Bins wider than the values differ cannot tell few distinct values apart. Where few bins are occupied, and for values far out,
the smallest and the largest key of each bin are kept too: a bin whose two are equal stands for one value, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK, row_bytes
from . import worklist
from .assign import TILE, assign_kernel, levels_of, nearest
from .dequantize import on_device
from .kmeans_rows import PROGRAMS, SMALL, SPLITS, launch_rows, part_for
from .kmeans_solve import MOST_EXACT, of_sort_key, solve_points, sort_key, write_centroids
from .worklist import COUNT, FIRST, VALUES, WEIGHT, address, number, tile_list

COUNT_TILE = 4096
PART = 32  # as in kmeans_rows.py, where registers are scarcer
SAMPLE: tl.constexpr = tl.constexpr(4096)
FAR_LOW: tl.constexpr = tl.constexpr(20)  # low bits of a key beyond the fine octaves: 2**3 bins an octave
FAR_FIRST: tl.constexpr = tl.constexpr(40)  # the five fine octaves, in these bins
FAR_STEP: tl.constexpr = tl.constexpr(1 << 20)
FAR_END: tl.constexpr = tl.constexpr(255 << 3)  # beyond fp32
FAR_BINS: tl.constexpr = tl.constexpr(1792)  # 224 octaves
FIELD: tl.constexpr = tl.constexpr(36)  # bits of the sum of low bits: 2**28 values of 8 bits
ONE: tl.constexpr = tl.constexpr(1 << 36)
MOST_VALUES = 1 << 28
FEW_BINS: tl.constexpr = tl.constexpr(2048)  # fewer occupied bins may mean few distinct values
TOO_FEW_BINS: tl.constexpr = tl.constexpr(1024)  # to resolve the values
HALF_KEYS: tl.constexpr = tl.constexpr(65536)
SCRATCH_BYTES = 1 << 30  # that problems solved at the same time may use

# What can be wrong with a problem: bits of its status. Up to WEIGHTS_ZERO they are faults of the input.
VALUES_NOT_FINITE: tl.constexpr = tl.constexpr(1)
WEIGHTS_NOT_FINITE: tl.constexpr = tl.constexpr(2)
WEIGHTS_NEGATIVE: tl.constexpr = tl.constexpr(4)
WEIGHTS_ZERO: tl.constexpr = tl.constexpr(8)
UNRESOLVED: tl.constexpr = tl.constexpr(16)  # the histogram cannot tell the values apart: to be solved by other means


@triton.jit
def _low_key(x, scale):
    """Bits of |x| + scale: what the key of a value is cut from."""
    return (tl.abs(x) + scale).to(tl.int32, bitcast=True)


@triton.jit
def _bin_of(x, origin, scale, BITS: tl.constexpr):
    """Bin of each fp32 value, in the order of the values, and 8 bits of its position inside."""
    NEAR: tl.constexpr = 5 << BITS
    LOW: tl.constexpr = 23 - BITS
    y = x - origin
    u = _low_key(y, scale)
    base = scale.to(tl.int32, bitcast=True)
    near = (u >> LOW) - (base >> LOW)
    far = NEAR + (u >> FAR_LOW) - (base >> FAR_LOW) - FAR_FIRST
    is_far = near >= NEAR
    key = tl.where(is_far, far, near)
    place = tl.where(is_far, u >> (FAR_LOW - 8), u >> (LOW - 8)) & 255
    return tl.where(y < 0, NEAR + FAR_BINS - 1 - key, NEAR + FAR_BINS + key), place, is_far


@triton.jit
def _half_bin_of(raw):
    """Bin of 16-bit floats given as int16: the order of the values, both zeros in bin 32768."""
    size = raw.to(tl.int32) & 0x7FFF
    return tl.where(raw < 0, 32768 - size, 32768 + size), size


@triton.jit
def sample_kernel(table_ptr, frame_ptr, middle_ptr, BITS: tl.constexpr):
    """For each problem of fp32 values: origin and scale (P, 2) fp32, and the bin of the median."""
    problem = tl.program_id(0).to(tl.int64)
    values_ptr, count = address(table_ptr, problem, VALUES, tl.float32), number(table_ptr, problem, COUNT)
    at = tl.arange(0, SAMPLE) * ((count + SAMPLE - 1) // SAMPLE)
    inside = at < count
    x = tl.load(values_ptr + at, mask=inside, other=0.0)
    x = tl.where(tl.abs(x) <= 3.4028234e38, x, 0.0)  # reported when it is counted
    key = tl.where(inside, sort_key(x), 1 << 33)
    half = (tl.sum(inside.to(tl.int32), 0) + 1) // 2
    found = tl.full((), 0, tl.int64)
    for bit in range(32):  # the largest key with fewer than half of the sample below it
        trial = found + (tl.full((), 1, tl.int64) << (31 - bit))
        found = tl.where(tl.sum((key < trial).to(tl.int32), 0) < half, trial, found)
    median = of_sort_key(found)
    # The square of the mean root: a size that one outlier in the sample hardly moves.
    y = tl.where(inside, tl.abs(x - median), 0.0)
    root = tl.sum(tl.sqrt(y), 0) / tl.maximum(tl.sum((y > 0).to(tl.int32), 0), 1)
    size = root * root
    origin = tl.where(tl.abs(median) < 2 * size, 0.0, median)
    y = tl.where(inside, tl.abs(x - origin), 0.0)
    root = tl.sum(tl.sqrt(y), 0) / tl.maximum(tl.sum((y > 0).to(tl.int32), 0), 1)
    above = ((3 * root * root).to(tl.int32, bitcast=True) >> 23) + 1  # exponent of the next power of two
    scale = (tl.minimum(tl.maximum(above, 27), 247) << 23).to(tl.float32, bitcast=True)
    tl.store(frame_ptr + 2 * problem, origin)
    tl.store(frame_ptr + 2 * problem + 1, scale)
    middle, _, _ = _bin_of(median, origin, scale, BITS)
    tl.store(middle_ptr + problem, middle)


@triton.jit
def weight_kernel(table_ptr, problem_ptr, tile_ptr, largest_ptr, status_ptr, TILE: tl.constexpr):
    """largest (P,) int32: the bits of the largest weight; faults of the weights."""
    i = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_ptr + i).to(tl.int64)
    at = tl.load(tile_ptr + i).to(tl.int64) * TILE + tl.arange(0, TILE)
    w = tl.load(address(table_ptr, problem, WEIGHT, tl.float32) + at, mask=at < number(table_ptr, problem, COUNT), other=0.0)
    finite = tl.abs(w) <= 3.4028234e38
    fault = tl.where(finite, tl.where(w < 0, WEIGHTS_NEGATIVE, 0), WEIGHTS_NOT_FINITE)
    if tl.max(fault, 0) > 0:
        tl.atomic_or(status_ptr + problem, tl.max(fault & WEIGHTS_NEGATIVE, 0) | tl.max(fault & WEIGHTS_NOT_FINITE, 0))
    largest = tl.max(tl.where(finite & (w > 0), w, 0.0), 0)
    tl.atomic_max(largest_ptr + problem, largest.to(tl.int32, bitcast=True))


@triton.jit
def _fixed_point(largest, count):
    """The power of two (fp64) that makes integers of weights, so that `count` of them add up to less than 2**62."""
    exponent = 61 - ((largest >> 23) - 126)
    size = count.to(tl.float64).to(tl.int64, bitcast=True) >> 52
    exponent = exponent - (size.to(tl.int32) - 1022)
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def count_kernel(
    table_ptr, problem_ptr, tile_ptr, frame_ptr, middle_ptr, largest_ptr, status_ptr, bins_ptr, ends_ptr, bins,
    DTYPE: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Counts one tile into the bins (P, 1 or 2, bins) int64 of its problem; with ENDS, the ends of all bins, where asked for.

    ends (P, 2, bins) int64: the largest sort key, and the largest of 2**32 - key, of the values of a bin, 0 where none is noted.
    """
    i = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_ptr + i).to(tl.int64)
    middle = tl.load(middle_ptr + problem)
    if (middle < 0) == ENDS:
        count = number(table_ptr, problem, COUNT)
        at = tl.load(tile_ptr + i).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < count
        ends_ptr += problem * 2 * bins
        if tl.float32 == DTYPE:
            origin, scale = tl.load(frame_ptr + 2 * problem), tl.load(frame_ptr + 2 * problem + 1)
            x = tl.load(address(table_ptr, problem, VALUES, tl.float32) + at, mask=inside, other=0.0)
            finite = tl.abs(x) <= 3.4028234e38
            good = inside & finite
            bin, place, far = _bin_of(tl.where(finite, x, 0.0), origin, scale, BITS)
            noted = good & far
            if ENDS:
                noted = good
            if tl.max(noted.to(tl.int32), 0) > 0:
                key = sort_key(x)
                high = noted & (tl.load(ends_ptr + bin, mask=noted, other=0) < key)
                tl.atomic_max(ends_ptr + bin, key, mask=high, sem="relaxed")
                key = 4294967296 - key
                high = noted & (tl.load(ends_ptr + bins + bin, mask=noted, other=0) < key)
                tl.atomic_max(ends_ptr + bins + bin, key, mask=high, sem="relaxed")
        else:
            raw = tl.load(address(table_ptr, problem, VALUES, tl.int16) + at, mask=inside, other=0)
            bin, size = _half_bin_of(raw)
            finite = size < (0x7F80 if tl.bfloat16 == DTYPE else 0x7C00)
            good = inside & finite
            place = tl.zeros((TILE,), tl.int32)
        if not ENDS:
            if tl.max((inside & (finite == 0)).to(tl.int32), 0) > 0:
                tl.atomic_or(status_ptr + problem, VALUES_NOT_FINITE)
            often = good & (bin == middle)  # zeros of a pruned tensor, say: one addition for all of them
            others = good & (bin != middle)
            if WEIGHTED:
                bins_ptr += problem * 2 * bins
                unit = _fixed_point(tl.load(largest_ptr + problem), count)
                w = tl.load(address(table_ptr, problem, WEIGHT, tl.float32) + at, mask=good, other=0.0)
                w = tl.where((w >= 0) & (w <= 3.4028234e38), w, 0.0).to(tl.float64) * unit
                weight = w.to(tl.int64)
                moment = (w * ((place.to(tl.float64) + 0.5) * 0.00390625)).to(tl.int64)
                tl.atomic_add(bins_ptr + bin, weight, mask=others & (weight > 0), sem="relaxed")
                tl.atomic_add(bins_ptr + bins + bin, moment, mask=others & (moment > 0), sem="relaxed")
                tl.atomic_add(bins_ptr + middle, tl.sum(tl.where(often, weight, 0), 0), sem="relaxed")
                tl.atomic_add(bins_ptr + bins + middle, tl.sum(tl.where(often, moment, 0), 0), sem="relaxed")
            else:
                bins_ptr += problem * bins
                one = place.to(tl.int64) + ONE
                tl.atomic_add(bins_ptr + bin, one, mask=others, sem="relaxed")
                tl.atomic_add(bins_ptr + middle, tl.sum(tl.where(often, one, 0), 0), sem="relaxed")


@triton.jit
def _points(bins_ptr, ends_ptr, origin, scale, i, bins, DTYPE: tl.constexpr, BITS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Position (fp64, in the units of the values), weight, and whether it is one value, of bins i; i < bins."""
    if WEIGHTED:
        weight = tl.load(bins_ptr + i).to(tl.float64)
        place = tl.load(bins_ptr + bins + i).to(tl.float64)
    else:
        both = tl.load(bins_ptr + i)
        weight = (both >> FIELD).to(tl.float64)
        place = ((both & (ONE - 1)).to(tl.float64) + 0.5 * weight) * 0.00390625
    if tl.float32 == DTYPE:
        NEAR: tl.constexpr = 5 << BITS
        LOW: tl.constexpr = 23 - BITS
        negative = i < NEAR + FAR_BINS
        key = tl.where(negative, NEAR + FAR_BINS - 1 - i, i - NEAR - FAR_BINS)
        base = scale.to(tl.int32, bitcast=True)
        is_far = key >= NEAR
        far = ((base >> FAR_LOW) + FAR_FIRST + (key - NEAR)) << FAR_LOW
        near = ((base >> LOW) + key) << LOW
        last = 0x7F7FFFFF
        in_range = is_far == 0
        in_range |= (base >> FAR_LOW) + FAR_FIRST + (key - NEAR) < FAR_END
        low = tl.where(in_range, tl.where(is_far, far, near), last)
        high = tl.where(in_range, tl.minimum(low + tl.where(is_far, FAR_STEP, 1 << LOW), last), last)
        low64 = low.to(tl.float32, bitcast=True).to(tl.float64)
        high64 = high.to(tl.float32, bitcast=True).to(tl.float64)
        held = weight > 0
        share = tl.where(held, tl.minimum(place / tl.where(held, weight, 1.0), 1.0), tl.where(negative, 1.0, 0.0))
        size = low64 + (high64 - low64) * share - scale.to(tl.float64)
        x = origin.to(tl.float64) + tl.where(negative, -size, size)
        top, bottom = tl.load(ends_ptr + i), 4294967296 - tl.load(ends_ptr + bins + i)
        single = (top == bottom) & (top > 0)
        x = tl.where(held & single, of_sort_key(top).to(tl.float64), x)
        return x, weight, single | (held == 0)
    else:
        bits = tl.abs(i - 32768)
        if tl.bfloat16 == DTYPE:
            size32 = (bits << 16).to(tl.float32, bitcast=True)
            finite = bits < 0x7F80
        else:
            size32 = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            finite = bits < 0x7C00
        largest = 3.3895313892515355e38 if tl.bfloat16 == DTYPE else 65504.0
        size32 = tl.where(finite, size32, largest)
        return tl.where(i < 32768, -size32, size32).to(tl.float64), weight, finite | True


@triton.jit
def look_kernel(bins_ptr, middle_ptr, bins, CHUNK: tl.constexpr, WEIGHTED: tl.constexpr):
    """Where few bins of fp32 values are occupied, asks for the ends of all bins: middle <- -1."""
    problem = tl.program_id(0).to(tl.int64)
    occupied = 0
    bins_ptr += problem * bins * (2 if WEIGHTED else 1)
    for start in range(0, bins, CHUNK):
        i = start + tl.arange(0, CHUNK)
        occupied += tl.sum((tl.load(bins_ptr + i, mask=i < bins, other=0) != 0).to(tl.int32), 0)
    if occupied < FEW_BINS:
        tl.store(middle_ptr + problem, -1)


@triton.jit
def solve_kernel(
    frame_ptr, status_ptr, bins_ptr, ends_ptr, points_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr,
    c_ptr, centroids_ptr, pivots_ptr, unit_ptr, doubt_ptr, check_ptr, iterations_ptr, bins, K, count, stride_cells, max_iter,
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
        ends_ptr += problem * 2 * bins
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
        total, first, far = none, none, none
        occupied, blurred = 0, 0
        for start in range(0, bins, CHUNK):
            i = start + tl.arange(0, CHUNK)
            inside = i < bins
            x, w, single = _points(bins_ptr, ends_ptr, origin, scale, tl.minimum(i, bins - 1), bins, DTYPE, BITS, WEIGHTED)
            w = tl.where(inside, w, 0.0)
            total += tl.sum(w, 0)
            first += tl.sum(w * x, 0)
            occupied += tl.sum((w > 0).to(tl.int32), 0)
            mixed = (w > 0) & (single == 0)
            blurred += tl.sum(mixed.to(tl.int32), 0)
            if tl.float32 == DTYPE:
                outside = (i < FAR_BINS) | (i >= bins - FAR_BINS)
                far += tl.sum(tl.where(mixed & outside, w, 0.0), 0)
        if total == 0:
            status |= WEIGHTS_ZERO
        else:
            exact = blurred == 0
            if ((exact == 0) & (occupied < TOO_FEW_BINS)) | (far * 1024 > total):
                status |= UNRESOLVED
            # A power of two as unit: dividing by it is exact, and errors neither overflow nor vanish in fp32.
            mean = first / total
            unit = scale.to(tl.float64)
            if tl.float32 != DTYPE:
                spread = none
                for start in range(0, bins, CHUNK):
                    i = start + tl.arange(0, CHUNK)
                    x, w, _ = _points(
                        bins_ptr, ends_ptr, origin, scale, tl.minimum(i, bins - 1), bins, DTYPE, BITS, WEIGHTED
                    )
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
                x, w, _ = _points(bins_ptr, ends_ptr, origin, scale, tl.minimum(i, bins - 1), bins, DTYPE, BITS, WEIGHTED)
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
            if status == 0:
                iterations, distinct = solve_points(
                    y_ptr, w_ptr, s_ptr, q_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr, bins,
                    mean, K, count, stride_cells, max_iter, KP, WIDTH, GROUPS, CHUNK, SPLITS, PART, False,
                )  # fmt: skip
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
    begin, end = number(table_ptr, problem, FIRST), tiles.to(tl.int64)
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


def bits_for(num_centroids: int) -> int:
    """log2 of the bins an octave: a cluster near the mean is some 60 bins wide."""
    return 11 if num_centroids <= 16 else 12


def cells_for(num_centroids: int, small: bool, dtype: torch.dtype) -> int:
    """Half of the cells at most. Of a small problem each value can be one."""
    least = 2048 if small else 1024 if num_centroids > 16 or dtype != torch.float32 else 512
    return min(max(16 * num_centroids, least), 4096)


@dataclass
class _Wave:
    """Problems [begin, begin + P) of a plan, and the workspace they share with the other waves."""

    begin: int
    labels: worklist.WorkList
    tiles: worklist.WorkList  # of the counting passes
    scratch: dict[str, Tensor]


class Plan:
    """All of a clustering but the launches: allocated and listed once, then `launch` any number of times.

    values: contiguous matrices (rows, cols), one dtype (fp32, bf16, fp16), on one device; sample_weight: like them, fp32, or
    None; group_rows rows share a problem. small: problems are solved by one program each, on their sorted values, else by
    histogram. `launch` neither allocates nor asks the host anything, so that a CUDA graph can hold it; it then clusters what
    stands in the same memory. Outputs: labels, one tensor for each matrix; centroids (P, K), inertia, iterations, bound and
    status (P,) for all problems in order; what the bits of a status mean stands above.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        sample_weight: Sequence[Tensor] | None,
        num_centroids: int,
        group_rows: Sequence[int],
        *,
        packed: bool,
        small: bool = False,
        max_iter: int = 300,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.values, self.weights = list(values), None if sample_weight is None else list(sample_weight)
        self.K, self.packed, self.small, self.max_iter = num_centroids, packed, small, max_iter
        self.dtype, self.device, self.levels = values[0].dtype, values[0].device, levels_of(num_centroids)
        rows = torch.tensor([len(matrix) for matrix in values])
        cols = torch.tensor([matrix.shape[1] for matrix in values])
        step = torch.minimum(torch.tensor(list(group_rows)), rows)
        self.groups = (-(-rows // step)).tolist()
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(self.groups))
        first_row = tile_list(torch.tensor(self.groups))[1].long() * step[owner]
        held, cols = torch.minimum(step[owner], rows[owner] - first_row), cols[owner]
        count, problems = held * cols, len(owner)
        width = torch.tensor([row_bytes(m.shape[1], self.levels) if packed else m.shape[1] for m in values])
        self.labels = [m.new_empty((len(m), int(w)), dtype=torch.uint8) for m, w in zip(values, width, strict=True)]
        self.centroids = self._new((problems, num_centroids), torch.float32)
        self.pivots = self._new((problems, 1 << self.levels), torch.float32)
        self.inertia, self.bound = self._new((problems,), torch.float64), self._new((problems,), torch.float64)
        self.iterations, self.status = self._new((problems,), torch.int64), self._new((problems,), torch.int32)
        float_bins = 2 * ((5 << bits_for(num_centroids)) + FAR_BINS.value)
        self.bins = float_bins if self.dtype == torch.float32 else HALF_KEYS.value
        self.cells = cells_for(num_centroids, small, self.dtype)
        self.most_cells = 2 * self.cells + 32
        if small:
            self.bins = max(64, triton.next_power_of_2(int(count.max())))
            self.most_cells = min(self.most_cells, self.bins + 32)
        self.width = 128 if num_centroids <= 32 else 64  # of the windows, in places

        each = self._bytes_each()
        size = min(problems, problems if small else max(1, scratch_bytes // each))
        scratch = self._scratch(size)
        tiles = -(-(held * -(-cols // BLOCK)) // (TILE // BLOCK)) if packed else -(-count // TILE)
        self.waves = []
        for begin in range(0, problems, size):  # as many problems as their workspace allows
            part = slice(begin, begin + size)
            labels, counting = (
                worklist.build(
                    self.values, self.labels, self.weights, count[part], cols[part], owner[part],
                    first_row[part] * cols[part], first_row[part] * width[owner[part]], tiles_of[part],
                )
                for tiles_of in (tiles, -(-count // COUNT_TILE))
            )  # fmt: skip
            self.waves.append(_Wave(begin, labels, counting, scratch))
        self.error = self._new((max(wave.labels.tiles for wave in self.waves),), torch.float64)
        self.longest = int(count.max())
        if self.longest > (SMALL if small else MOST_VALUES):
            raise ValueError(f"values: expected at most {SMALL if small else MOST_VALUES} values a problem, got {self.longest}")

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _bytes_each(self) -> int:
        ends = 16 if self.dtype == torch.float32 else 0
        return self.bins * ((8 if self.weights is None else 16) + ends + 32) + (1 << 19)

    def _scratch(self, P: int) -> dict[str, Tensor]:
        KP = 1 << self.levels
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "marks": ((2, P, self.K), torch.int8),
            "check": ((P,), torch.int32),
            "unit": ((P,), torch.float32),  # its inverse
        }
        solved = min(P, PROGRAMS) if self.small else P
        self.group_count = triton.next_power_of_2(-(-self.bins // 16))
        shapes |= {
            "points": ((solved, 4, self.bins + 16), torch.float64),
            "cells": ((solved, self.most_cells), torch.int32),
            "cell": ((solved, 5, self.most_cells), torch.float64),
            "grown": ((solved, self.group_count + 16), torch.float32),
            "bounds": ((solved, 2, KP + 2), torch.int32),
            "choice": ((solved, KP + 1, self.most_cells if MOST_EXACT.value >= KP else self.width), torch.int16),
            "best": ((solved, self.width), torch.float32),
            "c": ((solved, KP), torch.float64),
        }
        if not self.small:
            shapes |= {
                "bins": ((P, 1 if self.weights is None else 2, self.bins), torch.int64),
                "ends": ((P, 2, self.bins) if self.dtype == torch.float32 else (1,), torch.int64),
                "frame": ((P, 2), torch.float32),
                "middle": ((P,), torch.int32),
                "largest": ((P,), torch.int32),
            }
        return {name: self._new(*shape) for name, shape in shapes.items()}

    def launch(self) -> None:
        """Clusters: kernels and fills on the current stream, nothing else."""
        with on_device(self.status):
            self.status.zero_()
            for wave in self.waves:
                for name in ("marks", "check", "bins", "ends", "largest"):
                    if name in wave.scratch:
                        wave.scratch[name].zero_()
                (self._sort if self.small else self._count)(wave)
                self._label(wave)

    def _part(self, wave: _Wave) -> list[Tensor]:
        end = wave.begin + len(wave.labels.table)
        whole = self.status, self.centroids, self.pivots, self.iterations, self.inertia, self.bound
        return [tensor[wave.begin : end] for tensor in whole]

    def _sort(self, wave: _Wave) -> None:
        status, centroids, pivots, iterations, _, _ = self._part(wave)
        launch_rows(
            wave.labels.table, status, centroids, pivots, wave.scratch["unit"], wave.scratch["marks"][0],
            wave.scratch["check"], iterations, wave.scratch, dtype=self.dtype,
            weighted=self.weights is not None, num_centroids=self.K, size=self.bins,
            count=self.cells, most_cells=self.most_cells, width=self.width, max_iter=self.max_iter,
        )  # fmt: skip

    def _count(self, wave: _Wave) -> None:
        status, centroids, pivots, iterations, _, _ = self._part(wave)
        scratch, table, tiles, P = wave.scratch, wave.labels.table, wave.tiles, len(wave.labels.table)
        weighted, floats = self.weights is not None, self.dtype == torch.float32
        dtype, bits = worklist.DTYPES[self.dtype], bits_for(self.K)
        frame, middle, largest, bins, ends = (scratch[name] for name in ("frame", "middle", "largest", "bins", "ends"))
        if floats:
            sample_kernel[(P,)](table, frame, middle, BITS=bits, num_warps=8)
        else:
            middle.fill_(HALF_KEYS.value // 2)
        if weighted:
            weight_kernel[(tiles.tiles,)](table, tiles.problem, tiles.tile, largest, status, TILE=COUNT_TILE, num_warps=8)
        count = (table, tiles.problem, tiles.tile, frame, middle, largest, status, bins, ends, self.bins)
        flags = {"DTYPE": dtype, "BITS": bits, "TILE": COUNT_TILE, "WEIGHTED": weighted, "num_warps": 8}
        count_kernel[(tiles.tiles,)](*count, ENDS=False, **flags)
        if floats:
            look_kernel[(P,)](bins, middle, self.bins, CHUNK=4096, WEIGHTED=weighted, num_warps=8)
            count_kernel[(tiles.tiles,)](*count, ENDS=True, **flags)
        work = [scratch[name] for name in ("points", "cells", "cell", "grown", "bounds", "choice", "best", "c")]
        solve_kernel[(P,)](
            frame, status, bins, ends, *work, centroids, pivots, scratch["unit"], scratch["marks"][0], scratch["check"],
            iterations, self.bins,
            self.K, self.cells, self.most_cells, self.max_iter, DTYPE=dtype, BITS=bits, WEIGHTED=weighted,
            LEVELS=self.levels, WIDTH=self.width, GROUPS=self.group_count, CHUNK=1024, SPLITS=SPLITS, PART=part_for(PART, bins),
            num_warps=8, maxnreg=255,
        )  # fmt: skip

    def _label(self, wave: _Wave) -> None:
        status, centroids, pivots, _, inertia, bound = self._part(wave)
        labels, (doubt, used), check = wave.labels, wave.scratch["marks"], wave.scratch["check"]
        assign_kernel[(labels.tiles,)](
            labels.table, labels.problem, labels.tile, pivots, centroids, wave.scratch["unit"], self.error, self.K,
            DTYPE=worklist.DTYPES[self.dtype], LEVELS=self.levels, TILE=TILE, PACKED=self.packed, ERROR=True,
            WEIGHTED=self.weights is not None, num_warps=4 if self.packed else 8,
        )  # fmt: skip
        mark_kernel[(wave.tiles.tiles,)](
            labels.table, wave.tiles.problem, wave.tiles.tile, pivots, doubt, used, check, self.K,
            DTYPE=worklist.DTYPES[self.dtype], LEVELS=self.levels, TILE=COUNT_TILE, num_warps=8,
        )  # fmt: skip
        finish_kernel[(len(labels.table),)](
            labels.table, wave.scratch["unit"], self.error, status, doubt, used, check, inertia, bound, self.K,
            len(labels.table), labels.tiles,
            KP=1 << self.levels, CHUNK=256, num_warps=4,
        )  # fmt: skip


def fault_of(status: int) -> int:
    """The number of the first fault in a status, as kmq::kmeans returns it: 0 for none, UNRESOLVED_FAULT for unresolved."""
    for fault, bit in enumerate((VALUES_NOT_FINITE, WEIGHTS_NOT_FINITE, WEIGHTS_NEGATIVE, WEIGHTS_ZERO, UNRESOLVED), 1):
        if status & bit.value:
            return fault
    return 0


UNRESOLVED_FAULT = 5


def kmeans(
    values: Sequence[Tensor],
    sample_weight: Sequence[Tensor | None],
    num_centroids: Sequence[int],
    group_rows: Sequence[int],
    packed: bool,
    max_iter: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Clusters matrices (rows, cols) of fp32, bf16 or fp16; group_rows rows share a problem, G for each matrix.

    Returns, for each matrix, labels (packed, or (rows, cols) uint8), centroids (G, K) fp32, inertia, iterations and bound (G,),
    and a fault: 0, or why its other results mean nothing (see fault_of). Matrices alike in dtype, number of centroids, use of
    weights and size of problems share their launches. Asks the host once, at the end.
    """
    classes: dict[tuple[torch.dtype, int, bool, bool], list[int]] = {}
    for i, matrix in enumerate(values):
        small = min(group_rows[i], len(matrix)) * matrix.shape[1] <= SMALL
        classes.setdefault((matrix.dtype, num_centroids[i], sample_weight[i] is not None, small), []).append(i)
    out: list[list[Tensor]] = [[] for _ in values]
    faults = [0] * len(values)
    plans = []
    for (_, count, weighted, small), members in classes.items():
        weights = [sample_weight[i].float().contiguous() for i in members] if weighted else None  # type: ignore[union-attr]
        matrices, groups = [values[i].contiguous() for i in members], [group_rows[i] for i in members]
        plan = Plan(matrices, weights, count, groups, packed=packed, small=small, max_iter=max_iter)
        plan.launch()
        plans.append((plan, members))
    for plan, members in plans:
        parts = [t.split(plan.groups) for t in (plan.centroids, plan.inertia, plan.iterations, plan.bound)]
        status = plan.status.cpu().split(plan.groups)
        for n, i in enumerate(members):
            out[i] = [plan.labels[n], *(part[n] for part in parts)]
            whole = 0
            for bits in status[n].unique().tolist():
                whole |= bits
            faults[i] = fault_of(whole)
    return (*([one[part] for one in out] for part in range(5)), faults)  # type: ignore[return-value]
