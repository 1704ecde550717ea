"""The histogram of a problem. It is the CPU engine's: its key of y = value - origin is the bit pattern of
|y| + scale without its low bits, with a sample's median and size as origin and scale: 2**bits bins up to `scale` and in each of
the next four octaves, then 8 an octave to the end of fp32. The low bits (8 of them) are summed beside the count in one 64-bit
integer, so a bin knows the mean of its members; for weights there are two such integers in fixed point. 16-bit values count
under their own bits. All sums of the histogram are integers: the order of the atomics does not matter.

Bins wider than the values differ cannot tell them apart. For values far out, and where few bins are occupied or some are too wide
for what lies in them, the smallest and the largest key of each bin are kept too: a bin whose two are equal stands for one value,
exactly. The others are split into parts, by the weight in them, and all is counted again, up to ROUNDS times. The launches of
these rounds are made in any case, and do nothing for problems that need none.
"""

import triton
import triton.language as tl

from ..worklist import COUNT, VALUES, WEIGHT, address, number
from .solve import of_sort_key, sort_key

COUNT_TILE = 4096
CHUNK = 1024  # bins that are looked at at a time
PART = 32  # as in rows.py, where registers are scarcer
SAMPLE: tl.constexpr = tl.constexpr(4096)
FAR_LOW: tl.constexpr = tl.constexpr(20)  # low bits of a key beyond the fine octaves: 2**3 bins an octave
FAR_FIRST: tl.constexpr = tl.constexpr(40)  # the five fine octaves, in these bins
FAR_STEP: tl.constexpr = tl.constexpr(1 << 20)
FAR_END: tl.constexpr = tl.constexpr(255 << 3)  # beyond fp32
FAR_BINS: tl.constexpr = tl.constexpr(1792)  # 224 octaves
FIELD: tl.constexpr = tl.constexpr(36)  # bits of the sum of low bits: 2**28 values of 8 bits
ONE: tl.constexpr = tl.constexpr(1 << 36)
ROUNDS: tl.constexpr = tl.constexpr(2)  # in which bins that are too wide are split
HALF_KEYS: tl.constexpr = tl.constexpr(65536)
OFTEN: tl.constexpr = tl.constexpr(64)  # a share of the values that is worth being added up before it is counted

# What can be wrong with a problem: bits of its status. Up to WEIGHTS_ZERO they are faults of the input.
VALUES_NOT_FINITE: tl.constexpr = tl.constexpr(1)
WEIGHTS_NOT_FINITE: tl.constexpr = tl.constexpr(2)
WEIGHTS_NEGATIVE: tl.constexpr = tl.constexpr(4)
WEIGHTS_ZERO: tl.constexpr = tl.constexpr(8)
UNRESOLVED: tl.constexpr = tl.constexpr(16)  # the histogram cannot tell the values apart: to be solved by other means


@triton.jit
def _key_of(x, origin, scale, BITS: tl.constexpr):
    """Of fp32 values: bin counted from the origin (5 << BITS or more where the value is far out or not finite), bits of
    |x - origin| + scale that it was cut from, and -1 or 0 for the side."""
    LOW: tl.constexpr = 23 - BITS
    y = x - origin
    u = (tl.abs(y) + scale).to(tl.int32, bitcast=True)
    return (u >> LOW) - (scale.to(tl.int32, bitcast=True) >> LOW), u, y.to(tl.int32, bitcast=True) >> 31


@triton.jit
def _bin_of(x, origin, scale, BITS: tl.constexpr):
    """Bin of each finite fp32 value, in the order of the values, 8 bits of its position inside, and whether it is far out."""
    NEAR: tl.constexpr = 5 << BITS
    near, u, side = _key_of(x, origin, scale, BITS)
    far = NEAR + (u >> FAR_LOW) - (scale.to(tl.int32, bitcast=True) >> FAR_LOW) - FAR_FIRST
    is_far = near >= NEAR
    place = tl.where(is_far, u >> (FAR_LOW - 8), u >> (15 - BITS)) & 255
    return NEAR + FAR_BINS + (tl.where(is_far, far, near) ^ side), place, is_far


@triton.jit
def _half_bin_of(raw):
    """Bin of 16-bit floats given as int16: the order of the values, both zeros in bin 32768."""
    size = raw.to(tl.int32) & 0x7FFF
    return tl.where(raw < 0, 32768 - size, 32768 + size), size


@triton.jit
def sample_kernel(table_ptr, frame_ptr, middle_ptr, BITS: tl.constexpr):
    """For each problem of fp32 values: origin and scale (P, 2) fp32, and the bin of the median where it is frequent, else -1."""
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
    bin, _, _ = _bin_of(x, origin, scale, BITS)
    often = tl.sum((inside & (bin == middle)).to(tl.int32), 0) * OFTEN > tl.sum(inside.to(tl.int32), 0)
    tl.store(middle_ptr + problem, tl.where(often, middle, -1))


@triton.jit
def sample_half_kernel(table_ptr, middle_ptr):
    """For each problem of 16-bit values: the bin of zero where zeros are frequent, else -1."""
    problem = tl.program_id(0).to(tl.int64)
    count = number(table_ptr, problem, COUNT)
    at = tl.arange(0, SAMPLE) * ((count + SAMPLE - 1) // SAMPLE)
    inside = at < count
    bin, _ = _half_bin_of(tl.load(address(table_ptr, problem, VALUES, tl.int16) + at, mask=inside, other=0))
    often = tl.sum((inside & (bin == 32768)).to(tl.int32), 0) * OFTEN > tl.sum(inside.to(tl.int32), 0)
    tl.store(middle_ptr + problem, tl.where(often, 32768, -1))


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
    """Shift of a mantissa at bit 38, down from which integers of `count` weights add up to less than 2**62; see _weight."""
    size = (count.to(tl.float64).to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022
    return tl.maximum(largest >> 23, 1) + 1 + size


@triton.jit
def _weight(w, down):
    """Weights (fp32, not negative) in fixed point, int64: their mantissa, the further down the smaller they are."""
    bits = w.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0)
    shift = tl.minimum(tl.maximum(down - tl.maximum(exponent, 1), 0), 63)
    return (mantissa.to(tl.int64) << 38) >> shift.to(tl.int64)


@triton.jit
def _moment(weight, place):
    """weight * (place + 0.5) / 256, rounded down; place: 8 bits."""
    factor = ((2 * place + 1) << 23).to(tl.uint32, bitcast=True).to(tl.int64)
    return (weight >> 32) * factor + (((weight & 0xFFFFFFFF) * factor) >> 32)


@triton.jit
def _add(bins_ptr, bins, bin, place, w, down, good, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, MOMENTS: tl.constexpr):
    """Counts values in their bins, those that are `good` where MASKED."""
    if WEIGHTED:
        weight = _weight(w, down)
        if MASKED:
            good = good & (weight > 0)
            tl.atomic_add(bins_ptr + bin, weight, mask=good, sem="relaxed")
            if MOMENTS:
                tl.atomic_add(bins_ptr + bins + bin, _moment(weight, place), mask=good, sem="relaxed")
        else:
            tl.atomic_add(bins_ptr + bin, weight, sem="relaxed")
            if MOMENTS:
                tl.atomic_add(bins_ptr + bins + bin, _moment(weight, place), sem="relaxed")
    else:
        if MASKED:
            tl.atomic_add(bins_ptr + bin, place.to(tl.int64) + ONE, mask=good, sem="relaxed")
        else:
            tl.atomic_add(bins_ptr + bin, place.to(tl.int64) + ONE, sem="relaxed")


@triton.jit
def _add_often(bins_ptr, bins, middle, place, w, down, often, WEIGHTED: tl.constexpr, MOMENTS: tl.constexpr):
    """Counts those values that are `often`, all of bin `middle`, by one addition: zeros of a pruned tensor, say."""
    if WEIGHTED:
        weight = tl.where(often, _weight(w, down), 0)
        tl.atomic_add(bins_ptr + middle, tl.sum(weight, 0), sem="relaxed")
        if MOMENTS:
            tl.atomic_add(bins_ptr + bins + middle, tl.sum(_moment(weight, place), 0), sem="relaxed")
    else:
        tl.atomic_add(bins_ptr + middle, tl.sum(tl.where(often, place.to(tl.int64) + ONE, 0), 0), sem="relaxed")


@triton.jit
def _note_ends(ends_ptr, bins, bin, x, noted):
    """Keeps the largest sort key of each bin, and the largest of 2**32 - key."""
    key = sort_key(x)
    high = noted & (tl.load(ends_ptr + bin, mask=noted, other=0) < key)
    tl.atomic_max(ends_ptr + bin, key, mask=high, sem="relaxed")
    key = 4294967296 - key
    high = noted & (tl.load(ends_ptr + bins + bin, mask=noted, other=0) < key)
    tl.atomic_max(ends_ptr + bins + bin, key, mask=high, sem="relaxed")


@triton.jit
def _count_tile(
    table_ptr, problem, tile, frame_ptr, middle, largest_ptr, status_ptr, bins_ptr, ends_ptr, bins,
    DTYPE: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile; WHOLE: all of it lies inside."""
    FLOAT: tl.constexpr = tl.float32 == DTYPE
    count = number(table_ptr, problem, COUNT)
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    values_ptr = address(table_ptr, problem, VALUES, tl.float32 if FLOAT else tl.int16)
    weight_ptr = address(table_ptr, problem, WEIGHT, tl.float32)
    inside = at < count
    w, down = 0.0, 0
    if WEIGHTED:
        down = _fixed_point(tl.load(largest_ptr + problem), count)
        w = tl.load(weight_ptr + at) if WHOLE else tl.load(weight_ptr + at, mask=inside, other=0.0)
    x = tl.load(values_ptr + at) if WHOLE else tl.load(values_ptr + at, mask=inside, other=0)
    beyond_key: tl.constexpr = 5 << BITS if FLOAT else 0x7F80 if tl.bfloat16 == DTYPE else 0x7C00
    if FLOAT:
        origin, scale = tl.load(frame_ptr + 2 * problem), tl.load(frame_ptr + 2 * problem + 1)
        key, u, side = _key_of(x, origin, scale, BITS)
        place = (u >> (15 - BITS)) & 255
        bin = beyond_key + FAR_BINS + (key ^ side)
    else:
        bin, key = _half_bin_of(x)
        place = tl.zeros((TILE,), tl.int32)
    if not WHOLE:
        key = tl.where(inside, key, 0)
    beyond = key >= beyond_key
    rare = tl.max(key, 0) >= beyond_key
    if WHOLE & (rare == 0) & (middle < 0):
        _add(bins_ptr, bins, bin, place, w, down, inside, False, WEIGHTED, FLOAT)
    else:
        good = inside & (beyond == 0)
        _add(bins_ptr, bins, bin, place, w, down, good & (bin != middle), True, WEIGHTED, FLOAT)
        if middle >= 0:
            _add_often(bins_ptr, bins, middle, place, w, down, good & (bin == middle), WEIGHTED, FLOAT)
        if rare:
            if FLOAT:
                finite = tl.abs(x) <= 3.4028234e38
                bin, place, _ = _bin_of(tl.where(finite, x, 0.0), origin, scale, BITS)
                _add(bins_ptr, bins, bin, place, w, down, beyond & finite, True, WEIGHTED, FLOAT)
                _note_ends(ends_ptr, bins, bin, x, beyond & finite)
                beyond = beyond & (finite == 0)
            if tl.max(beyond.to(tl.int32), 0) > 0:
                tl.atomic_or(status_ptr + problem, VALUES_NOT_FINITE)


@triton.jit
def count_kernel(
    table_ptr, problem_ptr, tile_ptr, frame_ptr, middle_ptr, largest_ptr, status_ptr, bins_ptr, ends_ptr, bins,
    DTYPE: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Counts one tile into the bins (P, 1 or 2, bins) int64 of its problem, and notes the ends of bins far out.

    ends (P, 2, bins) int64: the largest sort key, and the largest of 2**32 - key, of the values of a bin, 0 where none is noted.
    """
    i = tl.program_id(0).to(tl.int64)
    problem, tile = tl.load(problem_ptr + i).to(tl.int64), tl.load(tile_ptr + i)
    middle = tl.load(middle_ptr + problem)
    bins_ptr += problem * bins * (2 if WEIGHTED else 1)
    ends_ptr += problem * 2 * bins
    if (tile + 1).to(tl.int64) * TILE <= number(table_ptr, problem, COUNT):
        _count_tile(
            table_ptr, problem, tile, frame_ptr, middle, largest_ptr, status_ptr, bins_ptr, ends_ptr, bins,
            DTYPE, BITS, TILE, WEIGHTED, True,
        )  # fmt: skip
    else:
        _count_tile(
            table_ptr, problem, tile, frame_ptr, middle, largest_ptr, status_ptr, bins_ptr, ends_ptr, bins,
            DTYPE, BITS, TILE, WEIGHTED, False,
        )  # fmt: skip


@triton.jit
def _span(scale, i, BITS: tl.constexpr):
    """Of bins i of fp32 values, before any zoom: sizes (fp64, counted from the origin) between which they lie, and the side."""
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
    low64 = low.to(tl.float32, bitcast=True).to(tl.float64) - scale.to(tl.float64)
    return low64, high.to(tl.float32, bitcast=True).to(tl.float64) - scale.to(tl.float64), negative


@triton.jit
def ends_of(ends_ptr, bins, i):
    """The smallest and the largest value of bins i, fp32, and whether they were noted."""
    top, bottom = tl.load(ends_ptr + i), 4294967296 - tl.load(ends_ptr + bins + i)
    return of_sort_key(bottom), of_sort_key(top), top > 0


@triton.jit
def weight_of(bins_ptr, i, WEIGHTED: tl.constexpr):
    """Weight (fp64) of bins i."""
    if WEIGHTED:
        return tl.load(bins_ptr + i).to(tl.float64)
    else:
        return (tl.load(bins_ptr + i) >> FIELD).to(tl.float64)


@triton.jit
def fill_points(
    bins_ptr, ends_ptr, low_ptr, width_ptr, zoomed, origin, scale, i, bins,
    DTYPE: tl.constexpr, BITS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Position (fp64, in the units of the values), weight, and whether it is one value, of bins i; i < bins.

    zoomed: bins were split, and begin at `low` and are of `width`.
    """
    weight = weight_of(bins_ptr, i, WEIGHTED)
    if tl.float32 == DTYPE:
        if WEIGHTED:
            place = tl.load(bins_ptr + bins + i).to(tl.float64)
        else:
            place = ((tl.load(bins_ptr + i) & (ONE - 1)).to(tl.float64) + 0.5 * weight) * 0.00390625
        held = weight > 0
        share = tl.minimum(place / tl.where(held, weight, 1.0), 1.0)
        least, most, noted = ends_of(ends_ptr, bins, i)
        if zoomed:
            low = tl.load(low_ptr + i).to(tl.float64)
            x = low + tl.load(width_ptr + i).to(tl.float64) * tl.where(held, share, 0.0)
            x = tl.where(held, tl.minimum(tl.maximum(x, least.to(tl.float64)), most.to(tl.float64)), low)
        else:
            low, high, negative = _span(scale, i, BITS)
            size = low + (high - low) * tl.where(held, share, tl.where(negative, 1.0, 0.0))
            x = origin.to(tl.float64) + tl.where(negative, -size, size)
        single = noted & (least == most)
        x = tl.where(held & single, most.to(tl.float64), x)
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
def _cube_root(mass, width):
    """(mass * width**2)**(1/3), fp32, 0 where either is 0; density**(1/3) times the width."""
    some = (mass > 0) & (width > 0)
    grown = tl.log2(tl.where(some, mass, 1.0).to(tl.float32)) + 2 * tl.log2(tl.where(some, width, 1.0).to(tl.float32))
    return tl.where(some, tl.exp2(grown / 3), 0.0)


@triton.jit
def _coarse(
    bins_ptr, ends_ptr, scale, bins, K,
    BITS: tl.constexpr, CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Whether bins are so wide that splitting them may lower the error by a share that matters; sum of roots, occupied bins.

    Of a smooth density the best K clusters have the error D / 12 with D = sum(cube_root)**3 / K**2, D / 12 / K each. Splitting a
    bin can pay where its weight * width**2 is no longer small beside D / K, and lowers the error by no more than a twelfth of
    that. ENDS: the ends of all bins are noted.
    """
    none = tl.full((), 0, tl.float64)
    total, limit, loss, occupied = none, none, none, 0
    per_unit = 1 / scale.to(tl.float64)
    for turn in range(2):
        for start in range(0, bins, CHUNK):
            i = start + tl.arange(0, CHUNK)
            at = tl.minimum(i, bins - 1)
            w = tl.where(i < bins, weight_of(bins_ptr, at, WEIGHTED), 0.0)
            least, most, noted = ends_of(ends_ptr, bins, at)
            width = tl.where(noted, most.to(tl.float64) - least.to(tl.float64), 0.0)
            if not ENDS:
                low, high, _ = _span(scale, at, BITS)
                width = tl.where(noted, width, high - low)
            root = _cube_root(w, width * per_unit).to(tl.float64)
            cube = root * root * root
            if turn == 0:
                occupied += tl.sum((w > 0).to(tl.int32), 0)
                total += tl.sum(root, 0)
            else:
                loss += tl.sum(tl.where(cube * K > limit * 1e-3, cube, 0.0), 0)
        limit = total * total * total / (K * K)
    return loss > tl.where(K <= 16, 2e-5, 5e-4) * limit, total, occupied


@triton.jit
def look_kernel(
    frame_ptr, bins_ptr, ends_ptr, zoom_ptr, bins, K, BITS: tl.constexpr, CHUNK: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """zoom (P,) int32 <- 1 where bins of fp32 values are too wide, or so few that there may be few distinct values."""
    problem = tl.program_id(0).to(tl.int64)
    bins_ptr += problem * bins * (2 if WEIGHTED else 1)
    scale = tl.load(frame_ptr + 2 * problem + 1)
    coarse, _, occupied = _coarse(bins_ptr, ends_ptr + problem * 2 * bins, scale, bins, K, BITS, CHUNK, WEIGHTED, False)
    if coarse | (occupied < (1 << BITS)):
        tl.store(zoom_ptr + problem, 1)


@triton.jit
def split_kernel(
    frame_ptr, bins_ptr, ends_ptr, zoom_ptr, first_ptr, map_ptr, low_ptr, width_ptr, bins, K, ROUND: tl.constexpr,
    BITS: tl.constexpr, CHUNK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Splits the bins of a problem where they are still too wide, by density**(1/3): zoom <- ROUND + 1, and the bins are empty.

    first (P, ROUNDS, bins + 16) int32: the first part of each bin, then the number of parts; map (P, ROUNDS, 2, bins) fp32: its
    smallest value, and its parts over its width; low, width (P, bins) fp32: where each part begins, and how wide it is.
    """
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(zoom_ptr + problem) == ROUND:
        bins_ptr += problem * bins * (2 if WEIGHTED else 1)
        ends_ptr += problem * 2 * bins
        first_ptr += (problem * ROUNDS + ROUND - 1) * (bins + 16)
        map_ptr += (problem * ROUNDS + ROUND - 1) * 2 * bins
        low_ptr += problem * bins
        width_ptr += problem * bins
        scale = tl.load(frame_ptr + 2 * problem + 1)
        coarse, total, occupied = _coarse(bins_ptr, ends_ptr, scale, bins, K, BITS, CHUNK, WEIGHTED, True)
        if coarse:
            free = 0.999 * (bins - occupied) / tl.maximum(total, 1e-300)
            parts, end = 0, -3.4028234e38
            for start in range(0, bins, CHUNK):
                i = start + tl.arange(0, CHUNK)
                inside = i < bins
                at = tl.minimum(i, bins - 1)
                w = tl.where(inside, weight_of(bins_ptr, at, WEIGHTED), 0.0)
                least, most, noted = ends_of(ends_ptr, bins, at)
                wide = tl.where(noted, most.to(tl.float64) - least.to(tl.float64), 0.0)
                root = _cube_root(w, wide / scale.to(tl.float64)).to(tl.float64)
                split = tl.where(w > 0, 1 + (root * free).to(tl.int32), 0)
                # Not more parts than floats in between, nor many more than values.
                floats = sort_key(most) - sort_key(least) + 1
                split = tl.minimum(split.to(tl.int64), tl.maximum(floats, 1)).to(tl.int32)
                if not WEIGHTED:
                    split = tl.minimum(split, tl.minimum(4 * w, 1e9).to(tl.int32))
                after = tl.cumsum(split, 0)
                tl.store(first_ptr + i, parts + after - split, mask=inside)
                tl.store(map_ptr + i, least, mask=inside)
                steps = tl.where(wide > 0, tl.minimum(split / tl.maximum(wide, 1e-300), 2.0**126), 0.0)
                tl.store(map_ptr + bins + i, steps.to(tl.float32), mask=inside)
                parts += tl.sum(split, 0)
                end = tl.maximum(end, tl.max(tl.where(w > 0, most, -3.4028234e38), 0))
            tl.store(first_ptr + bins, parts)
            tl.debug_barrier()
            for start in range(0, bins, CHUNK):
                i = start + tl.arange(0, CHUNK)
                below, above = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32) + bins
                while tl.max(above - below, 0) > 1:  # the last bin whose first part is not beyond i
                    half = (below + above) // 2
                    right = tl.load(first_ptr + half) <= i
                    below, above = tl.where(right, half, below), tl.where(right, above, half)
                steps = tl.load(map_ptr + bins + below).to(tl.float64)
                width = tl.where(steps > 0, 1 / tl.maximum(steps, 1e-300), 0.0)
                low = tl.load(map_ptr + below).to(tl.float64) + (i - tl.load(first_ptr + below)) * width
                low = tl.where(i < parts, low, end)
                tl.store(low_ptr + i, low.to(tl.float32), mask=i < bins)
                tl.store(width_ptr + i, width.to(tl.float32), mask=i < bins)
            for start in range(0, bins, CHUNK):
                i = start + tl.arange(0, CHUNK)
                none = tl.zeros((CHUNK,), tl.int64)
                tl.store(bins_ptr + i, none, mask=i < bins)
                if WEIGHTED:
                    tl.store(bins_ptr + bins + i, none, mask=i < bins)
                tl.store(ends_ptr + i, none, mask=i < bins)
                tl.store(ends_ptr + bins + i, none, mask=i < bins)
            tl.store(zoom_ptr + problem, ROUND + 1)


@triton.jit
def zoom_kernel(
    table_ptr, problem_ptr, tile_ptr, frame_ptr, largest_ptr, zoom_ptr, bins_ptr, ends_ptr, first_ptr, map_ptr, bins,
    ROUND: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Counts one tile of fp32 values into bins that were split in ROUND rounds, and notes the ends of all bins; 0: just these."""
    i = tl.program_id(0).to(tl.int64)
    problem = tl.load(problem_ptr + i).to(tl.int64)
    if tl.load(zoom_ptr + problem) > ROUND:
        count = number(table_ptr, problem, COUNT)
        at = tl.load(tile_ptr + i).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < count
        x = tl.load(address(table_ptr, problem, VALUES, tl.float32) + at, mask=inside, other=0.0)
        good = inside & (tl.abs(x) <= 3.4028234e38)
        x = tl.where(good, x, 0.0)
        bin, place, _ = _bin_of(x, tl.load(frame_ptr + 2 * problem), tl.load(frame_ptr + 2 * problem + 1), BITS)
        for turn in tl.static_range(ROUND):
            parts_ptr = first_ptr + (problem * ROUNDS + turn) * (bins + 16) + bin
            part_ptr = map_ptr + (problem * ROUNDS + turn) * 2 * bins + bin
            first, after = tl.load(parts_ptr, mask=good, other=0), tl.load(parts_ptr + 1, mask=good, other=1)
            steps = tl.load(part_ptr + bins, mask=good, other=0.0)
            y = (x - tl.load(part_ptr, mask=good, other=0.0)) * steps
            part = tl.maximum(tl.minimum(y.to(tl.int32), after - first - 1), 0)
            place = tl.minimum(((y - part) * 256).to(tl.int32), 255)
            bin = first + part
        if ROUND > 0:
            w, down = 0.0, 0
            if WEIGHTED:
                down = _fixed_point(tl.load(largest_ptr + problem), count)
                w = tl.load(address(table_ptr, problem, WEIGHT, tl.float32) + at, mask=good, other=0.0)
            _add(bins_ptr + problem * bins * (2 if WEIGHTED else 1), bins, bin, place, w, down, good, True, WEIGHTED, True)
        _note_ends(ends_ptr + problem * 2 * bins, bins, bin, x, good)
