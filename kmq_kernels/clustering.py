"""One-dimensional k-means of weights: the optimum (or a proven distance from it), exact Lloyd, and the equal-width baseline.

A problem is solved on *points*: sorted distinct values with their weight (for large tensors: the bins of a histogram with their
exact means). The dynamic program over points, or over cells of neighbouring points, gives the globally optimal partition into
intervals; Lloyd iterations on all points polish it. The labels are then taken from the midpoints of the rounded centroids, so
that `assignments` is exactly `searchsorted(midpoints, values)` for the centroids that are returned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import ops
from .packing import row_bytes

__all__ = ["ClusteredMatrix", "KMeansResult", "cluster_matrices", "kmeans", "linear_codebook"]

Array = npt.NDArray[Any]
Algorithm = Literal["optimal", "lloyd", "exact"]
Init = Literal["k-means++", "linear", "random", "quantile"]
Scheme = Literal["kmeans", "linear"]

_INERTIA_CHUNK = 1 << 20
_BATCH = 1 << 26  # weights handed to the compiled engine at a time


@dataclass(frozen=True)
class KMeansResult:
    """Clusters of one problem, or of B problems with a leading dimension B.

    centroids: (K,) fp32, fp64 for fp64 values, ascending. assignments: (N,) uint8, index of the centroid of each value.
    inertia: fp64, sum of weight * (value - centroid)**2 for exactly these centroids and assignments. n_iter: int64, Lloyd
    iterations. bound: fp64, at most how many times the optimum the inertia is: inertia <= bound * optimum, computed from the
    data; 1 at the optimum, infinity where nothing is known (algorithm "lloyd" and the linear codebook).
    """

    centroids: Tensor
    assignments: Tensor
    inertia: Tensor
    n_iter: Tensor
    bound: Tensor


class ClusteredMatrix(NamedTuple):
    """A weight as codebook and packed indices: packed (rows, row_bytes) uint8, codebook (G, K) fp32, inertia (G,) fp64."""

    packed: Tensor
    codebook: Tensor
    inertia: Tensor


class _Options(NamedTuple):
    algorithm: str
    init: str
    max_iter: int
    tol: float
    seed: int


class _Solution(NamedTuple):
    centroids: Array  # fp64, ascending, K of them
    n_iter: int
    lower_bound: float  # of the optimum, nan where none is known


def _check_options(algorithm: str, init: str, max_iter: int, tol: float, seed: int) -> _Options:
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm: expected one of {', '.join(get_args(Algorithm))}, got {algorithm!r}")
    if init not in get_args(Init):
        raise ValueError(f"init: expected one of {', '.join(get_args(Init))}, got {init!r}")
    if max_iter < 1:
        raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol: expected a number that is not negative, got {tol}")
    return _Options(algorithm, init, int(max_iter), float(tol), int(seed))


def _check_values(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.numel() == 0:
        raise ValueError(f"{name}: expected at least one value, got an empty tensor of shape {tuple(values.shape)}")


def _check_weight(name: str, values: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"sample_weight of {name}: expected a floating-point tensor, got {weight.dtype}")
    if weight.shape != values.shape or weight.device != values.device:
        raise ValueError(
            f"sample_weight of {name}: expected shape {tuple(values.shape)} on {values.device},"
            f" got {tuple(weight.shape)} on {weight.device}"
        )


def _compiled(tensors: Sequence[Tensor], weights: Sequence[Tensor | None]) -> bool:
    """Whether a compiled engine takes these: there is one for the CPU and one for CUDA, for at most 32 bits, one device."""
    given = [*tensors, *(weight for weight in weights if weight is not None)]
    fits = len({tensor.device for tensor in given}) == 1 and all(tensor.dtype != torch.float64 for tensor in given)
    device = given[0].device.type
    return fits and device in ("cpu", "cuda") and ops.has_kernel("kmeans", device.upper())


def _refuse_values(name: str, problem: Array, weight: Array | None) -> None:
    """One problem is finite and its weights can be weights."""
    if not np.isfinite(problem).all():
        raise ValueError(f"{name}: NaN or Inf among the values; clustering needs finite values")
    if weight is None:
        return
    if not np.isfinite(weight).all():
        raise ValueError(f"sample_weight of {name}: NaN or Inf among the weights")
    if (weight < 0).any():
        raise ValueError(f"sample_weight of {name}: negative weights; use squares or absolute values")
    if not (weight > 0).any():
        raise ValueError(f"sample_weight of {name}: all weights are zero; leave it out to weigh all values alike")


# Solving one problem on points: positions x (P,) ascending and distinct, weights w (P,) positive, both fp64.


def _points(problem: Array, weight: Array | None) -> tuple[Array, Array]:
    if weight is None:
        x, counts = np.unique(problem, return_counts=True)
        return x, counts.astype(np.float64)
    used = weight > 0  # a value without weight has no say in where the centroids are
    x, inverse = np.unique(problem[used], return_inverse=True)
    return x, np.bincount(inverse.ravel(), weights=weight[used], minlength=len(x))


def _prefix(x: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(x)])


class _Costs:
    """Squared error of points [i, j) around their mean, up to the error inside the points, from prefix sums."""

    def __init__(self, x: Array, w: Array) -> None:
        shifted = x - np.average(x, weights=w)  # near zero, the differences below cancel least
        self.weight, self.first, self.second = _prefix(w), _prefix(w * shifted), _prefix(w * shifted * shifted)

    def __call__(self, i: Array, j: Array) -> Array:
        weight = self.weight[j] - self.weight[i]
        first = self.first[j] - self.first[i]
        return np.maximum(self.second[j] - self.second[i] - first * first / weight, 0.0)


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


def _means(sums: Array, weights: Array, edges: Array) -> Array:
    return np.diff(sums[edges]) / np.diff(weights[edges])


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
    members takes the end point of a cluster that adds most to the inertia.
    """
    weights, sums = _prefix(w), _prefix(w * x)
    mean = sums[-1] / weights[-1]
    threshold = tol * float(np.sum(w * (x - mean) ** 2) / weights[-1])
    edges = np.zeros(0, np.int64)
    for iteration in range(1, max_iter + 1):
        inner = np.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2, side="right")
        new_edges = _fill_empty(x, w, centroids, np.concatenate([[0], inner, [len(x)]]))
        if np.array_equal(new_edges, edges):
            return centroids, iteration
        edges = new_edges
        moved = _means(sums, weights, edges)
        shift = float(np.sum((moved - centroids) ** 2))
        centroids = moved
        if shift <= threshold and tol > 0:
            return centroids, iteration
    return centroids, max_iter


def _fill_empty(x: Array, w: Array, centroids: Array, edges: Array) -> Array:
    while (np.diff(edges) <= 0).any():
        kept = np.flatnonzero(np.diff(edges) > 0)
        first, last = edges[kept], edges[kept + 1] - 1
        several = last > first
        gain_first = np.where(several, w[first] * (x[first] - centroids[kept]) ** 2, -1.0)
        gain_last = np.where(several, w[last] * (x[last] - centroids[kept]) ** 2, -1.0)
        donor = int(np.argmax(np.maximum(gain_first, gain_last)))
        cut = first[donor] + 1 if gain_first[donor] >= gain_last[donor] else last[donor]
        drop = int(np.flatnonzero(np.diff(edges) <= 0)[0])
        edges = np.sort(np.append(np.delete(edges, drop + 1 if drop + 1 < len(edges) - 1 else drop), cut))
        centroids = _means(_prefix(w * x), _prefix(w), np.unique(edges))
        centroids = np.concatenate([centroids, np.full(len(edges) - 1 - len(centroids), centroids[-1])])
    return edges


def _solve(x: Array, w: Array, num_centroids: int, options: _Options) -> _Solution:
    if len(x) <= num_centroids:
        return _Solution(np.concatenate([x, np.full(num_centroids - len(x), x[-1])]), 0, 0.0)
    if options.algorithm == "lloyd":
        start = _initial(x, w, num_centroids, options.init, options.seed)
        centroids, n_iter = _lloyd(x, w, start, options.max_iter, options.tol)
        return _Solution(centroids, n_iter, math.nan)
    count = min(max(32 * num_centroids, 1024), 4096)
    cells = np.arange(len(x) + 1) if options.algorithm == "exact" or len(x) <= 2 * count else _cells(x, w, count)
    weights, sums = _prefix(w), _prefix(w * x)
    cell_w = np.diff(weights[cells])
    cell_x = _means(sums, weights, cells)
    edges, cost = _optimal_edges(_Costs(cell_x, cell_w), len(cell_x), num_centroids)
    centroids = _means(sums, weights, cells[edges])
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


# From problems to results


def _label(values: Tensor, centroids: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Assignments (N,) of one problem and its inertia in fp64, in chunks so that no fp64 copy of the values is made."""
    assignments = ops.assign(values[None], centroids[None])[0]
    return assignments, _inertia(values, centroids, assignments, weight)


def _inertia(values: Tensor, centroids: Tensor, assignments: Tensor, weight: Tensor | None) -> Tensor:
    inertia = torch.zeros((), dtype=torch.float64, device=values.device)
    wide = centroids.double()
    for start in range(0, len(values), _INERTIA_CHUNK):
        chunk = slice(start, start + _INERTIA_CHUNK)
        error = (values[chunk].double() - wide[assignments[chunk].int()]) ** 2
        inertia += (error if weight is None else error * weight[chunk].double()).sum()
    return inertia


def _bound(inertia: float, lower_bound: float) -> float:
    if math.isnan(lower_bound):
        return math.inf
    if inertia <= lower_bound or inertia == 0:
        return 1.0
    return inertia / lower_bound if lower_bound > 0 else math.inf


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _kmeans_problem(name: str, values: Tensor, num_centroids: int, weight: Tensor | None, options: _Options) -> KMeansResult:
    problem, problem_weight = _numpy(values), None if weight is None else _numpy(weight)
    _refuse_values(name, problem, problem_weight)
    solution = _solve(*_points(problem, problem_weight), num_centroids, options)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    centroids = torch.from_numpy(solution.centroids).to(values.device, dtype)
    assignments, inertia = _label(values.detach(), centroids, weight)
    bound = torch.tensor(_bound(float(inertia), solution.lower_bound), dtype=torch.float64, device=values.device)
    n_iter = torch.tensor(solution.n_iter, device=values.device)
    return KMeansResult(centroids, assignments, inertia, n_iter, bound)


def _stack(results: Sequence[KMeansResult]) -> KMeansResult:
    fields = ("centroids", "assignments", "inertia", "n_iter", "bound")
    return KMeansResult(*(torch.stack([getattr(result, field) for result in results]) for field in fields))


def _kmeans_tensor(name: str, values: Tensor, num_centroids: int, weight: Tensor | None, options: _Options) -> KMeansResult:
    if values.dim() == 1:
        return _kmeans_problem(name, values, num_centroids, weight, options)
    weights = [None] * len(values) if weight is None else list(weight)
    return _stack([_kmeans_problem(name, values[b], num_centroids, weights[b], options) for b in range(len(values))])


@overload
def kmeans(
    values: Tensor,
    num_centroids: int,
    *,
    sample_weight: Tensor | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> KMeansResult: ...


@overload
def kmeans(
    values: Sequence[Tensor],
    num_centroids: int | Sequence[int],
    *,
    sample_weight: Sequence[Tensor | None] | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> list[KMeansResult]: ...


def kmeans(
    values: Tensor | Sequence[Tensor],
    num_centroids: int | Sequence[int],
    *,
    sample_weight: Tensor | Sequence[Tensor | None] | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> KMeansResult | list[KMeansResult]:
    """Clusters scalars: K centroids and the index of the nearest one for each value, minimising the weighted squared error.

    values: (N,) one problem, (B, N) B problems, or a list of such tensors of any lengths; fp32, fp64, bf16 or fp16, computed in
    fp64. num_centroids: K from 1 to 256; a list may have one for each tensor. sample_weight: like values, not negative, not all
    zero in any problem; a value of weight zero gets an index but has no say in the centroids.
    algorithm: "optimal" is the global optimum for up to 16,384 values, and beyond solves the problem on a fine adaptive grid by
    dynamic programming, then on the values near the edges between clusters until Lloyd iterations over all values change nothing
    (with more than 64 centroids: on the bins of a histogram); "exact" the global optimum over all distinct values; "lloyd"
    iterates from `init` ("k-means++", "linear", "random", "quantile") until the partition stands still, the centroids move less
    than `tol` (relative to the variance, as in scikit-learn), or `max_iter`.
    On CUDA tensors "optimal" runs on the device, where `bound` is not known.
    seed makes "k-means++" and "random" repeatable; each problem draws from the same seed, whatever stands beside it.

    Returns a KMeansResult, a list of them for a list. The centroids ascend; assignments are searchsorted((c[1:] + c[:-1]) / 2,
    values) in their dtype, a tie goes to the lower index. With fewer distinct values than K, these values are the first
    centroids and the largest is repeated; with at least K, no cluster is empty (unless K of them are so close that a midpoint
    cannot lie between two in fp32). Raises ValueError for NaN, Inf, an empty tensor, or weights that are negative or all zero;
    TypeError for other dtypes.
    """
    options = _check_options(algorithm, init, max_iter, tol, seed)
    single = isinstance(values, Tensor)
    tensors = [values] if isinstance(values, Tensor) else list(values)
    names = ["values"] if single else [f"values[{i}]" for i in range(len(tensors))]
    weights = _spread_weights(tensors, sample_weight)
    counts = [num_centroids] * len(tensors) if isinstance(num_centroids, int) else list(num_centroids)
    if len(counts) != len(tensors):
        raise ValueError(f"num_centroids: expected one for each of the {len(tensors)} tensors, got {len(counts)}")
    for name, tensor, weight, count in zip(names, tensors, weights, counts, strict=True):
        _check_values(name, tensor)
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name}: expected shape (N,) or (B, N), got {tuple(tensor.shape)}")
        _check_weight(name, tensor, weight)
        if not 1 <= count <= 256:
            raise ValueError(f"num_centroids: expected 1 to 256, got {count}")
    if tensors and _compiled(tensors, weights):
        rows = [tensor.detach()[None] if tensor.dim() == 1 else tensor.detach() for tensor in tensors]
        row_weights = [
            None if weight is None else weight.detach().reshape(row.shape) for row, weight in zip(rows, weights, strict=True)
        ]
        solved = ops.kmeans(rows, row_weights, counts, [1] * len(rows), False, *options, names=names)
        results = []
        for tensor, labels, centroids, *scalars in zip(tensors, *solved, strict=True):
            one = tensor.dim() == 1
            centroids, inertia, n_iter, bound = (part[0] if one else part for part in (centroids, *scalars))
            results.append(KMeansResult(centroids, labels.view(tensor.shape), inertia, n_iter, bound))
        return results[0] if single else results
    results = [_kmeans_tensor(*problem, options) for problem in zip(names, tensors, counts, weights, strict=True)]
    return results[0] if single else results


def _spread_weights(tensors: list[Tensor], sample_weight: Tensor | Sequence[Tensor | None] | None) -> list[Tensor | None]:
    if sample_weight is None:
        return [None] * len(tensors)
    weights: list[Tensor | None] = [sample_weight] if isinstance(sample_weight, Tensor) else list(sample_weight)
    if len(weights) != len(tensors):
        raise ValueError(f"sample_weight: expected one for each of the {len(tensors)} tensors, got {len(weights)}")
    return weights


def linear_codebook(values: Tensor, num_centroids: int) -> KMeansResult:
    """The equal-width baseline: K equal bins over [min, max], each represented by the mean of its members.

    values: (N,) or (B, N), fp32, fp64, bf16 or fp16; num_centroids: K from 1 to 256. Returns a KMeansResult without iterations
    and without bound. An assignment is the number of the bin that the value lies in (lower edge included; the maximum belongs to
    the last bin), which need not be the nearest mean. An empty bin keeps its centre as centroid and has no members; the
    centroids ascend all the same. Raises like `kmeans`.
    """
    _check_values("values", values)
    if values.dim() not in (1, 2):
        raise ValueError(f"values: expected shape (N,) or (B, N), got {tuple(values.shape)}")
    if not 1 <= num_centroids <= 256:
        raise ValueError(f"num_centroids: expected 1 to 256, got {num_centroids}")
    if values.dim() == 2:
        return _stack([linear_codebook(row, num_centroids) for row in values])
    values = values.detach()
    wide = values.double()
    low, high = wide.min(), wide.max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("values: NaN or Inf among the values; clustering needs finite values")
    width = (high - low) / num_centroids
    bins = torch.zeros_like(wide) if bool(high == low) else ((wide - low) / width).floor_().clamp_(0, num_centroids - 1)
    assignments = bins.to(torch.uint8)
    sums, counts = (out[0] for out in ops.update(values[None], assignments[None], num_centroids))
    centres = low + (torch.arange(num_centroids, device=values.device) + 0.5) * width
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centres).to(dtype)
    inertia = _inertia(values, centroids, assignments, None)
    unknown = torch.full_like(inertia, math.inf)
    return KMeansResult(centroids, assignments, inertia, torch.zeros((), dtype=torch.int64, device=values.device), unknown)


def cluster_matrices(
    weights: Sequence[Tensor],
    bits: Sequence[int],
    *,
    group_rows: Sequence[int],
    scheme: Scheme = "kmeans",
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
    sample_weight: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[ClusteredMatrix]:
    """Clusters all weights of a model: the one scheduler behind `quantize_`.

    weights: matrices (rows, cols), floating point; bits: 1 to 8 for each, K = 2**bits; group_rows: for each, how many rows share
    a codebook (rows itself for one codebook a tensor, 1 for one a row; the last group may be short), so row r uses codebook
    r // group_rows. scheme: "kmeans", with the options of `kmeans`, or "linear", see `linear_codebook`. sample_weight: for each
    a matrix like the weight, or None. names: what errors call the weights. on_done(i) is called in the calling thread when
    weight i is finished. Returns ClusteredMatrix(packed, codebook, inertia) for each. Raises like `kmeans`; nothing is modified.
    """
    options = _check_options(algorithm, init, max_iter, tol, seed)
    matrices = list(weights)
    if scheme not in ("kmeans", "linear"):
        raise ValueError(f"scheme: expected kmeans or linear, got {scheme!r}")
    if scheme == "linear" and sample_weight is not None and any(weight is not None for weight in sample_weight):
        raise ValueError("sample_weight: the linear scheme takes no weights")
    called = [f"weights[{i}]" for i in range(len(matrices))] if names is None else list(names)
    importance = _spread_weights(matrices, sample_weight)
    for what, given in (("bits", bits), ("group_rows", group_rows), ("names", called)):
        if len(given) != len(matrices):
            raise ValueError(f"{what}: expected one for each of the {len(matrices)} weights, got {len(given)}")
    for name, matrix, width, group, weight in zip(called, matrices, bits, group_rows, importance, strict=True):
        _check_values(name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, cols), got {tuple(matrix.shape)}")
        _check_weight(name, matrix, weight)
        if not 1 <= width <= 8:
            raise ValueError(f"bits of {name}: expected 1 to 8, got {width}")
        if group < 1:
            raise ValueError(f"group_rows of {name}: expected at least 1, got {group}")
    matrices = [matrix.detach() for matrix in matrices]
    matrices = [matrix.float() if matrix.dtype == torch.float64 else matrix for matrix in matrices]
    if scheme == "kmeans" and _compiled(matrices, importance):
        return _cluster_compiled(matrices, importance, bits, group_rows, called, options, on_done)
    done = []
    for i, (name, matrix, weight) in enumerate(zip(called, matrices, importance, strict=True)):
        done.append(_cluster_matrix(name, matrix, bits[i], group_rows[i], scheme, weight, options))
        if on_done is not None:
            on_done(i)
    return done


def _cluster_compiled(
    matrices: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    bits: Sequence[int],
    group_rows: Sequence[int],
    names: Sequence[str],
    options: _Options,
    on_done: Callable[[int], None] | None,
) -> list[ClusteredMatrix]:
    """In batches of neighbouring matrices: work for all threads, small enough for progress to be seen. On a GPU all at once."""
    done: list[ClusteredMatrix] = []
    batch = _BATCH if matrices[0].device.type == "cpu" else math.inf
    while len(done) < len(matrices):
        begin = end = len(done)
        size = 0
        while end < len(matrices) and size < batch:
            size += matrices[end].numel()
            end += 1
        part = slice(begin, end)
        labels, centroids, inertia, _, _ = ops.kmeans(
            list(matrices[part]), list(weights[part]), [2**b for b in bits[part]], list(group_rows[part]), True,
            *options, names=list(names[part]),
        )  # fmt: skip
        done += map(ClusteredMatrix, labels, centroids, inertia)
        if on_done is not None:
            for i in range(begin, end):
                on_done(i)
    return done


def _cluster_matrix(
    name: str, matrix: Tensor, bits: int, group_rows: int, scheme: str, weight: Tensor | None, options: _Options
) -> ClusteredMatrix:
    rows, cols = matrix.shape
    groups = -(-rows // group_rows)
    packed = matrix.new_empty((rows, row_bytes(cols, bits)), dtype=torch.uint8)
    codebook = matrix.new_empty((groups, 2**bits), dtype=torch.float32)
    inertia = matrix.new_empty(groups, dtype=torch.float64)
    for g in range(groups):
        members = slice(g * group_rows, min((g + 1) * group_rows, rows))
        values = matrix[members].reshape(-1)
        if scheme == "linear":
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name}: NaN or Inf among the values; clustering needs finite values")
            result = linear_codebook(values, 2**bits)
        else:
            result = _kmeans_problem(name, values, 2**bits, None if weight is None else weight[members].reshape(-1), options)
        codebook[g], inertia[g] = result.centroids, result.inertia
        packed[members] = ops.pack(result.assignments.view(-1, cols), bits)
    return ClusteredMatrix(packed, codebook, inertia)
