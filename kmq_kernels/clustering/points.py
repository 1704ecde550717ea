"""One problem solved on points, in NumPy: sorted distinct values x (P,) with positive weights w (P,), both fp64."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Options(NamedTuple):
    algorithm: str
    init: str
    max_iter: int
    tol: float
    seed: int


class _Solution(NamedTuple):
    centroids: Array  # fp64, ascending, K of them
    n_iter: int
    lower_bound: float  # of the optimum, nan where none is known


# Solving one problem on points: positions x (P,) ascending and distinct, weights w (P,) positive, both fp64.


def points_of(problem: Array, weight: Array | None) -> tuple[Array, Array]:
    if weight is None:
        x, counts = np.unique(problem, return_counts=True)
        return x, counts.astype(np.float64)
    used = weight > 0  # a value without weight has no say in where the centroids are
    x, inverse = np.unique(problem[used], return_inverse=True)
    return x, np.bincount(inverse.ravel(), weights=weight[used], minlength=len(x))


def _power_of_two(size: float) -> float:
    return math.ldexp(1.0, min(max(math.frexp(size)[1], -1000), 1000))


class _Frame(NamedTuple):
    """What is taken off the positions and out of the units of a problem: all that follows is on points near zero and of size 1.

    A mean of 1e12 would hide a spread of 1, squares of 1e200 or of 1e-200 are no floats. The units are powers of two.
    """

    origin: float
    unit: float
    weight: float

    @classmethod
    def of(cls, x: Array, w: Array) -> "_Frame":
        # The middle one by weight: next to it positions are exact. Halves, because the range of fp64 values may be none.
        grown = np.cumsum(w / w.max())
        origin = float(x[np.searchsorted(grown, grown[-1] / 2)])
        reach = max(float(x[-1] / 2 - origin / 2), float(origin / 2 - x[0] / 2))
        return cls(origin, _power_of_two(2 * reach), _power_of_two(float(w.max())))

    def points(self, x: Array, w: Array) -> tuple[Array, Array]:
        """Weights that vanish next to others stay above zero."""
        return x / self.unit - self.origin / self.unit, np.maximum(w / self.weight, 2.0**-1000)

    def positions(self, x: Array) -> Array:
        return self.origin + x * self.unit if self.unit <= 2.0**900 else (self.origin / self.unit + x) * self.unit

    def cost(self, cost: float) -> float:
        return cost * self.weight * self.unit * self.unit


Moments = tuple[Array, Array, Array]  # weight, mean and squared error of sets of points


def _join(a: Moments, b: Moments) -> Moments:
    """Those of both sets: only numbers that are not negative are added, so nothing cancels (Chan, Golub and LeVeque 1979)."""
    weight = a[0] + b[0]
    share, step = b[0] / weight, b[1] - a[1]
    return weight, a[1] + step * share, a[2] + b[2] + step * step * (a[0] * share)


class _Costs:
    """Squared error of points [i, j) around their mean, up to the error inside the points.

    For each bit in which the numbers of an interval's first and last point can first differ, every point knows the run from it
    to the border between their halves: two runs, one join.
    """

    def __init__(self, x: Array, w: Array) -> None:
        n = len(x)
        place = np.arange(n)
        left: Moments = (w.copy(), x.copy(), np.zeros(n))  # of a run of 2**bit points up to this one
        right: Moments = (w.copy(), x.copy(), np.zeros(n))  # and from this one on
        bits = max(n - 1, 1).bit_length()
        self.n = n
        self.table: Moments = np.empty(bits * n), np.empty(bits * n), np.empty(bits * n)  # at bit * n + place
        for bit in range(bits):
            size, upper = 1 << bit, (place >> bit & 1) == 1
            for part, a, b in zip(self.table, left, right, strict=True):
                part[bit * n : (bit + 1) * n] = np.where(upper, a, b)
            up = np.flatnonzero(upper)
            border = up >> bit << bit
            down = np.flatnonzero(~upper)
            after = (down >> bit << bit) + size
            down, after = down[after < n], after[after < n]
            joined_up = _join(_at(left, border - 1), _at(left, up))
            joined_down = _join(_at(right, down), _at(right, after))
            for part, new_up in zip(left, joined_up, strict=True):
                part[up] = new_up
            for part, new_down in zip(right, joined_down, strict=True):
                part[down] = new_down

    def __call__(self, i: Array, j: Array) -> Array:
        last = j - 1
        row = np.frexp((i ^ last).astype(np.float64))[1].astype(np.int64) - 1
        row = np.maximum(row, 0) * self.n
        both = _join(_at(self.table, row + i), _at(self.table, row + last))
        return np.where(i == last, 0.0, both[2])


def _at(moments: Moments, places: Array) -> Moments:
    return moments[0][places], moments[1][places], moments[2][places]


def _optimal_edges(costs: _Costs, num_points: int, num_centroids: int) -> tuple[Array, float]:
    """Edges (K + 1,) of the best partition of the points into K intervals, and its cost.

    The last edge of the best split moves right with the end of the range, so each layer is filled by divide and conquer:
    ends at odd multiples of a stride search only between the answers of their neighbours.
    """
    ends = np.arange(num_points + 1)
    best = np.full(num_points + 1, np.inf)
    best[1:] = costs(np.zeros(num_points, np.int64), ends[1:])
    split = np.zeros((num_centroids, num_points + 1), np.int32)
    for k in range(1, num_centroids):
        layer, answer = np.full(num_points + 1, np.inf), split[k]
        stride = 1 << num_points.bit_length()
        while stride:
            j = np.arange(stride, num_points + 1, 2 * stride)
            j = j[j > k]
            low = np.maximum(answer[np.maximum(j - stride, 0)], k)
            after = j + stride
            high = np.where(after <= num_points, answer[np.minimum(after, num_points)], j - 1)
            high = np.minimum(np.where(high == 0, j - 1, high), j - 1)
            if len(j):
                length = high - low + 1
                start = np.cumsum(length) - length
                segment = np.repeat(np.arange(len(j)), length)
                i = np.arange(int(length.sum())) - start[segment] + low[segment]
                total = best[i] + costs(i, j[segment])
                least = np.minimum.reduceat(total, start)
                hits = np.flatnonzero(total == least[segment])
                _, first_hit = np.unique(segment[hits], return_index=True)
                layer[j], answer[j] = least, i[hits[first_hit]]
            stride //= 2
        best = layer
    edges = np.zeros(num_centroids + 1, np.int64)
    edges[-1] = num_points
    for k in range(num_centroids - 1, 0, -1):
        edges[k] = split[k, edges[k + 1]]
    return edges, float(best[-1])


def _cells(x: Array, w: Array, count: int) -> Array:
    """Edges of at most about 2 * `count` cells of neighbouring points: half follow the density**(1/3) rule, half the range.

    Optimal quantisation puts its intervals where the integral of density**(1/3) grows, so that is where resolution pays; the
    equal steps over the range keep cells narrow in the tails.
    """
    step = np.diff(x, append=x[-1])
    step[-1] = step[-2]
    growth = (w * step * step) ** (1 / 3)
    for _ in range(4):  # a gap before an outlier needs one cell, not most of them
        growth = np.minimum(growth, growth.sum() / count)
    growth = np.cumsum(growth)
    by_density = np.floor(growth * (count / growth[-1]))
    by_range = np.floor((x - x[0]) * (count / (x[-1] - x[0])))
    new_cell = (np.diff(by_density) > 0) | (np.diff(by_range) > 0)
    return np.concatenate([[0], np.flatnonzero(new_cell) + 1, [len(x)]])


def _means(x: Array, w: Array, edges: Array) -> Array:
    """Means of the intervals between edges, each counted from its first point: nothing of it is lost next to other intervals."""
    first, begin = x[edges[:-1]], edges[:-1]
    off = x - np.repeat(first, np.diff(edges))
    return first + np.add.reduceat(w * off, begin) / np.add.reduceat(w, begin)


def _initial(x: Array, w: Array, num_centroids: int, init: str, seed: int) -> Array:
    generator = np.random.default_rng(seed)
    if init == "linear":
        return np.linspace(x[0], x[-1], num_centroids)
    if init == "random":
        return np.sort(x[generator.choice(len(x), num_centroids, replace=False)])
    if init == "quantile":
        grown = np.cumsum(w)
        return x[np.searchsorted(grown, (np.arange(num_centroids) + 0.5) / num_centroids * grown[-1])]
    chosen = np.empty(num_centroids)
    distance = np.full(len(x), np.inf)
    chances = w
    for k in range(num_centroids):
        grown = np.cumsum(chances)
        pick = min(int(np.searchsorted(grown, generator.random() * grown[-1], side="right")), len(x) - 1)
        chosen[k] = x[pick]
        distance = np.minimum(distance, (x - chosen[k]) ** 2)
        chances = w * distance
    return np.sort(chosen)


def _lloyd(x: Array, w: Array, centroids: Array, max_iter: int, tol: float) -> tuple[Array, int]:
    """Lloyd iterations on the points until the partition stands still, the centroids move less than tol, or max_iter.

    tol is scikit-learn's: the sum of squared moves is compared with tol times the variance of the values. A cluster without
    members takes the end point of a cluster that adds most to the inertia, also after the last iteration.
    """
    mean = _means(x, w, np.array([0, len(x)]))
    threshold = tol * float(np.sum(w * (x - mean) ** 2) / np.sum(w))
    edges = np.zeros(0, np.int64)
    n_iter, last = 0, False
    for _ in range(max_iter + 100):
        inner = np.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2, side="right")
        nearest = np.concatenate([[0], inner, [len(x)]])
        new_edges = _fill_empty(x, w, nearest)
        if last and np.array_equal(new_edges, nearest):
            break
        n_iter += not last
        if np.array_equal(new_edges, edges):
            break
        edges = new_edges
        moved = _means(x, w, edges)
        shift = float(np.sum((moved - centroids) ** 2))
        centroids = moved
        last = last or n_iter == max_iter or (shift <= threshold and tol > 0)
    return centroids, n_iter


def _fill_empty(x: Array, w: Array, edges: Array) -> Array:
    while (np.diff(edges) <= 0).any():
        kept = np.flatnonzero(np.diff(edges) > 0)
        first, last = edges[kept], edges[kept + 1] - 1
        means, several = _means(x, w, np.unique(edges)), last > first
        gain_first = np.where(several, w[first] * (x[first] - means) ** 2, -1.0)
        gain_last = np.where(several, w[last] * (x[last] - means) ** 2, -1.0)
        donor = int(np.argmax(np.maximum(gain_first, gain_last)))
        cut = first[donor] + 1 if gain_first[donor] >= gain_last[donor] else last[donor]
        drop = int(np.flatnonzero(np.diff(edges) <= 0)[0])
        edges = np.sort(np.append(np.delete(edges, drop + 1 if drop + 1 < len(edges) - 1 else drop), cut))
    return edges


def solve_points(x: Array, w: Array, num_centroids: int, options: Options) -> _Solution:
    if len(x) <= num_centroids:
        return _Solution(np.concatenate([x, np.full(num_centroids - len(x), x[-1])]), 0, 0.0)
    frame = _Frame.of(x, w)
    centroids, n_iter, lower_bound = _solve_near_zero(*frame.points(x, w), num_centroids, options)
    centroids = np.clip(frame.positions(centroids), x[0], x[-1])
    return _Solution(centroids, n_iter, frame.cost(lower_bound))


def _solve_near_zero(x: Array, w: Array, num_centroids: int, options: Options) -> _Solution:
    if options.algorithm == "lloyd":
        start = _initial(x, w, num_centroids, options.init, options.seed)
        centroids, n_iter = _lloyd(x, w, start, options.max_iter, options.tol)
        return _Solution(centroids, n_iter, math.nan)
    count = min(max(32 * num_centroids, 1024), 4096)
    cells = np.arange(len(x) + 1) if options.algorithm == "exact" or len(x) <= 2 * count else _cells(x, w, count)
    cell_w, cell_x = np.add.reduceat(w, cells[:-1]), _means(x, w, cells)
    edges, cost = _optimal_edges(_Costs(cell_x, cell_w), len(cell_x), num_centroids)
    centroids = _means(x, w, cells[edges])
    if len(cells) == len(x) + 1:
        return _Solution(centroids, 0, cost)
    owner = np.repeat(np.arange(len(cell_x)), np.diff(cells))
    inside = np.bincount(owner, weights=w * (x - cell_x[owner]) ** 2)
    centroids, n_iter = _lloyd(x, w, centroids, options.max_iter, 0.0)
    return _Solution(centroids, n_iter, _lower_bound(cost, inside, num_centroids))


def _lower_bound(cell_cost: float, inside: Array, num_centroids: int) -> float:
    """Lower bound of the optimum from the optimum over whole cells.

    inside: squared error of the points of each cell around the mean of the cell. The best centroids C split at most K - 1
    cells. Move the points of these cells to the means of their cells: the distances to C change by a vector no longer than
    sqrt(S), S the sum of the K - 1 largest entries of `inside`. Then no cell is split, so the moved points cost at least the
    optimum over whole cells, less the error inside the split cells. Hence sqrt(optimum) >= sqrt(whole - S) - sqrt(S).
    """
    split = float(np.sort(inside)[len(inside) - min(num_centroids - 1, len(inside)) :].sum())
    whole = cell_cost + float(inside.sum())
    return max(math.sqrt(max(whole - split, 0.0)) - math.sqrt(split), 0.0) ** 2
