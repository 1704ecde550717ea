import math
import os
import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import ops
from kmq_kernels.clustering import cluster_matrices

ALGORITHMS = ("optimal", "lloyd", "exact")


def gaussian(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def heavy_weights(n, seed=1):
    """Ten decades, as squared gradients have."""
    return 10 ** (torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 10 - 10)


def check(values, result, weight=None, num_centroids=None):
    """What every result promises, for one problem."""
    centroids, assignments = result.centroids, result.assignments
    assert centroids.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    assert assignments.dtype == torch.uint8
    assert assignments.shape == values.shape
    assert centroids.shape == (num_centroids or len(centroids),)
    assert (centroids[1:] >= centroids[:-1]).all()
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    assert torch.equal(assignments.long(), torch.searchsorted(midpoints, values.to(centroids.dtype)))
    error = (values.double() - centroids.double()[assignments.long()]) ** 2
    error = error if weight is None else error * weight.double()
    assert result.inertia.dtype == torch.float64
    assert result.n_iter.dtype == torch.int64
    assert float(result.inertia) == pytest.approx(math.fsum(error.tolist()), rel=1e-11, abs=1e-300)
    used = values if weight is None else values[weight > 0]
    if len(used.unique()) >= len(centroids):
        assert (torch.bincount(assignments.long(), minlength=len(centroids)) > 0).all()


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_and_optimal_equal_every_partition(num_centroids, weighted):
    for seed in range(6):
        values = gaussian(9, seed) * 10.0 ** (seed - 3) + (100 if seed == 4 else 0)
        weight = heavy_weights(9, seed) if weighted else None
        best = oracles.kmeans_every_partition(values, num_centroids, weight)
        for algorithm in ("exact", "optimal"):
            result = kmq.kmeans(values.double(), num_centroids, sample_weight=weight, algorithm=algorithm)
            check(values.double(), result, weight, num_centroids)
            assert float(result.inertia) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("num_centroids", [2, 7, 16, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_equals_the_oracle(num_centroids, weighted):
    values = gaussian(700, 3) ** 3
    weight = heavy_weights(700) if weighted else None
    best = oracles.kmeans_optimum(values, num_centroids, weight)
    result = kmq.kmeans(values, num_centroids, sample_weight=weight, algorithm="exact")
    check(values, result, weight, num_centroids)
    assert float(result.inertia) == pytest.approx(best, rel=1e-5)
    assert float(result.bound) == pytest.approx(1, rel=1e-5)


def distributions(n):
    t = torch.distributions.StudentT(torch.tensor(5.0))
    torch.manual_seed(5)
    normal = gaussian(n, 7)
    sparse = torch.where(torch.rand(n) < 0.5, 0.0, normal)
    outliers = normal.clone()
    outliers[3], outliers[n // 2] = 1e4, -2e4
    levels = torch.linspace(-1, 1, 300)[torch.randint(300, (n,))]
    return {
        "gaussian": normal * 0.03,
        "student_t": t.sample((n,)) * 0.032,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((n,)),
        "half_zeros": sparse,
        "two_outliers": outliers,
        "three_values": torch.tensor([-0.5, 0.1, 0.7])[torch.randint(3, (n,))],
        "constant": torch.full((n,), 0.3),
        "quantized": levels,
        "far_from_zero": normal * 0.01 + 1,
        "bfloat16": normal.bfloat16(),
        "float16": (normal * 0.05).half(),
        "huge": normal * 1e30,
        "tiny": normal * 1e-30,
    }


@pytest.mark.parametrize("name", distributions(4))
@pytest.mark.parametrize("num_centroids", [2, 16, 256])
def test_optimal_is_near_the_optimum_and_knows_how_near(name, num_centroids):
    for n in (3000, 60000):
        values = distributions(n)[name]
        optimum = float(kmq.kmeans(values, num_centroids, algorithm="exact").inertia)
        result = kmq.kmeans(values, num_centroids)
        check(values, result, None, num_centroids)
        limit = 1.0001 if num_centroids <= 16 else 1.001
        assert float(result.inertia) <= limit * optimum + 1e-300
        assert float(result.inertia) <= float(result.bound) * optimum * (1 + 1e-6) or float(result.inertia) == 0
        assert float(result.bound) < 1.25


@pytest.mark.parametrize("name", distributions(4))
@pytest.mark.parametrize("num_centroids", [2, 4, 16, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_optimal_stands_still_under_lloyd(name, num_centroids, weighted):
    """In float64, over all values: large problems too are solved on the values in the end, not on the bins of a histogram."""
    values = distributions(60_000)[name]
    weight = heavy_weights(len(values)) if weighted else None
    result = kmq.kmeans(values, num_centroids, sample_weight=weight)
    check(values, result, weight, num_centroids)
    x = values.double()
    w = torch.ones_like(x) if weight is None else weight.double()
    index, c = result.assignments.long(), result.centroids.double()
    mass = torch.bincount(index, w, num_centroids)
    used = mass > 0
    means = torch.where(used, torch.bincount(index, w * x, num_centroids) / mass, c)
    size = float((w * (x - (w * x).sum() / w.sum()) ** 2).sum() / w.sum()) ** 0.5
    assert torch.allclose(c, means, rtol=3e-7, atol=3e-7 * size)
    again = torch.searchsorted((means[1:] + means[:-1]) / 2, x)
    cost, next_cost = (float((w * (x - means[k]) ** 2).sum()) for k in (index, again))
    assert cost <= next_cost * (1 + 1e-9) + 1e-24 * float((w * x * x).sum())


@pytest.mark.parametrize("name", ["gaussian", "student_t", "laplace", "half_zeros", "two_outliers", "far_from_zero", "bfloat16"])
def test_few_centroids_reach_the_optimum(name):
    """Up to optima of single values: a few hundred values further on, an edge may be better by parts in a thousand million."""
    values = distributions(60_000)[name]
    for num_centroids in (2, 4):
        optimum = float(kmq.kmeans(values, num_centroids, algorithm="exact").inertia)
        assert float(kmq.kmeans(values, num_centroids).inertia) <= optimum * (1 + 1e-8)
    best = min(float(kmq.kmeans(values, 16, algorithm="lloyd", seed=seed).inertia) for seed in range(5))
    assert float(kmq.kmeans(values, 16).inertia) <= best * (1 + 1e-12)


@pytest.mark.parametrize("num_centroids", [2, 3, 7, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_problems_with_ties_equal_the_oracle(num_centroids, weighted):
    """4000 distinct values, each several times, in more bins than are tried as few distinct values."""
    values = (gaussian(4000, 17) ** 3).repeat(6)[torch.randperm(24_000, generator=torch.Generator().manual_seed(3))]
    weight = heavy_weights(len(values), 5) if weighted else None
    best = oracles.kmeans_optimum(values, num_centroids, weight)
    result = kmq.kmeans(values, num_centroids, sample_weight=weight)
    check(values, result, weight, num_centroids)
    assert float(result.inertia) <= best * (1 + 1e-6)
    assert float(result.inertia) >= best * (1 - 1e-9)


@pytest.mark.parametrize("num_centroids", [2, 16, 256])
def test_weighted_optimal_is_near_the_optimum(num_centroids):
    for n in (2500, 50000):
        values, weight = gaussian(n, 11), heavy_weights(n)
        optimum = float(kmq.kmeans(values, num_centroids, sample_weight=weight, algorithm="exact").inertia)
        result = kmq.kmeans(values, num_centroids, sample_weight=weight)
        check(values, result, weight, num_centroids)
        assert float(result.inertia) <= (1.0001 if num_centroids <= 16 else 1.001) * optimum
        assert float(result.inertia) <= float(result.bound) * optimum * (1 + 1e-6)


@pytest.mark.parametrize("init", ["k-means++", "linear", "random", "quantile"])
@pytest.mark.parametrize("max_iter", [1, 3, 300])
def test_lloyd(init, max_iter):
    values = gaussian(5000, 2)
    result = kmq.kmeans(values, 16, algorithm="lloyd", init=init, max_iter=max_iter)
    check(values, result, None, 16)
    assert 1 <= int(result.n_iter) <= max_iter
    assert math.isinf(float(result.bound))
    again = kmq.kmeans(values, 16, algorithm="lloyd", init=init, max_iter=max_iter)
    assert torch.equal(result.centroids, again.centroids)
    optimum = float(kmq.kmeans(values, 16, algorithm="exact").inertia)
    assert float(result.inertia) >= optimum * (1 - 1e-6)
    if max_iter == 300:  # at rest: every centroid is the mean of its members
        means = [values[result.assignments == k].double().mean() for k in range(16)]
        assert torch.allclose(result.centroids.double(), torch.stack(means), rtol=1e-6)


def test_lloyd_steps_are_lloyd_steps():
    values = gaussian(2000, 8)
    c = torch.linspace(float(values.min()), float(values.max()), 8).double()
    for _ in range(4):
        index = torch.searchsorted((c[1:] + c[:-1]) / 2, values.double())
        c = torch.stack([values[index == k].double().mean() for k in range(8)])
    result = kmq.kmeans(values, 8, algorithm="lloyd", init="linear", max_iter=4)
    assert torch.allclose(result.centroids.double(), c, rtol=1e-6)


def test_tol_stops_earlier_and_seed_matters():
    values = gaussian(20000, 4)
    rest = kmq.kmeans(values, 16, algorithm="lloyd", seed=1)
    early = kmq.kmeans(values, 16, algorithm="lloyd", seed=1, tol=1e-4)
    assert int(early.n_iter) < int(rest.n_iter)
    other = kmq.kmeans(values, 16, algorithm="lloyd", seed=2, max_iter=1)
    assert not torch.equal(other.centroids, kmq.kmeans(values, 16, algorithm="lloyd", seed=1, max_iter=1).centroids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_values_than_centroids(algorithm):
    for values in ([2.0], [1.0, 1.0, 1.0], [3.0, -1.0, 3.0], [0.0, -0.0, 5.0]):
        values = torch.tensor(values)
        result = kmq.kmeans(values, 4, algorithm=algorithm)
        known = torch.tensor(sorted(set(values.tolist())))
        assert torch.equal(result.centroids, torch.cat([known, known[-1:].expand(4 - len(known))]))
        assert int(result.assignments.max()) < len(known)
        assert float(result.inertia) == 0
        assert float(result.bound) == 1


def test_no_empty_cluster_with_awkward_values():
    values = torch.cat([torch.zeros(5000), torch.tensor([1e-8, 2e-8, 5.0, 1e6, 1e6 + 1])])
    for algorithm in ALGORITHMS:
        for num_centroids in (2, 4, 6):
            check(values, kmq.kmeans(values, num_centroids, algorithm=algorithm, init="linear"), None, num_centroids)


def test_batches_and_lists():
    values = gaussian(3 * 500, 6).view(3, 500)
    batch = kmq.kmeans(values, 8)
    assert batch.centroids.shape == (3, 8)
    assert batch.assignments.shape == (3, 500)
    assert batch.inertia.shape == batch.n_iter.shape == batch.bound.shape == (3,)
    for b in range(3):
        one = kmq.kmeans(values[b], 8)
        assert one.inertia.shape == ()
        assert torch.equal(one.centroids, batch.centroids[b])
        assert torch.equal(one.assignments, batch.assignments[b])
    ragged = kmq.kmeans([values[0], values, gaussian(7)], [8, 8, 2])
    assert torch.equal(ragged[0].centroids, batch.centroids[0])
    assert torch.equal(ragged[1].assignments, batch.assignments)
    assert ragged[2].centroids.shape == (2,)
    assert kmq.kmeans([], 4) == []
    strided = kmq.kmeans(values.t().contiguous().t(), 8)
    assert torch.equal(strided.assignments, batch.assignments)


@pytest.mark.parametrize("bits", range(1, 9))
def test_cluster_matrices(bits):
    matrices = [gaussian(10 * 70, bits).view(10, 70), gaussian(6 * 128).view(6, 128).bfloat16(), gaussian(300).view(300, 1)]
    groups = [4, 1, 300]
    seen = []
    out = cluster_matrices(matrices, [bits] * 3, group_rows=groups, on_done=seen.append)
    assert seen == [0, 1, 2]
    for matrix, group, result in zip(matrices, groups, out, strict=True):
        rows, cols = matrix.shape
        assert result.codebook.shape == (-(-rows // group), 2**bits)
        assert result.codebook.dtype == torch.float32
        index = kmq.unpack(result.packed, bits, cols)
        assert torch.equal(kmq.pack(index, bits), result.packed)
        for g in range(len(result.codebook)):
            part = slice(g * group, (g + 1) * group)
            alone = kmq.kmeans(matrix[part].reshape(-1), 2**bits)
            assert torch.equal(alone.centroids, result.codebook[g])
            assert torch.equal(alone.assignments.view(-1, cols), index[part])
            assert float(alone.inertia) == pytest.approx(float(result.inertia[g]), rel=1e-12)


def test_cluster_matrices_weighted_and_linear():
    matrix, weight = gaussian(640).view(8, 80), heavy_weights(640).view(8, 80)
    (out,) = cluster_matrices([matrix], [3], group_rows=[8], sample_weight=[weight])
    alone = kmq.kmeans(matrix.reshape(-1), 8, sample_weight=weight.reshape(-1))
    assert torch.equal(out.codebook[0], alone.centroids)
    (out,) = cluster_matrices([matrix], [3], group_rows=[2], scheme="linear")
    for g in range(4):
        alone = kmq.linear_codebook(matrix[2 * g : 2 * g + 2].reshape(-1), 8)
        assert torch.equal(out.codebook[g], alone.centroids)
        assert torch.equal(kmq.unpack(out.packed[2 * g : 2 * g + 2], 3, 80), alone.assignments.view(2, 80))


def test_linear_codebook():
    values = gaussian(4000, 9)
    result = kmq.linear_codebook(values, 8)
    x = values.double().numpy()
    edges = np.linspace(x.min(), x.max(), 9)
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 7)
    assert np.array_equal(result.assignments.numpy(), index)
    means = np.array([x[index == k].mean() for k in range(8)])
    assert np.allclose(result.centroids.numpy(), means, rtol=1e-6)
    assert float(result.inertia) == pytest.approx(((x - means[index]) ** 2).sum(), rel=1e-6)
    empty = kmq.linear_codebook(torch.tensor([0.0, 0.1, 4.0]), 4)
    assert torch.allclose(empty.centroids, torch.tensor([0.05, 1.5, 2.5, 4.0]))
    assert empty.assignments.tolist() == [0, 0, 3]
    constant = kmq.linear_codebook(torch.full((2, 5), 0.3), 4)
    assert constant.assignments.max() == 0
    assert constant.centroids.shape == (2, 4)
    assert float(constant.inertia.sum()) == 0


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.0095)])
def test_gaussian_error_is_that_of_lloyd_and_max(bits, mse):
    values = gaussian(200_000, 12)
    result = kmq.kmeans(values, 2**bits)
    assert float(result.inertia) / len(values) / float(values.var()) == pytest.approx(mse, rel=0.01)
    assert float(kmq.linear_codebook(values, 2**bits).inertia) >= float(result.inertia)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [50, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(bad, n, dtype):
    values = gaussian(n).to(dtype)
    values[n - 3] = bad
    with pytest.raises(ValueError, match=r"values\[1\]: NaN or Inf"):
        kmq.kmeans([gaussian(10), values], 4)
    with pytest.raises(ValueError, match=r"query: NaN or Inf"):
        cluster_matrices([gaussian(20).view(4, 5), values.view(-1, 10)], [2, 2], group_rows=[4, n], names=["key", "query"])
    with pytest.raises(ValueError, match="values: NaN or Inf"):
        kmq.linear_codebook(values, 4)


@pytest.mark.parametrize("n", [40, 40000])
def test_weights_that_cannot_be_weights_are_refused(n):
    values = gaussian(n)
    for change, message in ((-1.0, "negative"), (math.nan, "NaN or Inf"), (math.inf, "NaN or Inf")):
        weight = torch.ones(n)
        weight[7] = change
        with pytest.raises(ValueError, match=f"sample_weight of values: .*{message}"):
            kmq.kmeans(values, 4, sample_weight=weight)
    with pytest.raises(ValueError, match="all weights are zero"):
        kmq.kmeans(values, 4, sample_weight=torch.zeros(n))
    some = (values > 0).float()
    result = kmq.kmeans(values, 4, sample_weight=some)
    assert torch.allclose(result.centroids, kmq.kmeans(values[values > 0], 4).centroids, rtol=1e-3)


def test_bad_arguments_get_a_sentence():
    values = gaussian(10)
    for call, error, message in (
        (lambda: kmq.kmeans(values, 0), ValueError, "num_centroids: expected 1 to 256"),
        (lambda: kmq.kmeans(values, 257), ValueError, "num_centroids: expected 1 to 256"),
        (lambda: kmq.kmeans(values[:0], 2), ValueError, "values: expected at least one value"),
        (lambda: kmq.kmeans(values.long(), 2), TypeError, "values: expected a floating-point tensor"),
        (lambda: kmq.kmeans(values.view(1, 2, 5), 2), ValueError, r"values: expected shape \(N,\) or \(B, N\)"),
        (lambda: kmq.kmeans(values, 2, algorithm="fast"), ValueError, "algorithm: expected one of"),
        (lambda: kmq.kmeans(values, 2, init="zeros"), ValueError, "init: expected one of"),
        (lambda: kmq.kmeans(values, 2, max_iter=0), ValueError, "max_iter: expected at least 1"),
        (lambda: kmq.kmeans(values, 2, tol=-1.0), ValueError, "tol: expected"),
        (lambda: kmq.kmeans(values, 2, sample_weight=values[:3]), ValueError, "sample_weight of values: expected shape"),
        (lambda: kmq.kmeans([values, values], [2]), ValueError, "num_centroids: expected one for each"),
        (lambda: cluster_matrices([values], [2], group_rows=[1]), ValueError, r"expected shape \(rows, cols\)"),
        (lambda: cluster_matrices([values[None]], [9], group_rows=[1]), ValueError, "expected 1 to 8"),
        (lambda: cluster_matrices([values[None]], [2], group_rows=[0]), ValueError, "at least 1"),
        (lambda: cluster_matrices([values[None]], [2], group_rows=[]), ValueError, "group_rows: expected one"),
        (lambda: cluster_matrices([values[None]], [2], group_rows=[1], scheme="pq"), ValueError, "scheme"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_without_the_extension(monkeypatch):
    """The plain form keeps the same promises."""
    monkeypatch.setattr(ops, "has_kernel", lambda op, key: False)
    for values in (gaussian(3000), gaussian(40_000, 3).bfloat16(), torch.full((9,), 0.3), gaussian(50) ** 5):
        weight = heavy_weights(len(values))
        for algorithm in ALGORITHMS:
            for k in (2, 16):
                plain = kmq.kmeans(values, k, sample_weight=weight, algorithm=algorithm)
                check(values, plain, weight, k)
                optimum = float(kmq.kmeans(values, k, sample_weight=weight, algorithm="exact").inertia)
                if algorithm != "lloyd":
                    assert float(plain.inertia) <= 1.0001 * optimum
                    assert float(plain.inertia) <= float(plain.bound) * optimum * (1 + 1e-6)
    (out,) = cluster_matrices([gaussian(300).view(10, 30)], [3], group_rows=[4])
    assert out.codebook.shape == (3, 8)
    with pytest.raises(ValueError, match=r"values: NaN or Inf"):
        kmq.kmeans(torch.tensor([1.0, math.nan]), 1)


DIGEST = """
import hashlib, sys, torch, kmq_kernels as kmq
from kmq_kernels.clustering import cluster_matrices
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(0)
x = torch.randn(2_300_000, generator=g)
w = torch.rand(x.shape, generator=g) ** 20
x[5], x[700] = 1e5, -3e4
digest = hashlib.sha256()
lists = [x[:50_001], x.view(2, -1), x, x[:3000], x[:40_000].bfloat16(), (x[:40_000] / 10).half(), x[:2400].view(3, 800)]
for k in (2, 7, 16, 64, 256):
    for algorithm in ("optimal", "lloyd"):
        some = lists if k == 16 and algorithm == "optimal" else [lists[0], *lists[3:]]
        for weights in (None, [w[: v.numel()].view(v.shape) for v in some]):
            for r in kmq.kmeans(some, k, algorithm=algorithm, sample_weight=weights):
                for part in (r.centroids, r.assignments, r.inertia, r.n_iter, r.bound):
                    digest.update(part.numpy().tobytes())
for bits in range(1, 9):
    for m in cluster_matrices([x[:38_900].view(100, 389), x[:6000].view(60, 100)], [bits] * 2, group_rows=[100, 7]):
        for part in m:
            digest.update(part.numpy().tobytes())
print(kmq.build_info()["extension"]["cpu_path"], digest.hexdigest())
"""


@pytest.mark.skipif(not ops.has_kernel("kmeans", "CPU"), reason="the extension is not built")
def test_bits_do_not_depend_on_threads_or_instruction_set(cpu_paths):
    def run(threads, path):
        environment = {**os.environ, "KMQ_CPU_PATH": path}
        out = subprocess.run([sys.executable, "-c", DIGEST, str(threads)], env=environment, capture_output=True, check=True)
        return out.stdout.decode().split()

    _, one = run(1, "")
    for path in cpu_paths:
        taken, digest = run(2, path)
        assert taken == path
        assert digest == one, path


@pytest.mark.parametrize("num_centroids", [2, 3, 5, 16, 40])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "even", "outliers", "weights"])
def test_rows_are_solved_exactly(num_centroids, kind):
    """Also where the optimum is linear in the number of centroids, so that no price gives the number asked for."""
    values, weight = gaussian(301, 21), None
    if kind == "ties":
        values = (values * 8).round() / 8
    elif kind == "even":
        values = torch.arange(300.0)
    elif kind == "outliers":
        values[:2] = torch.tensor([1e5, -3e4])
    elif kind == "weights":
        weight = heavy_weights(301)
    best = oracles.kmeans_optimum(values, num_centroids, weight)
    result = kmq.kmeans(values, num_centroids, sample_weight=weight)
    check(values, result, weight, num_centroids)
    assert float(result.inertia) == pytest.approx(best, rel=1e-5, abs=1e-12)
    assert float(result.bound) == pytest.approx(1, rel=1e-5)
