"""Clustering where floats are short: iterations used up, values far from zero or near the largest, many decades, mixed lists."""

import math

import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import ops
from kmq_kernels.clustering import cluster_matrices


@pytest.fixture(autouse=True)
def _one_thread():
    """No result depends on threads, and thousands of calls of a millisecond wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(n, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kinds(n):
    """Smooth, heavy tails, two densities, ties."""
    x = gaussian(n)
    chance = torch.rand(n, generator=torch.Generator().manual_seed(1))
    return [x, x**3, torch.where(chance < 0.5, x, x * 0.01 + 2), (x * 40).round() / 40]


@pytest.mark.parametrize("num_centroids", [2, 3, 7, 16, 31, 64])
def test_every_max_iter(num_centroids):
    """Above 16,384 values, iterations may be used up at any of several stages."""
    for n in (300, 16_385, 30_000):
        for values in kinds(n):
            best = float(kmq.kmeans(values, num_centroids).inertia)
            for max_iter in range(1, 31) if n > 16_384 else (1, 30):
                result = kmq.kmeans(values, num_centroids, max_iter=max_iter)
                assert 0 <= int(result.n_iter) <= max_iter
                assert best * (1 - 1e-9) <= float(result.inertia) <= 1.05 * best
                assert (torch.bincount(result.assignments.int(), minlength=num_centroids) > 0).all()


def test_weights_of_a_layer_with_few_iterations():
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256))
    expected = kmq.kmeans(layers[0].weight.detach().reshape(-1), 4, max_iter=1).centroids
    kmq.quantize_(layers, kmq.KMQConfig(bits=2, max_iter=1))
    assert torch.equal(layers[0].codebook.detach()[0], expected)


@pytest.mark.parametrize("plain", [False, True])
def test_iterations_that_end_early_leave_no_cluster_empty(plain, monkeypatch):
    if plain:
        monkeypatch.setattr(ops, "has_kernel", lambda op, key: False)
    for seed in range(20 if plain else 400):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(6, 200, (1,), generator=generator))
        num_centroids = int(torch.randint(2, min(n, 33), (1,), generator=generator))
        values = torch.randn(n, generator=generator) ** (1 + 4 * (seed % 2))
        for init in ("linear", "random", "quantile"):
            options = {"algorithm": "lloyd", "init": init, "seed": seed}
            for stop in ({"max_iter": 1}, {"max_iter": 2}, {"tol": 0.5}):
                result = kmq.kmeans(values, num_centroids, **options, **stop)
                assert (torch.bincount(result.assignments.int(), minlength=num_centroids) > 0).all()
                assert int(result.n_iter) <= stop.get("max_iter", 300)


@pytest.mark.parametrize("algorithm", ["optimal", "exact"])
@pytest.mark.parametrize("n", [3_000, 6_000])
def test_far_from_zero(algorithm, n):
    noise = gaussian(n, 3, torch.float64)
    for offset in (0.0, 1e9, 1e12, -1e13):
        values = noise + offset  # on a grid of 1/512 at 1e13
        best = kmq.kmeans(values - offset, 4, algorithm="exact")
        result = kmq.kmeans(values, 4, algorithm=algorithm)
        ratio = float(result.inertia / best.inertia)
        assert ratio == pytest.approx(1, abs=1e-4 if offset == -1e13 else 1e-5)
        assert ratio <= float(result.bound) * (1 + 1e-9)
        assert float(result.bound) < 1.01


def decades(seed):
    """Values and weights over up to 34 decades; heavy and light, near and far side by side."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(8, 34, (1,), generator=generator))
    wide, heavy = (17 * torch.rand(2, generator=generator)).tolist()
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    values = 10 ** ((torch.rand(n, generator=generator) * 2 - 1) * wide) * sign
    weight = 10 ** ((torch.rand(n, generator=generator) * 2 - 1) * heavy)
    if seed % 4 == 1:
        weight = values.abs().double().pow(-2).clamp(1e-38, 1e38).float()
    elif seed % 4 == 2:
        weight = values.abs().double().pow(-1).float()
    elif seed % 4 == 3:
        values = 1 + torch.randn(n, generator=generator) * 1e-5
        values[:3] = torch.tensor([1e10, -3e9, 5.0])
    return values, weight


@pytest.mark.parametrize("algorithm", ["optimal", "exact"])
def test_many_decades_equal_the_optimum(algorithm):
    for seed in range(36):
        values, weight = decades(seed)
        num_centroids = 2 + seed % 5
        best = oracles.kmeans_optimum_in_fractions(values, num_centroids, weight)
        narrow = kmq.kmeans(values, num_centroids, sample_weight=weight, algorithm=algorithm)
        wide = kmq.kmeans(values.double(), num_centroids, sample_weight=weight, algorithm=algorithm)
        assert float(wide.inertia) == pytest.approx(best, rel=1e-9, abs=1e-300), seed
        assert best * (1 - 1e-9) <= float(narrow.inertia) <= best * float(narrow.bound) * (1 + 1e-9) + 1e-300, seed
        # Next to far outliers, the means of values that lie close are no fp32 numbers: the bound says what that costs.
        assert float(narrow.bound) == pytest.approx(1, rel=0.1 if seed % 4 == 3 else 1e-5), seed


@pytest.mark.parametrize("power", [-1, -2])
@pytest.mark.parametrize("num_centroids", [4, 16, 256])
def test_many_values_over_many_decades(power, num_centroids):
    """In a histogram, small values of a large weight share a bin: then the values are sorted."""
    generator = torch.Generator().manual_seed(5)
    values = 10 ** ((torch.rand(20_000, generator=generator) * 2 - 1) * 8)
    weight = values.double().pow(power).clamp(1e-38, 1e38).float()
    best = kmq.kmeans(values, num_centroids, sample_weight=weight, algorithm="exact")
    result = kmq.kmeans(values, num_centroids, sample_weight=weight)
    assert float(best.bound) < 1.00001
    assert float(result.inertia) <= 1.01 * float(best.inertia)
    assert float(result.bound) < 1.5


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 3.4e38), (torch.bfloat16, 3.38e38), (torch.float16, 65504.0)])
def test_near_the_largest_value(dtype, largest, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(ops, "has_kernel", lambda op, key: False)
    four = (torch.tensor([-1.0, 0.5, 0.75, 0.99]) * largest).to(dtype)
    for values in (four, four.repeat(5_000), torch.cat([four.repeat(5_000), four[1:2] * 0.999])):
        result = kmq.kmeans(values, 4)
        expected = torch.where(values == values[-1], 1, torch.arange(len(values)) % 4) if len(values) % 4 else None
        assert torch.equal(result.assignments.int(), torch.arange(len(values)).int() % 4 if expected is None else expected.int())
        assert math.isfinite(float(result.inertia))
        assert float(result.bound) < 1.0001
        row = kmq.kmeans(values[None], 4)
        assert torch.equal(row.assignments[0], result.assignments)
    (out,) = cluster_matrices([four.repeat(1, 33).view(4, 33)], [2], group_rows=[4])
    assert kmq.unpack(out.packed, 2, 33).unique().numel() == 4


def test_near_the_largest_value_many_distinct():
    values = (gaussian(30_000).clamp(-4, 4) / 4 * 1e38 + 2.3e38).clamp(max=3.4e38)
    result, small = kmq.kmeans(values, 16), kmq.kmeans(values / 2.0**100, 16)
    assert float(result.inertia) == pytest.approx(float(small.inertia) * 2.0**200, rel=1e-4)  # bins are not as fine out there
    assert torch.allclose(result.centroids / 2.0**100, small.centroids, rtol=1e-2)
    assert float(result.bound) < 1.02


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1.7e308])
def test_doubles_whose_squares_are_none(size):
    values = gaussian(500, 2, torch.float64).clamp(-4, 4) / 4
    for algorithm in ("optimal", "exact", "lloyd"):
        one, scaled = kmq.kmeans(values, 8, algorithm=algorithm), kmq.kmeans(values * size, 8, algorithm=algorithm)
        assert torch.allclose(scaled.centroids / size, one.centroids, rtol=1e-9)
        assert (scaled.assignments != one.assignments).sum() <= 1
    weight = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heavy = kmq.kmeans(values, 8, sample_weight=weight * size)
    assert torch.allclose(heavy.centroids, kmq.kmeans(values, 8, sample_weight=weight).centroids, rtol=1e-9)


def test_linear_codebook_of_a_range_that_is_no_double():
    values = torch.tensor([-1.7e308, -1.6e308, 0.0, 1.0e308, 1.7e308], dtype=torch.float64)
    result = kmq.linear_codebook(values, 4)
    assert result.assignments.tolist() == [0, 0, 2, 3, 3]
    assert torch.allclose(result.centroids / 1e308, torch.tensor([-1.65, -0.425, 0.0, 1.35], dtype=torch.float64))


def test_tensors_of_a_list_do_not_change_each_other():
    values = [gaussian(40_000, 1), gaussian(500, 2).bfloat16().view(2, 250), gaussian(3_000, 3)]
    wide, weight = gaussian(200, 4, torch.float64), torch.rand(3_000, generator=torch.Generator().manual_seed(5))
    weights = [None, None, weight]
    alone = [kmq.kmeans(one, 8, sample_weight=w, algorithm="lloyd", seed=3) for one, w in zip(values, weights, strict=True)]
    beside = kmq.kmeans([wide, *values], 8, sample_weight=[None, *weights], algorithm="lloyd", seed=3)
    assert beside[0].centroids.dtype == torch.float64
    for one, other in zip(alone, beside[1:], strict=True):
        for name in ("centroids", "assignments", "inertia", "n_iter", "bound"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    wide_weight = kmq.kmeans([values[0], values[2]], 8, sample_weight=[None, weight.double()], algorithm="lloyd", seed=3)
    assert torch.equal(wide_weight[0].centroids, alone[0].centroids)


def test_matrices_of_a_model_do_not_change_each_other():
    matrices = [gaussian(640, seed).view(8, 80) for seed in range(4)]
    weights = [None, torch.rand(8, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None, None]
    seen = []
    options = {"group_rows": [8, 8, 4, 8], "algorithm": "lloyd", "seed": 1}
    together = cluster_matrices(matrices, [3] * 4, sample_weight=weights, on_done=seen.append, **options)
    assert sorted(seen) == [0, 1, 2, 3]
    for i in (0, 2, 3):
        (alone,) = cluster_matrices([matrices[i]], [3], **{**options, "group_rows": [options["group_rows"][i]]})
        for part, other in zip(alone, together[i], strict=True):
            assert torch.equal(part, other)
