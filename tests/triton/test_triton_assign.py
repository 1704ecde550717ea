"""`assign`, `update` and the fused step in Triton against NumPy; padding lanes and neighbours are not touched."""

import numpy as np
import oracles
import pytest
import torch

from kmq_kernels import reference
from kmq_kernels.triton_kernels import assign as triton_assign
from kmq_kernels.triton_kernels import update as triton_update
from kmq_kernels.triton_kernels import worklist

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, num_centroids, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values, torch.randn(shape[0], num_centroids, generator=generator).round(decimals=1).sort(1).values


def expected_labels(values, centroids):
    """The oracle: searchsorted of the midpoints, per row of values."""
    middle = ((centroids[:, 1:] + centroids[:, :-1]) / 2).numpy()
    rows = [np.searchsorted(middle[b], values[b].float().numpy()) for b in range(len(values))]
    return torch.from_numpy(np.stack(rows).astype(np.uint8))


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 8, 9, 16, 100, 256])
def test_assign(num_centroids, device):
    for dtype in DTYPES if num_centroids in (16, 256) else DTYPES[:1]:
        for shape in ((1, 1), (3, 7), (2, 4096), (1, 4097), (2, 0)):
            values, centroids = problem(shape, num_centroids, dtype)
            got = triton_assign.assign(values.to(device), centroids.to(device))
            assert torch.equal(got.cpu(), expected_labels(values, centroids))


def test_ties_go_to_the_lower_index(device):
    values, centroids = torch.tensor([[0.5, 1.5, 1.0, 9.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]])
    assert triton_assign.assign(values.to(device), centroids.to(device)).tolist() == [[0, 1, 1, 3, 2]]


@pytest.mark.parametrize("num_centroids", [2, 4, 9, 200])
def test_neighbours_of_the_midpoints_and_extremes(num_centroids, device):
    """The smallest steps to either side of a midpoint, denormal values among them, the largest floats, infinities."""
    centroids = (torch.randn(3, num_centroids) * torch.tensor([[1.0], [1e-38], [1e37]])).sort(1).values
    middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
    up, down = torch.full_like(middle, torch.inf), torch.full_like(middle, -torch.inf)
    ends = torch.tensor([3.4028234e38, -3.4028234e38, torch.inf, -torch.inf, 0.0, -0.0, 1e-45]).expand(3, -1)
    values = torch.cat([middle, middle.nextafter(up), middle.nextafter(down), ends], 1)
    got = triton_assign.assign(values.to(device), centroids.to(device))
    assert torch.equal(got.cpu(), expected_labels(values, centroids))


@pytest.mark.parametrize("bits", range(1, 9))
def test_ragged_and_packed(bits, device):
    """One launch for tensors of any size, whole blocks and tails; the packed bytes are those of the drawing."""
    shapes = ((5, 300), (0, 7), (1, 1), (33, 128), (2, 129))
    for dtype in DTYPES if bits == 3 else DTYPES[:1]:
        values = [problem(shape, 1, dtype, seed)[0] for seed, shape in enumerate(shapes)]
        centroids = torch.randn(len(shapes), 2**bits).sort(1).values
        given = [tensor.to(device) for tensor in values]
        flat = triton_assign.assign_ragged(given, centroids.to(device))
        packed = triton_assign.assign_ragged(given, centroids.to(device), packed=True)
        for p, tensor in enumerate(values):
            labels = expected_labels(tensor.reshape(1, -1), centroids[p : p + 1]).view(tensor.shape)
            assert torch.equal(flat[p].cpu(), labels)
            assert np.array_equal(packed[p].cpu().numpy(), oracles.packed_bytes(labels.numpy(), bits))


def test_neighbours_are_not_touched(device):
    """Outputs inside a larger tensor, at odd addresses: what lies on either side keeps its sentinel."""
    for n, start in ((4096, 16), (4095, 1), (130, 3)):
        values, centroids = problem((1, n), 16, torch.float32)
        kept = values.to(device)
        around = torch.full((n + 64,), 77, dtype=torch.uint8, device=device)
        out = around[start : start + n]
        work = worklist.build_batch(kept, out, None, triton_assign.TILE)
        triton_assign._launch(work, centroids.to(device), torch.float32, False)
        assert torch.equal(out.cpu(), expected_labels(values, centroids)[0])
        assert (around[:start] == 77).all()
        assert (around[start + n :] == 77).all()


def expected_sums(values, labels, weight, num_centroids):
    sums, weights = np.zeros((2, len(values), num_centroids))
    for b in range(len(values)):
        w = np.ones(values.shape[1]) if weight is None else weight[b].double().numpy()
        np.add.at(sums[b], labels[b].numpy(), w * values[b].double().numpy())
        np.add.at(weights[b], labels[b].numpy(), w)
    return sums, weights


def assert_sums(got, values, labels, weight, num_centroids):
    sums, weights = expected_sums(values, labels, weight, num_centroids)
    size, _ = expected_sums(values.abs(), labels, weight, num_centroids)
    assert got[0].dtype == got[1].dtype == torch.float64
    assert (np.abs(got[0].cpu().numpy() - sums) <= 2e-6 * size + 1e-30).all()
    assert np.allclose(got[1].cpu().numpy(), weights, rtol=0 if weight is None else 2e-6, atol=0)


@pytest.mark.parametrize("num_centroids", [1, 2, 5, 16, 20, 256])
def test_update_and_step(num_centroids, device):
    for dtype in DTYPES if num_centroids == 16 else DTYPES[:1]:
        more = ((1, 16_500),) if num_centroids in (16, 256) and dtype == torch.float32 else ()
        for shape in ((1, 1), (2, 4100 if num_centroids <= 16 else 200), (1, 0), *more):
            values, centroids = problem(shape, num_centroids, dtype, seed=3)
            labels = torch.randint(num_centroids, shape).to(torch.uint8)
            weight = torch.rand(shape)
            for w in (None, weight):
                given = None if w is None else w.to(device)
                got = triton_update.update(values.to(device), labels.to(device), num_centroids, given)
                assert_sums(got, values, labels, w, num_centroids)
                nearest, *got = triton_update.step(values.to(device), centroids.to(device), given)
                assert torch.equal(nearest.cpu(), expected_labels(values, centroids))
                assert_sums(got, values, nearest.cpu(), w, num_centroids)


def test_sums_of_a_ragged_list(device):
    values = [torch.randn(0), torch.randn(1), torch.randn(70, 100), torch.randn(13)]
    centroids = torch.randn(4, 8).sort(1).values
    given = [tensor.to(device) for tensor in values]
    weights = [torch.rand_like(tensor) for tensor in values]
    labels, sums, counts = triton_update.step_ragged(given, centroids.to(device), [w.to(device) for w in weights])
    again = triton_update.step_ragged(given, centroids.to(device), [w.to(device) for w in weights])
    assert torch.equal(sums, again[1])
    assert torch.equal(sums, triton_update.update_ragged(given, labels, 8, [w.to(device) for w in weights])[0])
    counted = triton_update.update_ragged(given, labels, 8)[1].cpu()
    assert torch.equal(counted, torch.stack([torch.bincount(part.cpu().ravel(), minlength=8) for part in labels]).double())
    for p, tensor in enumerate(values):
        flat = tensor.reshape(1, -1)
        assert torch.equal(labels[p].cpu().reshape(1, -1), expected_labels(flat, centroids[p : p + 1]))
        part = sums[p : p + 1], counts[p : p + 1]
        assert_sums(part, flat, labels[p].cpu().reshape(1, -1), weights[p].reshape(1, -1), 8)


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 9, 16, 200])
def test_nan_goes_to_the_first_centroid(num_centroids, device):
    """Of both signs on a device, whose sums give a NaN without sign. NumPy, which interprets, keeps the sign, and torch makes
    that of a bf16 NaN negative."""
    on_device = device == "cuda"
    nan = [float("nan"), -float("nan") if on_device else float("nan")]
    for dtype in DTYPES if on_device else (torch.float32, torch.float16):
        values = torch.arange(40.0)[None]
        values[0, [3, 39]] = torch.tensor(nan)
        values = values.to(dtype)
        centroids = torch.arange(1.0, num_centroids + 1.0)[None]
        got = triton_assign.assign(values.to(device), centroids.to(device))
        assert torch.equal(got.cpu(), reference.assign(values, centroids))
        assert got[0, [3, 39]].tolist() == [0, 0]


def test_midpoints_whose_sum_is_no_float(device):
    largest = torch.finfo(torch.float32).max
    centroids = torch.tensor([[-1.0, 0.5, 0.9, 1.0]]) * largest
    values = torch.tensor([[-1.0, 0.0, 0.6, 0.8, 1.0]]) * largest
    assert triton_assign.assign(values.to(device), centroids.to(device)).tolist() == [[0, 1, 1, 2, 3]]
