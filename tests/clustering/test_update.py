import numpy as np
import pytest
import torch

from kmq_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_centroids", [1, 2, 16, 256])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_update(dtype, num_centroids, weight_dtype):
    generator = torch.Generator().manual_seed(num_centroids)
    for batch, n in ((1, 1), (3, 70), (2, 66_000), (1, 0)):
        values = torch.randn(batch, n, generator=generator).to(dtype)
        assignments = torch.randint(num_centroids, (batch, n), generator=generator).to(torch.uint8)
        weight = None if weight_dtype is None else torch.rand(batch, n, generator=generator).to(weight_dtype)
        sums, weights = ops.update(values, assignments, num_centroids, weight)
        assert sums.dtype == weights.dtype == torch.float64
        for b in range(batch):
            w = np.ones(n) if weight is None else weight[b].double().numpy()
            index = assignments[b].long().numpy()
            expected = np.zeros(num_centroids), np.zeros(num_centroids)
            np.add.at(expected[0], index, w * values[b].double().numpy())
            np.add.at(expected[1], index, w)
            assert np.allclose(sums[b].numpy(), expected[0], rtol=1e-10, atol=1e-9)
            assert np.allclose(weights[b].numpy(), expected[1], rtol=1e-12)


def test_threads_do_not_change_a_bit():
    values = torch.randn(1, 300_000, generator=torch.Generator().manual_seed(0))
    assignments = (values > 0).to(torch.uint8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.update(values, assignments, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
