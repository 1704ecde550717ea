"""One problem on points, inside one program: cells, a dynamic program over windows, Lloyd on all points.

Points are positions y (n,) that do not descend, with prefix sums (n + 1,) of their weight w, of w * (y - mean) and of
w * (y - mean)**2, all fp64; some may have no weight. Cells of neighbouring points are as on the CPU: half follow the
density**(1/3) rule, half the range; few different points are a cell each.

Up to MOST_EXACT centroids the best partition of the cells is found by dynamic programming. For more it is sought:

1. Start where the integral of density**(1/3) is cut into K equal parts.
2. Move boundaries to where they pay: drop one, split another cluster, as long as the error falls.
3. A dynamic program over windows: each boundary may move to WIDTH places around where it is, all at once, and the best
   combination is taken. The places lie apart by a stride, which goes down by fours. Repeat until nothing moves.
4. Back to 2, until no boundary is worth moving.

From there step 3 on the points themselves, where they are not the cells. The differences in step 3 are taken in fp32, relative
to the mean and the edge of the cluster at hand; all else is fp64.
"""

import triton
import triton.language as tl

MOST_EXACT: tl.constexpr = tl.constexpr(64)  # centroids for which all partitions of the cells are searched
RESOLVED: tl.constexpr = tl.constexpr(2e-11)  # of the second moment: smaller errors drown in the rounding of prefix sums


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _cost(w_ptr, s_ptr, q_ptr, i, j):
    """Squared error of points [i, j) around their mean."""
    weight = tl.load(w_ptr + j) - tl.load(w_ptr + i)
    first = tl.load(s_ptr + j) - tl.load(s_ptr + i)
    second = tl.load(q_ptr + j) - tl.load(q_ptr + i)
    held = weight > 0
    return tl.where(held, tl.maximum(second - first * first / tl.where(held, weight, 1.0), 0.0), 0.0)


@triton.jit
def _grown(grown_ptr, i):
    """The integral of density**(1/3) up to point i."""
    group = i // 16
    before = tl.load(grown_ptr + group)
    return before + (tl.load(grown_ptr + group + 1) - before) * ((i % 16).to(tl.float32) * 0.0625)


@triton.jit
def _count_distinct(y_ptr, w_ptr, n, CHUNK: tl.constexpr, RUNS: tl.constexpr):
    """Indices of the first and the last point with weight, and how many have weight; with RUNS, how many different ones."""
    first, last, distinct = n, -1, 0
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        inside = i < n
        used = inside & (tl.load(w_ptr + i + 1, mask=inside, other=0.0) > tl.load(w_ptr + i, mask=inside, other=0.0))
        new = used
        if RUNS:
            before = tl.load(y_ptr + tl.maximum(i - 1, 0), mask=inside, other=0.0)
            new = used & ((tl.load(y_ptr + i, mask=inside, other=0.0) > before) | (i == 0))
        first = tl.minimum(first, tl.min(tl.where(used, i, n), 0))
        last = tl.maximum(last, tl.max(tl.where(used, i, -1), 0))
        distinct += tl.sum(new.to(tl.int32), 0)
    return first, last, distinct


@triton.jit
def _make_cells(
    y_ptr, w_ptr, cells_ptr, grown_ptr, n, count, every, y_first, y_last, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Writes the first point of each cell, then n; returns the number of cells and the integral of density**(1/3)."""
    group = tl.arange(0, GROUPS)
    low, high = tl.minimum(group * 16, n), tl.minimum(group * 16 + 16, n)
    mass = tl.load(w_ptr + high) - tl.load(w_ptr + low)
    width = tl.load(y_ptr + tl.minimum(high, n - 1)) - tl.load(y_ptr + tl.minimum(low, n - 1))
    some = (mass > 0) & (width > 0)
    grow = (tl.log2(tl.where(some, mass, 1.0).to(tl.float32)) + 2 * tl.log2(tl.where(some, width, 1.0).to(tl.float32))) / 3
    most = tl.max(tl.where(some, grow, -1e30), 0)
    grow = tl.where(some, tl.exp2(grow - most), 0.0)
    total = tl.maximum(tl.sum(grow, 0), 1e-30)
    for _ in range(4):  # a gap before an outlier needs a few cells, not most of them
        grow = tl.minimum(grow, total * (16.0 / count))
        total = tl.maximum(tl.sum(grow, 0), 1e-30)
    tl.store(grown_ptr, 0.0)
    tl.store(grown_ptr + 1 + group, tl.cumsum(grow, 0))
    tl.debug_barrier()
    by_density = count / total
    by_range = tl.where(y_last > y_first, count / tl.maximum(y_last - y_first, 1e-300), 0.0)
    cells, top = 0, -1
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        inside = i < n
        before = tl.maximum(i - 1, 0)
        w_before = tl.load(w_ptr + before, mask=inside, other=0.0)
        w_here = tl.load(w_ptr + i, mask=inside, other=0.0)
        y_before, y_here = tl.load(y_ptr + before, mask=inside, other=0.0), tl.load(y_ptr + i, mask=inside, other=0.0)
        used = inside & (tl.load(w_ptr + i + 1, mask=inside, other=0.0) > w_here)
        used_before = inside & (i > 0) & (w_here > w_before)
        number = (_grown(grown_ptr, tl.minimum(i, n - 1)) * by_density).to(tl.int32)
        number += tl.minimum(tl.maximum((y_here - y_first) * by_range, 0.0), 1e6).to(tl.int32)
        number_before = (_grown(grown_ptr, tl.minimum(before, n - 1)) * by_density).to(tl.int32)
        number_before += tl.minimum(tl.maximum((y_before - y_first) * by_range, 0.0), 1e6).to(tl.int32)
        passed = tl.where(used_before, number_before, -1)
        seen = tl.maximum(tl.associative_scan(passed, 0, _larger), top)
        opens = used & (number > seen)
        if every:
            opens = used
            if RUNS:
                opens = used & ((y_here > y_before) | (i == 0))
        opened = opens.to(tl.int32)
        tl.store(cells_ptr + cells + tl.cumsum(opened, 0) - 1, i, mask=opens)
        cells += tl.sum(opened, 0)
        top = tl.maximum(top, tl.max(passed, 0))
    tl.store(cells_ptr + cells, n)
    tl.debug_barrier()
    return cells, total


@triton.jit
def _place(bounds_ptr, k, K, m, stride, choice):
    """Where boundary k stands for a choice of its window; the choice may be a block of them."""
    low, high = tl.where(k == K, m, k), tl.where(k == 0, 0, m - (K - k))
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + k) + choice * stride, low), high)


@triton.jit
def _move_in_windows(
    w_ptr, s_ptr, q_ptr, bounds_ptr, next_ptr, choice_ptr, best_ptr, m, K, stride, KP: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The best combination of one place out of each window; returns how many boundaries moved."""
    choice = tl.arange(0, WIDTH)
    offset = choice - WIDTH // 2
    SPAN: tl.constexpr = min(PART, WIDTH)
    part = tl.arange(0, SPAN)
    best = tl.zeros((WIDTH,), tl.float32)
    for k in range(1, K + 1):
        tl.store(best_ptr + choice, best)
        tl.debug_barrier()
        left, right = tl.load(bounds_ptr + k - 1), tl.load(bounds_ptr + k)
        w0, s0, q0 = tl.load(w_ptr + right), tl.load(s_ptr + right), tl.load(q_ptr + right)
        c = (s0 - tl.load(s_ptr + left)) / tl.maximum(w0 - tl.load(w_ptr + left), 1e-300)
        b = _place(bounds_ptr, k, K, m, stride, offset)
        wb, sb = tl.load(w_ptr + b) - w0, tl.load(s_ptr + b) - s0
        qb = ((tl.load(q_ptr + b) - q0) - c * (2 * sb - c * wb)).to(tl.float32)
        sb, wb = (sb - c * wb).to(tl.float32), wb.to(tl.float32)
        best = tl.full((WIDTH,), 2e38, tl.float32)
        chosen = tl.zeros((WIDTH,), tl.int32)
        for start in range(0, WIDTH, SPAN):  # all pairs at once would not fit into the registers
            a = _place(bounds_ptr, k - 1, K, m, stride, start + part - WIDTH // 2)
            wa, sa = tl.load(w_ptr + a) - w0, tl.load(s_ptr + a) - s0
            qa = ((tl.load(q_ptr + a) - q0) - c * (2 * sa - c * wa)).to(tl.float32)
            sa, wa = (sa - c * wa).to(tl.float32), wa.to(tl.float32)
            weight, first = wb[None, :] - wa[:, None], sb[None, :] - sa[:, None]
            cost = qb[None, :] - qa[:, None] - tl.where(weight > 0, first * first / tl.where(weight > 0, weight, 1.0), 0.0)
            cost = tl.where(a[:, None] < b[None, :], tl.maximum(cost, 0.0), 1e38)
            least, which = tl.min(tl.load(best_ptr + start + part)[:, None] + cost, 0, return_indices=True)
            chosen = tl.where(least < best, start + which, chosen)
            best = tl.minimum(best, least)
        tl.store(choice_ptr + k * WIDTH + choice, chosen.to(tl.int16))
        best = tl.minimum(best - tl.min(best, 0), 1e38)
        tl.debug_barrier()
    tl.debug_barrier()
    taken = 0
    for back in range(K):
        k = K - back
        taken = tl.load(choice_ptr + k * WIDTH + taken).to(tl.int32)
        tl.store(next_ptr + k - 1, _place(bounds_ptr, k - 1, K, m, stride, taken - WIDTH // 2))
    tl.debug_barrier()
    k = tl.arange(0, KP)
    old, new = tl.load(bounds_ptr + k, mask=k < K, other=0), tl.load(next_ptr + k, mask=k < K, other=0)
    tl.debug_barrier()
    tl.store(bounds_ptr + k, new, mask=k < K)
    tl.debug_barrier()
    return tl.sum((old != new).to(tl.int32), 0)


@triton.jit
def _move_where_it_pays(w_ptr, s_ptr, q_ptr, bounds_ptr, K, KP: tl.constexpr, SPLITS: tl.constexpr):
    """Drops a boundary and splits another cluster while that lowers the error; returns how often it did."""
    k = tl.arange(0, KP)
    part = tl.arange(0, SPLITS)
    moves = 0
    pays = K >= 3
    while pays:
        begin = tl.load(bounds_ptr + k, mask=k < K, other=0)
        end = tl.load(bounds_ptr + k + 1, mask=k < K, other=0)
        after = tl.load(bounds_ptr + k + 2, mask=k < K - 1, other=0)
        whole = _cost(w_ptr, s_ptr, q_ptr, begin, end)
        loss = _cost(w_ptr, s_ptr, q_ptr, begin, after) - whole - _cost(w_ptr, s_ptr, q_ptr, end, after)
        at = begin[:, None] + tl.maximum((end - begin)[:, None] * (part + 1)[None, :] // (SPLITS + 1), 1)
        at = tl.minimum(at, end[:, None])  # at the end of a cluster of one cell, nothing is gained
        gains = whole[:, None] - _cost(w_ptr, s_ptr, q_ptr, begin[:, None], at) - _cost(w_ptr, s_ptr, q_ptr, at, end[:, None])
        gains = tl.where((k < K)[:, None] & (at < end[:, None]), gains, -1.0)
        gain = tl.max(gains, 1)
        split = tl.argmax(gain, 0)
        most = tl.max(gain, 0)
        cut = tl.max(tl.where((k == split)[:, None] & (gains == most), at, -1))
        loss = tl.where((k < K - 1) & (k != split) & (k != split - 1), loss, 1e300)
        drop = tl.argmin(loss, 0)
        pays = (most > tl.min(loss, 0) * (1 + 1e-7)) & (most > 0) & (moves < 4 * K)
        if pays:  # boundary drop + 1 goes, `cut` comes between those of cluster `split`
            to_left, to_right = (k > drop) & (k < split), (k > split + 1) & (k <= drop + 1)
            moved = tl.where(to_left, tl.load(bounds_ptr + k + 1, mask=to_left, other=0), begin)
            moved = tl.where(to_right, tl.load(bounds_ptr + k - 1, mask=to_right, other=0), moved)
            moved = tl.where(k == tl.where(drop < split, split, split + 1), cut, moved)
            tl.debug_barrier()
            tl.store(bounds_ptr + k, moved, mask=k < K)
            tl.debug_barrier()
            moves += 1
    return moves


@triton.jit
def _extend(
    w_ptr, s_ptr, q_ptr, before_ptr, after_ptr, begin_ptr, k, m, first, STEP: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """For ends first, first + STEP, ... (ROWS of them): the least error of the cells before an end in k clusters.

    after (m + 1,) <- that error, begin (m + 1,) <- where the last of the clusters begins; before (m + 1,): the errors in k - 1
    clusters. With APART, ends that are multiples of it have been done, and the others are searched between their neighbours.
    """
    part = tl.arange(0, PART)
    end = first + tl.arange(0, ROWS) * STEP
    wanted = (end >= k) & (end <= m)
    low, high = tl.zeros((ROWS,), tl.int32) + (k - 1), end - 1
    if APART > 0:
        left = end // APART * APART
        wanted = wanted & (left != end)
        low = tl.load(begin_ptr + left, mask=wanted & (left >= k), other=k - 1).to(tl.int32)
        right = wanted & (left + APART <= m)
        high = tl.minimum(tl.load(begin_ptr + left + APART, mask=right, other=32767).to(tl.int32), high)
    end = tl.where(wanted, end, m)
    high = tl.where(wanted, tl.maximum(high, low), low)
    w, s, q = tl.load(w_ptr + end), tl.load(s_ptr + end), tl.load(q_ptr + end)
    best, chosen, start = tl.full((ROWS,), 1e300, tl.float64), low, low
    while tl.max(tl.where(wanted, high - start, -1), 0) >= 0:
        i = tl.minimum(start[:, None] + part[None, :], high[:, None])
        weight = w[:, None] - tl.load(w_ptr + i)
        total = s[:, None] - tl.load(s_ptr + i)
        error = (q[:, None] - tl.load(q_ptr + i)) - total * total / tl.maximum(weight, 1e-300)
        error = tl.load(before_ptr + i) + tl.maximum(error, 0.0)
        least = tl.min(error, 1)
        at = tl.min(tl.where(error == least[:, None], i, 32767), 1)
        chosen = tl.where(least < best, at, chosen)
        best = tl.minimum(best, least)
        start += PART
    tl.store(after_ptr + end, best, mask=wanted)
    tl.store(begin_ptr + end, chosen.to(tl.int16), mask=wanted)
    tl.debug_barrier()


@triton.jit
def _best_partition(w_ptr, s_ptr, q_ptr, error_ptr, begin_ptr, bounds_ptr, m, K, stride, CHUNK: tl.constexpr, PART: tl.constexpr):
    """Writes where the clusters of the best partition of m cells begin, by dynamic programming over all of them.

    Where the last cluster begins does not descend as its end goes up: ends 256 apart are searched in full, the others between
    what their neighbours found. Workspace: error (2, stride) fp64; begin (K, stride) int16.
    """
    for start in range(0, m + 1, CHUNK):
        i = start + tl.arange(0, CHUNK)
        error = _cost(w_ptr, s_ptr, q_ptr, tl.zeros_like(i), tl.minimum(i, m))
        tl.store(error_ptr + i, error, mask=i <= m)
    tl.debug_barrier()
    for k in range(2, K):
        before_ptr, after_ptr = error_ptr + (k % 2) * stride, error_ptr + ((k + 1) % 2) * stride
        row_ptr = begin_ptr + (k - 1) * stride
        for first in range(0, m + 1, 16 * 256):
            _extend(w_ptr, s_ptr, q_ptr, before_ptr, after_ptr, row_ptr, k, m, first, 256, 0, 16, 2 * PART)
        for first in range(0, m + 1, 64 * 16):
            _extend(w_ptr, s_ptr, q_ptr, before_ptr, after_ptr, row_ptr, k, m, first, 16, 256, 64, PART // 2)
        for first in range(0, m + 1, 64):
            _extend(w_ptr, s_ptr, q_ptr, before_ptr, after_ptr, row_ptr, k, m, first, 1, 16, 64, PART // 2)
    tl.store(bounds_ptr, 0)
    tl.store(bounds_ptr + K, m)
    if K >= 2:  # of K clusters, only the end of all is of interest
        before_ptr, after_ptr = error_ptr + (K % 2) * stride, error_ptr + ((K + 1) % 2) * stride
        _extend(w_ptr, s_ptr, q_ptr, before_ptr, after_ptr, begin_ptr + (K - 1) * stride, K, m, m, 256, 0, 16, 2 * PART)
    end = m
    for back in range(K - 1):
        k = K - back
        end = tl.load(begin_ptr + (k - 1) * stride + end).to(tl.int32)
        tl.store(bounds_ptr + k - 1, end)
    tl.debug_barrier()


@triton.jit
def _search_in_windows(
    y_ptr, w_ptr, s_ptr, q_ptr, cells_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, n, m, total, K, KP: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Writes where the clusters of a good partition of m cells begin."""
    k = tl.arange(0, KP)
    target = k.to(tl.float32) * (total / K)
    low = tl.zeros((KP,), tl.int32)
    high = low + m
    while tl.max(high - low, 0) > 0:
        half = (low + high) // 2
        open = low < high
        below = _grown(grown_ptr, tl.minimum(tl.load(cells_ptr + tl.minimum(half, m - 1)), n - 1)) < target
        low, high = tl.where(open & below, half + 1, low), tl.where(open & (below == 0), half, high)
    start_at = tl.associative_scan(tl.where(k == 0, 0, low - k), 0, _larger) + k
    start_at = tl.minimum(start_at, m - (K - k))
    tl.store(bounds_ptr + k, start_at, mask=k < K)
    tl.store(bounds_ptr + K, m)
    tl.debug_barrier()
    widest = 1
    while (widest * WIDTH < m) & (widest * 4 * K < m):
        widest *= 2
    turn, going = 0, True
    while going:
        moves = _move_where_it_pays(w_ptr, s_ptr, q_ptr, bounds_ptr, K, KP, SPLITS)
        going = (turn == 0) | (moves > 0)
        stride, rounds = widest, 0
        while going & (stride > 0):
            moved = _move_in_windows(
                w_ptr, s_ptr, q_ptr, bounds_ptr, bounds_ptr + KP + 2, choice_ptr, best_ptr, m, K, stride, KP, WIDTH, PART
            )
            rounds += 1
            finer = (moved == 0) | (rounds >= 12)
            stride = tl.where(finer, tl.where(stride > 1, tl.maximum(stride // 4, 1), 0), stride)
            rounds = tl.where(finer, 0, rounds)
        turn += 1
        going = going & (turn < 4)


@triton.jit
def count_until(y_ptr, n, middle, near):
    """For each middle, how many points are not above it; `near` is a guess."""
    low, high = tl.maximum(near - 32, 0), tl.minimum(near + 32, n)
    low = tl.where((low > 0) & (tl.load(y_ptr + tl.maximum(low - 1, 0)) > middle), 0, low)
    high = tl.where((high < n) & (tl.load(y_ptr + tl.minimum(high, n - 1)) <= middle), n, high)
    while tl.max(high - low, 0) > 0:
        half = (low + high) // 2
        open = low < high
        below = tl.load(y_ptr + tl.minimum(half, n - 1)) <= middle
        low, high = tl.where(open & below, half + 1, low), tl.where(open & (below == 0), half, high)
    return low


@triton.jit
def _lloyd(y_ptr, w_ptr, s_ptr, c_ptr, edges_ptr, n, mean, K, edges, max_iter, KP: tl.constexpr):
    """Lloyd iterations on all points from a partition, until it stands still; returns centroids (KP,) and iterations."""
    k = tl.arange(0, KP)
    c = tl.zeros((KP,), tl.float64)
    iterations = 0
    going = True
    while going:
        tl.store(edges_ptr + k, edges, mask=k < K)
        tl.debug_barrier()
        ends = tl.where(k < K - 1, tl.load(edges_ptr + tl.minimum(k + 1, K - 1)), n)
        weight = tl.load(w_ptr + ends) - tl.load(w_ptr + edges)
        first = tl.load(s_ptr + ends) - tl.load(s_ptr + edges)
        moved = mean + first / tl.where(weight > 0, weight, 1.0)
        moved = tl.maximum(moved, tl.load(y_ptr + tl.minimum(edges, n - 1)))
        moved = tl.minimum(moved, tl.load(y_ptr + tl.maximum(ends - 1, 0)))
        c = tl.where(weight > 0, moved, c)
        tl.store(c_ptr + k, c, mask=k < K)
        tl.debug_barrier()
        middle = (tl.load(c_ptr + tl.maximum(k, 1) - 1, mask=k < K, other=0.0) + c) * 0.5
        new = tl.where(k == 0, 0, count_until(y_ptr, n, middle, edges))
        new = tl.where(k < K, new, n)
        iterations += 1
        going = (tl.sum((new != edges).to(tl.int32), 0) > 0) & (iterations < max_iter)
        edges = tl.where(going, new, edges)
        tl.debug_barrier()
    return c, iterations


@triton.jit
def solve_points(
    y_ptr, w_ptr, s_ptr, q_ptr, cells_ptr, cell_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, c_ptr, n, mean, K, count,
    stride_cells, max_iter, KP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Writes the centroids to c (K,), ascending; returns the iterations, how many distinct points have weight, and the error.

    RUNS: points at the same place may follow each other, and count as one. The iterations are -1 where the cells are too few to
    tell K clusters apart, or the prefix sums too coarse for an error as small as that found.

    Workspace: cells (stride_cells,) int32; cell (5, stride_cells) fp64; grown (GROUPS + 1,) fp32; bounds (2, KP + 2) int32;
    choice (KP + 1, WIDTH or, up to MOST_EXACT centroids, stride_cells) int16; best (WIDTH,) fp32.
    """
    k = tl.arange(0, KP)
    first, last, distinct = _count_distinct(y_ptr, w_ptr, n, CHUNK, RUNS)
    y_first, y_last = tl.load(y_ptr + tl.minimum(first, n - 1)), tl.load(y_ptr + tl.maximum(last, 0))
    every = distinct <= (2 * count if RUNS else count)  # bins of single values do not follow their density
    m, total = _make_cells(y_ptr, w_ptr, cells_ptr, grown_ptr, n, count, every, y_first, y_last, GROUPS, CHUNK, RUNS)
    iterations = 0
    error = tl.full((), 0, tl.float64)
    if (distinct <= K) | (m < K):
        iterations = tl.where(distinct <= K, 0, -1)
        at = tl.load(cells_ptr + tl.maximum(tl.minimum(k, distinct - 1), 0))
        tl.store(c_ptr + k, tl.load(y_ptr + tl.minimum(at, n - 1)), mask=k < K)
    else:
        cw_ptr, cs_ptr, cq_ptr = cell_ptr, cell_ptr + stride_cells, cell_ptr + 2 * stride_cells
        for start in range(0, m + 1, CHUNK):
            i = start + tl.arange(0, CHUNK)
            inside = i <= m
            at = tl.load(cells_ptr + i, mask=inside, other=0)
            tl.store(cw_ptr + i, tl.load(w_ptr + at, mask=inside, other=0.0), mask=inside)
            tl.store(cs_ptr + i, tl.load(s_ptr + at, mask=inside, other=0.0), mask=inside)
            tl.store(cq_ptr + i, tl.load(q_ptr + at, mask=inside, other=0.0), mask=inside)
        tl.debug_barrier()
        if KP <= MOST_EXACT:
            error_ptr = cell_ptr + 3 * stride_cells
            _best_partition(cw_ptr, cs_ptr, cq_ptr, error_ptr, choice_ptr, bounds_ptr, m, K, stride_cells, CHUNK, PART)
        else:
            _search_in_windows(
                y_ptr, cw_ptr, cs_ptr, cq_ptr, cells_ptr, grown_ptr, bounds_ptr, choice_ptr, best_ptr, n, m, total, K,
                KP, WIDTH, SPLITS, PART,
            )  # fmt: skip
        edges = tl.load(cells_ptr + tl.load(bounds_ptr + k, mask=k < K, other=0), mask=k < K, other=0)
        edges = tl.where(k < K, tl.where(k == 0, 0, edges), n)
        # The same on the points themselves, for the last bit that cells are too coarse for.
        tl.debug_barrier()
        tl.store(bounds_ptr + k, edges, mask=k < K)
        tl.store(bounds_ptr + K, n)
        tl.debug_barrier()
        stride, rounds = 4, 0
        if KP <= MOST_EXACT:
            stride = tl.where(every, 0, 4)  # where cells are points there is no more to find
        while stride > 0:
            moved = _move_in_windows(
                w_ptr, s_ptr, q_ptr, bounds_ptr, bounds_ptr + KP + 2, choice_ptr, best_ptr, n, K, stride, KP, WIDTH, PART
            )
            rounds += 1
            finer = (moved == 0) | (rounds >= 6)
            stride = tl.where(finer, stride // 4, stride)
            rounds = tl.where(finer, 0, rounds)
        edges = tl.where(k < K, tl.load(bounds_ptr + k, mask=k < K, other=0), n)
        tl.debug_barrier()
        _, iterations = _lloyd(y_ptr, w_ptr, s_ptr, c_ptr, bounds_ptr, n, mean, K, edges, max_iter, KP)
        begin = tl.load(bounds_ptr + k, mask=k < K, other=n)
        end = tl.load(bounds_ptr + k + 1, mask=k < K - 1, other=n)
        error = tl.sum(_cost(w_ptr, s_ptr, q_ptr, begin, end), 0)
        if error < tl.load(q_ptr + n) * RESOLVED:
            iterations = -1
    tl.debug_barrier()
    return iterations, distinct, error


@triton.jit
def sort_key(x):
    """Unsigned keys in the order of the floats, as int64 in [0, 2**32); both zeros get one key, 0 is the key of none."""
    u = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(u < 0, ~u, u ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def of_sort_key(key):
    u = key.to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.where(u < 0, u ^ -2147483648, ~u).to(tl.float32, bitcast=True)


@triton.jit
def middle_of(above, below):
    """(above + below) / 2 in fp32, whose sum may be too large for fp32."""
    return ((above.to(tl.float64) + below.to(tl.float64)) / 2).to(tl.float32)


@triton.jit
def write_centroids(
    c_ptr, y_ptr, w_ptr, centroids_ptr, pivots_ptr, unit_ptr, doubt_ptr, check_ptr, unit, per_unit, n, K, many, exact,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Rounds the centroids to fp32, puts their midpoints in heap order, marks centroids that may have no member.

    unit: a power of two near the size of the values, kept as its inverse, so that squares of errors stay inside fp32.
    """
    KP: tl.constexpr = 1 << LEVELS
    k = tl.arange(0, KP)
    wide = tl.load(c_ptr + k, mask=k < K, other=0.0) * unit
    tl.store(centroids_ptr + k, wide.to(tl.float32), mask=k < K)
    # Of equal values the size is that of nothing; times the unit they must stay inside fp32 all the same.
    largest = 2.0**100 / tl.maximum(tl.max(tl.abs(wide), 0), 2.0**-126)
    kept = tl.minimum(tl.maximum(tl.minimum(per_unit, largest), 2.0**-126), 2.0**126)
    tl.store(unit_ptr, ((kept.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True).to(tl.float32))
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        node = tl.arange(0, 1 << level)
        m = ((2 * node + 1) << (LEVELS - 1 - level)) - 1
        real = m < K - 1
        above = tl.load(centroids_ptr + m + 1, mask=real, other=0.0)
        pivot = middle_of(above, tl.load(centroids_ptr + m, mask=real, other=0.0))
        tl.store(pivots_ptr + (1 << level) + node, tl.where(real, pivot, float("nan")))
    if many:
        c = tl.load(centroids_ptr + k, mask=k < K, other=0.0)
        after = tl.load(centroids_ptr + k + 1, mask=k < K - 1, other=0.0)
        before = tl.load(centroids_ptr + k - 1, mask=(k > 0) & (k < K), other=0.0)
        guess = tl.zeros((KP,), tl.int32)
        begin = tl.where(k == 0, 0, count_until(y_ptr, n, middle_of(c, before).to(tl.float64) * per_unit, guess))
        end = tl.where(k < K - 1, count_until(y_ptr, n, middle_of(after, c).to(tl.float64) * per_unit, guess), n)
        if exact == 0:  # the values of the bins at either end may lie on the other side
            begin, end = tl.minimum(begin + 1, n), tl.maximum(end - 1, 0)
        held = (end > begin) & (tl.load(w_ptr + end) > tl.load(w_ptr + begin))
        doubt = (k < K) & (held == 0)
        tl.store(doubt_ptr + k, doubt.to(tl.int8), mask=k < K)
        tl.store(check_ptr, tl.max(doubt.to(tl.int32), 0))
