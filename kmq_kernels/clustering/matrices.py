"""cluster_matrices: all weights of a model, as codebooks and packed indices."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..packing import row_bytes
from .checks import by_engine, check_options, check_values, check_weight, spread_weights
from .kmeans import kmeans_problem, linear_codebook
from .points import Options
from .results import Algorithm, ClusteredMatrix, Init, Scheme

_BATCH = 1 << 26  # weights handed to the compiled engine at a time


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
    options = check_options(algorithm, init, max_iter, tol, seed)
    matrices = list(weights)
    if scheme not in ("kmeans", "linear"):
        raise ValueError(f"scheme: expected kmeans or linear, got {scheme!r}")
    if scheme == "linear" and sample_weight is not None and any(weight is not None for weight in sample_weight):
        raise ValueError("sample_weight: the linear scheme takes no weights")
    called = [f"weights[{i}]" for i in range(len(matrices))] if names is None else list(names)
    importance = spread_weights(matrices, sample_weight)
    for what, given in (("bits", bits), ("group_rows", group_rows), ("names", called)):
        if len(given) != len(matrices):
            raise ValueError(f"{what}: expected one for each of the {len(matrices)} weights, got {len(given)}")
    for name, matrix, width, group, weight in zip(called, matrices, bits, group_rows, importance, strict=True):
        check_values(name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, cols), got {tuple(matrix.shape)}")
        check_weight(name, matrix, weight)
        if not 1 <= width <= 8:
            raise ValueError(f"bits of {name}: expected 1 to 8, got {width}")
        if group < 1:
            raise ValueError(f"group_rows of {name}: expected at least 1, got {group}")
    matrices = [matrix.detach() for matrix in matrices]
    matrices = [matrix.float() if matrix.dtype == torch.float64 else matrix for matrix in matrices]
    engines = by_engine(matrices, importance) if scheme == "kmeans" else {None: list(range(len(matrices)))}
    done: dict[int, ClusteredMatrix] = {}
    for device, members in engines.items():
        for batch in _batches(matrices, members, device):
            if device is None:
                (i,) = batch
                done[i] = _cluster_matrix(called[i], matrices[i], bits[i], group_rows[i], scheme, importance[i], options)
            else:
                labels, centroids, inertia, _, _ = ops.kmeans(
                    [matrices[i] for i in batch], [importance[i] for i in batch], [2 ** bits[i] for i in batch],
                    [group_rows[i] for i in batch], True, *options, names=[called[i] for i in batch],
                )  # fmt: skip
                done |= zip(batch, map(ClusteredMatrix, labels, centroids, inertia), strict=True)
            if on_done is not None:
                for i in batch:
                    on_done(i)
    return [done[i] for i in range(len(matrices))]


def _batches(matrices: Sequence[Tensor], members: Sequence[int], device: torch.device | None) -> Iterator[list[int]]:
    """Neighbouring matrices: work for all threads, small enough for progress to be seen. On a GPU all, without engine one."""
    most = 0 if device is None else _BATCH if device.type == "cpu" else math.inf
    batch: list[int] = []
    size = 0
    for i in members:
        batch.append(i)
        size += matrices[i].numel()
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cluster_matrix(
    name: str, matrix: Tensor, bits: int, group_rows: int, scheme: str, weight: Tensor | None, options: Options
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
            result = kmeans_problem(name, values, 2**bits, None if weight is None else weight[members].reshape(-1), options)
        codebook[g], inertia[g] = result.centroids, result.inertia
        packed[members] = ops.pack(result.assignments.view(-1, cols), bits)
    return ClusteredMatrix(packed, codebook, inertia)
