"""Clustering in Triton: kernels against brute force, whole models, and what must be refused or left to the CPU."""

import math

import numpy as np
import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import ops
from kmq_kernels.ops.clustering import _kmeans_cuda
from kmq_kernels.triton_kernels import kmeans as triton_kmeans
from kmq_kernels.triton_kernels.kmeans import plan

NAN = math.nan


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decades(*shape, seed=1, many=6):
    return 10 ** (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * many - many)


def solve(matrices, counts, group_rows, device, weights=None, packed=False):
    given = [None if weight is None else weight.to(device) for weight in weights or [None] * len(matrices)]
    *out, faults = triton_kmeans.kmeans([m.to(device) for m in matrices], given, counts, group_rows, packed, 300)
    return [[t.cpu() for t in part] for part in zip(*out, strict=True)], faults


def check(values, weight, labels, centroids, inertia, limit, optimum=None):
    """One problem: labels and inertia are those of the centroids, and the inertia is within `limit` of the optimum."""
    values = values.float()
    assert (centroids[1:] >= centroids[:-1]).all()
    middle = ((centroids[1:] + centroids[:-1]) / 2).numpy()
    assert np.array_equal(labels.numpy(), np.searchsorted(middle, values.numpy()))
    error = (values.double() - centroids.double()[labels.long()]) ** 2 * (1 if weight is None else weight.double())
    assert float(inertia) == pytest.approx(float(error.sum()), rel=2e-6, abs=1e-300)
    if optimum is None:
        optimum = oracles.kmeans_optimum(values.numpy(), len(centroids), None if weight is None else weight.numpy())
    assert float(error.sum()) <= limit * optimum + 1e-12 * float(values.double().square().sum())
    used = values if weight is None else values[weight > 0]
    if len(used.unique()) >= len(centroids):
        assert (torch.bincount(labels.long(), minlength=len(centroids)) > 0).all()


@pytest.mark.parametrize("bits", [*range(1, 5), *(pytest.param(bits, marks=pytest.mark.slow) for bits in range(5, 9))])
def test_rows(bits, device):
    """One program a row; awkward lengths, all dtypes, with and without weights; bars from the issue of the design."""
    K = 2**bits
    for dtype, weighted, n in ((torch.float32, False, 270), (torch.bfloat16, True, 300), (torch.float16, False, 64)):
        rows = 2 if bits <= 4 else 1
        if bits > 5 and dtype != torch.float32:
            continue
        values = (gaussian(rows, n, seed=bits) * 0.04).to(dtype)
        weight = decades(rows, n) if weighted else None
        ((labels, centroids, inertia, _, _),), faults = solve([values], [K], [1], device, [weight])
        assert faults == [0]
        for row in range(rows):
            w = None if weight is None else weight[row]
            optimum = None
            if bits > 4:  # the oracle takes K n**2
                optimum = float(kmq.kmeans(values[row].float(), K, sample_weight=w, algorithm="exact").inertia)
            check(values[row], w, labels[row], centroids[row], inertia[row], 1.0001 if bits <= 4 else 1.002, optimum)


def test_a_row_of_more_values_than_one_block_holds(device):
    values, weight = gaussian(1, 9001, seed=3), torch.rand(1, 9001)
    ((labels, centroids, inertia, _, _),), faults = solve([values], [4], [1], device, [weight])
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], 4, sample_weight=weight[0], algorithm="exact").inertia)
    check(values[0], weight[0], labels[0], centroids[0], inertia[0], 1.0001, optimum)


@pytest.mark.parametrize("num_centroids", [1, 3, 7, pytest.param(40, marks=pytest.mark.slow)])
def test_centroids_that_are_no_power_of_two(num_centroids, device):
    values = gaussian(1, 130)
    ((labels, centroids, inertia, _, _),), _ = solve([values], [num_centroids], [1], device)
    assert centroids.shape == (1, num_centroids)
    check(values[0], None, labels[0], centroids[0], inertia[0], 1.002)


@pytest.mark.parametrize("value", [0.0, -1e-40, 1e9, 3e38])
def test_equal_values(value, device):
    for n in (50, 16_400):
        ((labels, centroids, inertia, _, _),), faults = solve([torch.full((1, n), value)], [2], [1], device)
        assert faults == [0]
        assert (centroids == torch.tensor(value)).all()
        assert float(inertia) == 0
        assert not labels.any()


def clumped(name, n):
    """Values whose best partition lies far from where the density would put it."""
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    sign, tight = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0), 1e-4 * torch.randn(n, generator=generator)
    centers = torch.randn(60, generator=generator).sort().values
    often = 1 / (torch.randperm(60, generator=generator) + 1.0)
    far = torch.tensor([50.0, 51.0, -80.0])[torch.randint(3, (n,), generator=generator)] + 0.01 * normal
    return {
        "geometric": sign * 2.0 ** -torch.randint(24, (n,), generator=generator) * (1 + 0.01 * normal),
        "lognormal": sign * torch.exp(2 * normal),
        "cauchy": torch.tan(math.pi * (uniform - 0.5)),
        "zipf": centers[torch.multinomial(often, n, True, generator=generator)] + tight,
        "comb": torch.randint(40, (n,), generator=generator) + 0.02 * normal,
        "two_scales": torch.cat([centers[:10] * 1e-3, centers[::6]])[torch.randint(20, (n,), generator=generator)] + tight / 10,
        "few_far": torch.where(uniform < 0.002, far, normal),
        "uneven": torch.where(uniform < 0.5, -100 + 0.01 * normal, 100 + normal),
    }[name]


CLUMPED = [("geometric", 4), ("lognormal", 4), ("zipf", 16), ("comb", 16)]
MORE_CLUMPED = [("cauchy", 16), ("two_scales", 16), ("few_far", 16), ("uneven", 16), ("lognormal", 32), ("zipf", 3)]


@pytest.mark.parametrize(
    ("name", "num_centroids", "n"),
    [
        *((*case, 700) for case in CLUMPED),
        *(pytest.param(*case, 3000, marks=pytest.mark.slow) for case in CLUMPED + MORE_CLUMPED),
        *(pytest.param(*case, 9000, marks=pytest.mark.slow) for case in CLUMPED),
    ],
)
def test_clumped_values(name, num_centroids, n, device):
    """Up to 32 centroids the search on the cells is exact; of up to 4096 values each is a cell."""
    values = clumped(name, n)[None]
    ((labels, centroids, inertia, _, _),), faults = solve([values], [num_centroids], [1], device)
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], num_centroids, algorithm="exact").inertia)
    check(values[0], None, labels[0], centroids[0], inertia[0], 1.000001 if n <= 4096 else 1.0001, optimum)


def large(name, n):
    torch.manual_seed(5)
    normal = gaussian(n, seed=7)
    outliers = normal.clone()
    outliers[3], outliers[n // 2] = 1e4, -2e4
    return {
        "gaussian": normal * 0.03,
        "student_t": torch.distributions.StudentT(torch.tensor(5.0)).sample((n,)) * 0.032,
        "half_zeros": torch.where(torch.rand(n) < 0.5, 0.0, normal),
        "two_outliers": outliers,
        "far_from_zero": normal * 0.01 + 1,
        "huge": normal * 1e30,
        "tiny": normal * 1e-30,
        "bfloat16": normal.bfloat16(),
        "float16": (normal * 0.05).half(),
        "three_values": torch.tensor([-0.5, 0.1, 0.7])[torch.randint(3, (n,))],
        "levels": torch.linspace(-1, 1, 300)[torch.randint(300, (n,))],
        "constant": torch.full((n,), 0.3),
    }[name]


QUICK = [("gaussian", 16), ("half_zeros", 16), ("bfloat16", 16), ("three_values", 4), ("constant", 2)]
THOROUGH = [
    ("gaussian", 2), ("gaussian", 64), ("gaussian", 256), ("student_t", 16), ("student_t", 256), ("two_outliers", 16),
    ("far_from_zero", 16), ("huge", 8), ("tiny", 8), ("float16", 16), ("levels", 16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "num_centroids"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)])
def test_histogram(name, num_centroids, device):
    values = large(name, 17_001)[None]
    ((labels, centroids, inertia, _, _),), faults = solve([values], [num_centroids], [1], device)
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], num_centroids, algorithm="exact").inertia)
    check(values[0], None, labels[0], centroids[0], inertia[0], 1.0001 if num_centroids <= 16 else 1.002, optimum)
    if name in ("three_values", "constant"):
        assert float(inertia) == 0


ZOOMED = [
    ("geometric", 4), ("cauchy", 16), ("comb", 16), ("two_scales", 16), ("few_far", 16), ("uneven", 16), ("zipf", 3),
    ("two_scales", 64), ("zipf", 64), ("lognormal", 256),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "num_centroids"),
    [("lognormal", 4), ("zipf", 16), *(pytest.param(*case, marks=pytest.mark.slow) for case in ZOOMED)],
)
def test_clumped_values_in_a_histogram(name, num_centroids, device):
    """Bins that are too wide for what lies in them are split, in the same launches."""
    values = clumped(name, 17_001)[None]
    ((labels, centroids, inertia, _, _),), faults = solve([values], [num_centroids], [1], device)
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], num_centroids, algorithm="exact").inertia)
    limit = 1.00001 if num_centroids <= 64 else 1.002
    check(values[0], None, labels[0], centroids[0], inertia[0], limit, optimum)


def test_clumped_values_with_weights_in_a_histogram(device):
    values, weight = clumped("zipf", 17_001)[None], decades(1, 17_001, many=10)
    values[0, :3] = torch.tensor([1e7, -1e7, 3e7])
    ((labels, centroids, inertia, _, _),), faults = solve([values], [16], [1], device, [weight])
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], 16, sample_weight=weight[0], algorithm="exact").inertia)
    check(values[0], weight[0], labels[0], centroids[0], inertia[0], 1.0001, optimum)


@pytest.mark.parametrize(("dtype", "num_centroids"), [(torch.float32, 16), (torch.bfloat16, 4)])
def test_histogram_with_weights(dtype, num_centroids, device):
    values, weight = (gaussian(1, 17_001, seed=11) * 0.05).to(dtype), decades(1, 17_001, many=10)
    ((labels, centroids, inertia, _, _),), faults = solve([values], [num_centroids], [1], device, [weight])
    assert faults == [0]
    optimum = float(kmq.kmeans(values[0], num_centroids, sample_weight=weight[0], algorithm="exact").inertia)
    check(values[0], weight[0], labels[0], centroids[0], inertia[0], 1.0001, optimum)


@pytest.mark.parametrize("bits", [1, 3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 8))])
def test_whole_model(bits, device):
    """Matrices of all kinds in one call: by tensor, group and row, one element, tails; packed; the same bits twice."""
    matrices = [gaussian(131, 130, seed=2), gaussian(3, 5), gaussian(1, 1), gaussian(6, 40, seed=3), gaussian(9, 128).bfloat16()]
    groups, counts = [131, 2, 1, 6, 4], [2**bits] * 5
    if bits == 8:
        matrices, groups, counts = matrices[1:], groups[1:], counts[1:]
    out, faults = solve(matrices, counts, groups, device, packed=True)
    again, _ = solve(matrices, counts, groups, device, packed=True)
    assert not any(faults)
    for matrix, group, result, same in zip(matrices, groups, out, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, same, strict=True))
        packed, centroids, inertia, _, _ = result
        index = kmq.unpack(packed, bits, matrix.shape[1])
        assert torch.equal(kmq.pack(index, bits), packed)  # no bit of the padding is set
        for g in range(-(-len(matrix) // group)):
            part = slice(g * group, (g + 1) * group)
            values = matrix[part].reshape(-1)
            optimum = float(kmq.kmeans(values.float(), 2**bits, algorithm="exact").inertia)
            check(values, None, index[part].reshape(-1), centroids[g], inertia[g], 1.0001 if bits <= 4 else 1.002, optimum)


def test_waves_do_not_change_a_bit(device):
    values = [gaussian(1, 5000).to(device), gaussian(50, 90, seed=4).to(device)]
    results = []
    for scratch in (1 << 30, 1):
        plan = triton_kmeans.Plan(values, None, 2, [1, 50], packed=True, scratch_bytes=scratch)
        assert len(plan.waves) == (1 if scratch > 1 else 2)
        plan.launch()
        plan.launch()  # leaves nothing behind
        results.append([*plan.labels, plan.centroids, plan.inertia, plan.status])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n", [60, 17_000])
def test_faults(n, device):
    values, ones = gaussian(1, n), torch.ones(1, n)
    bad, weight = values.clone(), ones.clone()
    bad[0, n // 2] = NAN
    cases = [(bad, None, 1), (values, weight * 0, 4)]
    for place, number, fault in ((3, -1.0, 3), (5, math.inf, 2)):
        wrong = ones.clone()
        wrong[0, place] = number
        cases.append((values, wrong, fault))
    cases += [(bad.to(dtype), None, 1) for dtype in (torch.bfloat16, torch.float16)]
    for given, weight, fault in cases:
        _, faults = solve([gaussian(1, 9), given], [2, 2], [1, 1], device, [None, weight])
        assert faults == [0, fault]


def test_what_a_histogram_cannot_resolve_is_left_to_the_cpu(device):
    values = torch.cat([gaussian(20_000) * 1e-9, 1 + gaussian(20_000, seed=1) * 1e-9, torch.full((1,), 1e30)])[None]
    _, faults = solve([values], [4], [1], device)
    assert faults == [triton_kmeans.UNRESOLVED_FAULT]
    if not ops.has_kernel("kmeans", "CPU"):
        return
    for algorithm in ("optimal", "lloyd"):
        options = (False, algorithm, "k-means++", 300, 0.0, 0)
        *out, faults = _kmeans_cuda([values.to(device)], [None], [4], [1], *options)
        expected = kmq.kmeans(values[0], 4, algorithm=algorithm)
        assert faults == [0]
        assert out[0][0].device.type == device
        assert torch.equal(out[1][0][0].cpu(), expected.centroids)


def test_repeats_on_the_same_memory(device):
    """What a CUDA graph does: other values in the same place, nothing allocated, nothing asked."""
    values = gaussian(2, 200).to(device)
    plan = triton_kmeans.Plan([values], None, 8, [1], packed=False, small=True)
    plan.launch()
    first = plan.centroids.clone()
    values.mul_(2)
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.launch()
        graph.replay()
    else:
        plan.launch()
    assert torch.allclose(plan.centroids, 2 * first, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("small", [False, True])
def test_captured_in_a_graph(small):
    values = [gaussian(300, 768).cuda(), gaussian(512, 700).cuda()]
    plan = triton_kmeans.Plan(values, None, 16, [1, 1] if small else [300, 512], packed=True, small=small)
    plan.launch()
    eager = [t.clone() for t in (*plan.labels, plan.centroids, plan.inertia)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.launch()
    for label in plan.labels:
        label.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, (*plan.labels, plan.centroids, plan.inertia), strict=True))


@pytest.mark.gpu
def test_kmeans_and_quantize_take_cuda_tensors():
    values = gaussian(200_000)
    on_device = kmq.kmeans(values.cuda(), 16)
    assert on_device.centroids.is_cuda
    exact = float(kmq.kmeans(values, 16, algorithm="exact").inertia)
    assert float(on_device.inertia) <= 1.0001 * exact
    with pytest.raises(ValueError, match="values: NaN or Inf"):
        kmq.kmeans(torch.tensor([1.0, NAN], device="cuda"), 2)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
    kmq.quantize_(model, kmq.KMQConfig(bits=4, skip=[]))
    assert torch.isfinite(model(torch.randn(2, 300, device="cuda"))).all()


def test_the_benchmark_of_make_gpu_runs(device):
    """Its logic, on tiny sizes: it checks what it times, and has an entry for every peer."""
    if device == "cuda":
        pytest.skip("`make gpu` runs it in full")
    from benchmarks import gpu_kmeans

    clock = gpu_kmeans.Clock("cpu")
    rows = [*gpu_kmeans.rows("cpu", small=True), *gpu_kmeans.pass_rows(clock, 1.0, small=True)]
    assert {row["what"] for row in rows} == {"whole-model solve", "assign", "fused step", "one matrix"}
    assert {row["peer"] for row in rows if row["what"] == "one matrix"} == {"kmq", *gpu_kmeans.PEERS}
    (model,) = [row for row in rows if row["what"] == "whole-model solve"]
    assert 1 - 1e-6 <= model["inertia_over_optimum"] <= 1.0001


def test_near_the_largest_value(device):
    for dtype, largest in ((torch.float32, 3.4e38), (torch.bfloat16, 3.38e38), (torch.float16, 65504.0)):
        four = (torch.tensor([-1.0, 0.5, 0.75, 0.99]) * largest).to(dtype)
        (labels,), (centroids,), (inertia,), _, _, faults = triton_kmeans.kmeans(
            [four.repeat(1, 10).to(device)], [None], [4], [1], False, 300
        )
        assert faults == [0]
        assert torch.equal(centroids[0].cpu(), four.float())
        assert torch.equal(labels[0].cpu().int(), torch.arange(40).int() % 4)
        assert float(inertia) == 0


def test_problems_that_counters_cannot_hold_go_to_the_cpu(monkeypatch, device):
    """Of 2**28 values and more; here the limit is lowered. Other matrices of the call stay on the device."""
    untouched = torch.empty(16_385, 16_384, dtype=torch.bfloat16, device="meta")
    *_, faults = triton_kmeans.kmeans([untouched], [None], [16], [len(untouched)], True, 300)
    assert faults == [triton_kmeans.UNRESOLVED_FAULT]
    monkeypatch.setattr(plan, "MOST_VALUES", 300)
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(10, 40, generator=generator), torch.randn(4, 30, generator=generator)
    arguments = [None, None], [4, 4], [10, 4], True, "optimal", "k-means++", 300, 0.0, 0
    labels, centroids, _, _, bound, faults = _kmeans_cuda([large.to(device), small.to(device)], *arguments)
    assert faults == [0, 0]
    assert bound[0].isfinite().all()
    for i, matrix in enumerate((large, small)):
        alone = kmq.kmeans(matrix.reshape(-1), 4)
        assert torch.allclose(centroids[i][0].cpu(), alone.centroids)
        assert torch.equal(kmq.unpack(labels[i].cpu(), 2, matrix.shape[1]).view(-1), alone.assignments)
