"""assign and update: the two halves of a Lloyd iteration."""

import torch
from torch import Tensor

from ._checks import expect_centroids, expect_dim, expect_float, expect_same_device
from ._define import define, kmq

# assign


define("assign(Tensor values, Tensor centroids) -> Tensor")


def _check_assign(values: Tensor, centroids: Tensor) -> None:
    expect_float("values", values)
    expect_float("centroids", centroids)
    expect_dim("values", values, 2, "(B, N)")
    expect_dim("centroids", centroids, 2, "(B, K)")
    expect_centroids(centroids.shape[1])
    expect_same_device("centroids", centroids, values)
    if centroids.shape[0] != values.shape[0]:
        raise ValueError(f"centroids: expected one row for each of the {values.shape[0]} problems, got {centroids.shape[0]}")


@torch.library.register_fake("kmq::assign")
def _(values: Tensor, centroids: Tensor) -> Tensor:
    _check_assign(values, centroids)
    return torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each value: `searchsorted` of the midpoints, a tie goes to the lower index, NaN to 0.

    A midpoint of two centroids is (a + b) / 2 rounded once, also where a + b is too large for their dtype.
    values: (B, N) fp32, fp64, bf16 or fp16. centroids: (B, K) ascending, K from 1 to 256, fp32 or fp64.
    Returns assignments (B, N) uint8. Raises TypeError or ValueError for other shapes or dtypes.
    """
    _check_assign(values, centroids)
    return kmq.assign(values, centroids)


# update


define("update(Tensor values, Tensor assignments, int num_centroids, Tensor? sample_weight=None) -> (Tensor, Tensor)")


def _check_update(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None) -> None:
    expect_float("values", values)
    expect_dim("values", values, 2, "(B, N)")
    expect_centroids(num_centroids)
    if assignments.dtype != torch.uint8 or assignments.shape != values.shape:
        raise ValueError(f"assignments: expected uint8 {tuple(values.shape)}, got {assignments.dtype} {tuple(assignments.shape)}")
    if sample_weight is not None:
        expect_float("sample_weight", sample_weight)
        if sample_weight.shape != values.shape:
            raise ValueError(f"sample_weight: expected shape {tuple(values.shape)}, got {tuple(sample_weight.shape)}")


@torch.library.register_fake("kmq::update")
def _(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_update(values, assignments, num_centroids, sample_weight)
    sums = values.new_empty(values.shape[0], num_centroids, dtype=torch.float64)
    return sums, torch.empty_like(sums)


def update(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of weight * value and of weight over the members of each cluster: the two halves of a Lloyd update.

    values: (B, N) floating point; assignments: (B, N) uint8 below num_centroids; sample_weight: (B, N) or None for ones.
    Returns (sums, weights), both (B, K) fp64. Raises TypeError or ValueError for other shapes or dtypes.
    """
    _check_update(values, assignments, num_centroids, sample_weight)
    return kmq.update(values, assignments, num_centroids, sample_weight)
