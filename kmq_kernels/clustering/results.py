"""What clustering gives, and its choices."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Algorithm = Literal["optimal", "lloyd", "exact"]
Init = Literal["k-means++", "linear", "random", "quantile"]
Scheme = Literal["kmeans", "linear"]


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
