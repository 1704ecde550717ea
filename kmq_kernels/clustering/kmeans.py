"""One-dimensional k-means of weights: the optimum (or a proven distance from it), exact Lloyd, and the equal-width baseline.

A problem is solved on *points*: sorted distinct values with their weight (for large tensors: the bins of a histogram with their
exact means). The dynamic program over points, or over cells of neighbouring points, gives the globally optimal partition into
intervals; Lloyd iterations on all points polish it. The labels are then taken from the midpoints of the rounded centroids, so
that `assignments` is exactly `searchsorted(midpoints, values)` for the centroids that are returned.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import ops
from .checks import as_tensor, by_engine, check_options, check_values, check_weight, is_numbers, refuse_values, spread_weights
from .points import Array, Options, points_of, solve_points
from .results import Algorithm, Init, KMeansResult

_INERTIA_CHUNK = 1 << 20


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


def kmeans_problem(name: str, values: Tensor, num_centroids: int, weight: Tensor | None, options: Options) -> KMeansResult:
    problem, problem_weight = _numpy(values), None if weight is None else _numpy(weight)
    refuse_values(name, problem, problem_weight)
    solution = solve_points(*points_of(problem, problem_weight), num_centroids, options)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    centroids = torch.from_numpy(solution.centroids).to(values.device, dtype)
    assignments, inertia = _label(values.detach(), centroids, weight)
    bound = torch.tensor(_bound(float(inertia), solution.lower_bound), dtype=torch.float64, device=values.device)
    n_iter = torch.tensor(solution.n_iter, device=values.device)
    return KMeansResult(centroids, assignments, inertia, n_iter, bound)


def _stack(results: Sequence[KMeansResult]) -> KMeansResult:
    fields = ("centroids", "assignments", "inertia", "n_iter", "bound")
    return KMeansResult(*(torch.stack([getattr(result, field) for result in results]) for field in fields))


def _kmeans_tensor(name: str, values: Tensor, num_centroids: int, weight: Tensor | None, options: Options) -> KMeansResult:
    if values.dim() == 1:
        return kmeans_problem(name, values, num_centroids, weight, options)
    weights = [None] * len(values) if weight is None else list(weight)
    return _stack([kmeans_problem(name, values[b], num_centroids, weights[b], options) for b in range(len(values))])


def _kmeans_compiled(problems: Sequence[tuple[str, Tensor, int, Tensor | None]], options: Options) -> list[KMeansResult]:
    names, tensors, counts, weights = (list(part) for part in zip(*problems, strict=True))
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
    return results


@overload
def kmeans(
    values: Tensor | Array | Sequence[float],
    num_centroids: int,
    *,
    sample_weight: Tensor | Array | Sequence[float] | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> KMeansResult: ...


@overload
def kmeans(
    values: Sequence[Tensor | Array],
    num_centroids: int | Sequence[int],
    *,
    sample_weight: Sequence[Tensor | Array | None] | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> list[KMeansResult]: ...


def kmeans(
    values: Tensor | Array | Sequence[float] | Sequence[Tensor | Array],
    num_centroids: int | Sequence[int],
    *,
    sample_weight: Tensor | Array | Sequence[float] | Sequence[Tensor | Array | None] | None = None,
    algorithm: Algorithm = "optimal",
    init: Init = "k-means++",
    max_iter: int = 300,
    tol: float = 0.0,
    seed: int = 0,
) -> KMeansResult | list[KMeansResult]:
    """Clusters scalars: K centroids and the index of the nearest one for each value, minimising the weighted squared error.

    values: (N,) one problem, (B, N) B problems, or a list of such tensors of any lengths; fp32, fp64, bf16 or fp16, computed in
    fp64; NumPy arrays and, for one problem, a list of numbers will do. num_centroids: K from 1 to 256; a list may have one for
    each tensor. sample_weight: like values, not negative, not all zero in any problem; a value of weight zero gets an index but
    has no say in the centroids.
    algorithm: "optimal" is the global optimum for up to 16,384 values, and beyond solves the problem on a fine adaptive grid by
    dynamic programming, then on the values near the edges between clusters until Lloyd iterations over all values change nothing
    (with more than 64 centroids: on the bins of a histogram); "exact" the global optimum over all distinct values; "lloyd"
    iterates from `init` ("k-means++", "linear", "random", "quantile") until the partition stands still, the centroids move less
    than `tol` (relative to the variance, as in scikit-learn), or `max_iter`.
    On CUDA tensors "optimal" runs on the device, where `bound` is not known; a problem of more than 2**28 values is solved on the
    CPU. Of tensors in a list, each is clustered as if it stood alone.
    seed makes "k-means++" and "random" repeatable; each problem draws from the same seed, whatever stands beside it.

    Returns a KMeansResult, a list of them for a list. The centroids ascend; assignments are searchsorted((c[1:] + c[:-1]) / 2,
    values) in their dtype (the sum wider where it overflows), a tie goes to the lower index. With fewer distinct values than K,
    these values are the first centroids and the largest is repeated; with at least K, no cluster is empty (unless K of them are
    so close that a midpoint cannot lie between two in fp32). Raises ValueError for NaN, Inf, an empty tensor, or weights that are
    negative or all zero; TypeError for other dtypes.
    """
    options = check_options(algorithm, init, max_iter, tol, seed)
    single = not isinstance(values, (list, tuple)) or is_numbers(values)
    names = ["values"] if single else [f"values[{i}]" for i in range(len(values))]
    tensors = [as_tensor(name, each) for name, each in zip(names, [values] if single else values, strict=True)]
    given: Any = [sample_weight] if single and sample_weight is not None else sample_weight
    weights = [
        None if weight is None else as_tensor(f"sample_weight of {name}", weight)
        for name, weight in zip(names, spread_weights(tensors, given), strict=True)
    ]
    counts = [num_centroids] * len(tensors) if isinstance(num_centroids, int) else list(num_centroids)
    if len(counts) != len(tensors):
        raise ValueError(f"num_centroids: expected one for each of the {len(tensors)} tensors, got {len(counts)}")
    for name, tensor, weight, count in zip(names, tensors, weights, counts, strict=True):
        check_values(name, tensor)
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name}: expected shape (N,) or (B, N), got {tuple(tensor.shape)}")
        check_weight(name, tensor, weight)
        if not 1 <= count <= 256:
            raise ValueError(f"num_centroids: expected 1 to 256, got {count}")
    results: dict[int, KMeansResult] = {}
    for device, members in by_engine(tensors, weights).items():
        if device is None:
            results |= {i: _kmeans_tensor(names[i], tensors[i], counts[i], weights[i], options) for i in members}
        else:
            part = [(names[i], tensors[i], counts[i], weights[i]) for i in members]
            results |= zip(members, _kmeans_compiled(part, options), strict=True)
    return results[0] if single else [results[i] for i in range(len(tensors))]


def linear_codebook(values: Tensor | Array | Sequence[float], num_centroids: int) -> KMeansResult:
    """The equal-width baseline: K equal bins over [min, max], each represented by the mean of its members.

    values: (N,) or (B, N), fp32, fp64, bf16 or fp16; num_centroids: K from 1 to 256. Returns a KMeansResult without iterations
    and without bound. An assignment is the number of the bin that the value lies in (lower edge included; the maximum belongs to
    the last bin), which need not be the nearest mean. An empty bin keeps its centre as centroid and has no members; the
    centroids ascend all the same. Raises like `kmeans`.
    """
    values = as_tensor("values", values)
    check_values("values", values)
    if values.dim() not in (1, 2):
        raise ValueError(f"values: expected shape (N,) or (B, N), got {tuple(values.shape)}")
    if not 1 <= num_centroids <= 256:
        raise ValueError(f"num_centroids: expected 1 to 256, got {num_centroids}")
    if values.dim() == 2:
        return _stack([linear_codebook(row, num_centroids) for row in values])
    # A range or a sum of the largest doubles is none.
    unit = 2.0**64 if values.dtype == torch.float64 and float(values.detach().abs().max()) > 2.0**900 else 1.0
    kept, values = values.detach(), values.detach() / unit
    wide = values.double()
    low, high = wide.min(), wide.max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("values: NaN or Inf among the values; clustering needs finite values")
    width = (high - low) / num_centroids
    bins = torch.zeros_like(wide) if bool(high == low) else ((wide - low) / width).floor_().clamp_(0, num_centroids - 1)
    assignments = bins.to(torch.uint8)
    sums, counts = (out[0] for out in ops.update(values[None], assignments[None], num_centroids))
    centres = low + (torch.arange(num_centroids, device=values.device, dtype=torch.float64) + 0.5) * width
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centres).mul(unit).to(dtype)
    inertia = _inertia(kept, centroids, assignments, None)
    unknown = torch.full_like(inertia, math.inf)
    return KMeansResult(centroids, assignments, inertia, torch.zeros((), dtype=torch.int64, device=values.device), unknown)
