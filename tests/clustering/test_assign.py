import math

import numpy as np
import pytest
import torch

from kmq_kernels import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_centroids", [1, 2, 3, 8, 9, 16, 17, 100, 128, 129, 256])
def test_assign(dtype, num_centroids):
    generator = torch.Generator().manual_seed(num_centroids)
    for batch, n in ((1, 1), (3, 7), (2, 257), (1, 40_003), (2, 0)):
        values = torch.randn(batch, n, generator=generator).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        centroids = torch.randn(batch, num_centroids, generator=generator, dtype=wide).sort(1).values
        centroids[:, num_centroids // 2 :] = centroids[:, num_centroids // 2 :].round(decimals=1)  # ties and repeats
        centroids = centroids.sort(1).values
        got = ops.assign(values, centroids)
        assert got.dtype == torch.uint8
        midpoints = ((centroids[:, 1:] + centroids[:, :-1]) / 2).numpy()
        for b in range(batch):
            assert np.array_equal(got[b].numpy(), np.searchsorted(midpoints[b], values[b].to(wide).numpy()))
        assert torch.equal(got, reference.assign(values, centroids))


def test_ties_go_to_the_lower_index():
    assert ops.assign(torch.tensor([[0.5, 1.5, 1.0, 9.0]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]])).tolist() == [[0, 1, 1, 3]]
    assert ops.assign(torch.tensor([[2.0]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]])).tolist() == [[2]]


def test_strided_input():
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).t()
    centroids = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3)
    assert torch.equal(ops.assign(values, centroids), reference.assign(values.contiguous(), centroids.contiguous()))


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 16, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_goes_to_the_first_centroid(dtype, num_centroids):
    values = torch.arange(40.0)[None].to(dtype)
    nan = torch.tensor([math.nan, -math.nan]).to(dtype)
    values[0, [3, 17, 39]] = nan[[0, 1, 0]]
    centroids = torch.arange(1.0, num_centroids + 1.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)[None]
    for found in (ops.assign(values, centroids), reference.assign(values, centroids)):
        assert found[0, [3, 17, 39]].tolist() == [0, 0, 0]
        assert found[0, 38] == min(37, num_centroids - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_midpoints_of_large_and_small_centroids(dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for centroids, values, expected in (
        (
            [-largest, 0.5 * largest, 0.9 * largest, largest],
            [-largest, 0.0, 0.6 * largest, 0.8 * largest, largest],
            [0, 1, 1, 2, 3],
        ),
        ([smallest, smallest, 3 * smallest], [0.0, smallest, 2 * smallest, 3 * smallest], [0, 0, 1, 2]),
    ):
        table, row = torch.tensor([centroids], dtype=dtype), torch.tensor([values], dtype=dtype)
        assert ops.assign(row, table)[0].tolist() == expected
        assert reference.assign(row, table)[0].tolist() == expected
