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


class Moments(NamedTuple):
    """Weight, mean and squared error of sets of points; `rest` is what the mean lacks: of values far from zero for their spread,
    fp64 holds the values, but not their means."""

    weight: Array
    mean: Array
    rest: Array
    error: Array

    def at(self, places: Array) -> "Moments":
        return Moments(*(part[places] for part in self))

    def joined(self, other: "Moments") -> "Moments":
        """Those of both sets: only numbers that are not negative are added, so nothing cancels (Chan, Golub and LeVeque 1979)."""
        weight, more = self.weight + other.weight, other.weight > self.weight
        share, step = np.minimum(self.weight, other.weight) / weight, (other.mean - self.mean) + (other.rest - self.rest)
        near, near_rest = np.where(more, other.mean, self.mean), np.where(more, other.rest, self.rest)  # the heavier one's
        mean, rest = _sum(near, near_rest + np.where(more, -step, step) * share)
        error = self.error + other.error + step * step * (np.maximum(self.weight, other.weight) * share)
        return Moments(weight, mean, rest, error)


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what rounding took from it (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


class _Costs:
    """Squared error of points [i, j) around their mean, up to the error inside the points, of positions mean + rest.

    For each bit in which the numbers of an interval's first and last point can first differ, every point knows the run from it
    to the border between their halves: two runs, one join.
    """

    def __init__(self, mean: Array, rest: Array, w: Array) -> None:
        n = self.n = len(mean)
        place, bits = np.arange(n), max(n - 1, 1).bit_length()
        points = Moments(w, mean, rest, np.zeros(n))
        left, right = Moments(*map(np.copy, points)), Moments(*map(np.copy, points))  # of a run up to this point, and from it on
        self.runs = Moments(*(np.empty(bits * n) for _ in points))  # at bit * n + place
        for bit in range(bits):
            upper = (place >> bit & 1) == 1
            for part, a, b in zip(self.runs, left, right, strict=True):
                part[bit * n : (bit + 1) * n] = np.where(upper, a, b)
            up, down = np.flatnonzero(upper), np.flatnonzero(~upper)
            border, after = up >> bit << bit, (down >> bit << bit) + (1 << bit)
            down, after = down[after < n], after[after < n]
            joined_up, joined_down = left.at(border - 1).joined(left.at(up)), right.at(down).joined(right.at(after))
            for k in range(len(points)):
                left[k][up], right[k][down] = joined_up[k], joined_down[k]

    def __call__(self, i: Array, j: Array) -> Array:
        last = j - 1
        bit = np.frexp((i ^ last).astype(np.float64))[1].astype(np.int64) - 1
        row = np.maximum(bit, 0) * self.n
        return np.where(i == last, 0.0, self.runs.at(row + i).joined(self.runs.at(row + last)).error)


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
    return sum(_means_and_rest(x, w, edges))  # type: ignore[return-value]


def _means_and_rest(x: Array, w: Array, edges: Array) -> tuple[Array, Array]:
    """Means of the intervals between edges, each counted from its heaviest point: nothing is lost next to others far away."""
    begin, length = edges[:-1], np.diff(edges)
    heaviest = w == np.repeat(np.maximum.reduceat(w, begin), length)
    near = np.maximum.reduceat(np.where(heaviest, x, -np.inf), begin)
    return _sum(near, np.add.reduceat(w * (x - np.repeat(near, length)), begin) / np.add.reduceat(w, begin))


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
    # In units near their size: squares of 1e200 or 1e-200 are no floats. Weights that vanish next to others stay above zero.
    unit, weight_unit = _power_of_two(max(abs(float(x[0])), abs(float(x[-1])))), _power_of_two(float(w.max()))
    solution = _solve_scaled(x / unit, np.maximum(w / weight_unit, 2.0**-1000), num_centroids, options)
    centroids = np.clip(solution.centroids * unit, x[0], x[-1])
    return _Solution(centroids, solution.n_iter, solution.lower_bound * weight_unit * unit * unit)


def _solve_scaled(x: Array, w: Array, num_centroids: int, options: Options) -> _Solution:
    if options.algorithm == "lloyd":
        start = _initial(x, w, num_centroids, options.init, options.seed)
        centroids, n_iter = _lloyd(x, w, start, options.max_iter, options.tol)
        return _Solution(centroids, n_iter, math.nan)
    count = min(max(32 * num_centroids, 1024), 4096)
    cells = np.arange(len(x) + 1) if options.algorithm == "exact" or len(x) <= 2 * count else _cells(x, w, count)
    cell_w, (cell_x, cell_rest) = np.add.reduceat(w, cells[:-1]), _means_and_rest(x, w, cells)
    edges, cost = _optimal_edges(_Costs(cell_x, cell_rest, cell_w), len(cell_x), num_centroids)
    centroids = _means(x, w, cells[edges])
    if len(cells) == len(x) + 1:
        return _Solution(centroids, 0, cost)
    owner = np.repeat(np.arange(len(cell_x)), np.diff(cells))
    inside = np.bincount(owner, weights=w * ((x - cell_x[owner]) - cell_rest[owner]) ** 2)
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
