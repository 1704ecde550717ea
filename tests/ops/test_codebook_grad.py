"""codebook_grad: the C++ op and the reference against float64 brute force."""

import os
import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (3, 127), (37, 128), (65, 129), (50, 300), (97, 768))
GROUPS = (1, 8, 1 << 20)


def problem(rows: int, cols: int, bits: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    grad = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
    return grad, index, kmq.pack(index, bits)


def assert_sums(out: torch.Tensor, grad: torch.Tensor, index: torch.Tensor, num_centroids: int, group_rows: int) -> None:
    """Within a few roundings of the sum of magnitudes, the bound of any order of additions in chunks."""
    grad64, index = grad.double().numpy(), index.numpy()
    expected = oracles.cluster_sums(grad64, index, num_centroids, group_rows)
    scale = oracles.cluster_sums(np.abs(grad64), index, num_centroids, group_rows)
    unit = 1e-14 if grad.dtype == torch.float64 else 1e-6
    assert out.dtype == (torch.float64 if grad.dtype == torch.float64 else torch.float32)
    assert np.all(np.abs(out.double().numpy() - expected) <= unit * scale)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [torch.ops.kmq.codebook_grad, reference.codebook_grad])
def test_against_brute_force(bits: int, dtype: torch.dtype, implementation) -> None:
    for rows, cols in SHAPES:
        for group in GROUPS:
            group_rows = min(group, rows)
            grad, index, packed = problem(rows, cols, bits, dtype, seed=rows + cols)
            out = implementation(grad, packed, -(-rows // group_rows), 2**bits, group_rows)
            assert_sums(out, grad, index, 2**bits, group_rows)


@pytest.mark.parametrize("bits", range(1, 9))
def test_empty_clusters_are_zero_and_others_keep_their_nan(bits: int) -> None:
    grad, index, _ = problem(40, 200, bits, torch.float32)
    index = torch.where(index == 0, 1, index)
    grad[index == 1] = torch.nan
    out = kmq.codebook_grad(grad, kmq.pack(index, bits), 2**bits)[0]
    assert out[0] == 0
    assert out[1].isnan()
    assert not out[2:].isnan().any()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.9999])
def test_one_cluster_holds_everything(bits: int, value: float) -> None:
    """The longest possible chains of additions into one sum, whose roundings all go the same way."""
    grad = torch.full((300, 1000), value)
    out = kmq.codebook_grad(grad, kmq.pack(torch.zeros(300, 1000, dtype=torch.uint8), bits), 2**bits)
    torch.testing.assert_close(out[0, 0].double(), grad.double().sum(), rtol=1e-5, atol=0)
    assert not out[0, 1:].any()


@pytest.mark.parametrize("bits", range(1, 9))
def test_same_bits_for_any_number_of_threads(bits: int) -> None:
    threads = torch.get_num_threads()
    try:
        for group_rows in (1, 8, 200):
            grad, _, packed = problem(200, 900, bits, torch.float32)
            outs = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outs.append(torch.ops.kmq.codebook_grad(grad, packed, -(-200 // group_rows), 2**bits, group_rows))
            assert all(torch.equal(outs[0], out) for out in outs)
    finally:
        torch.set_num_threads(threads)


def test_strided_gradient() -> None:
    grad, index, packed = problem(60, 130, 4, torch.float32)
    assert_sums(kmq.codebook_grad(grad.T.contiguous().T, packed, 16), grad, index, 16, 60)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    grad, _, packed = problem(6, 40, 3, dtype)
    torch.library.opcheck(torch.ops.kmq.codebook_grad, (grad, packed, 3, 8, 2))


@pytest.mark.parametrize("bits", range(1, 9))
def test_gradcheck_through_dequantize(bits: int) -> None:
    _, _, packed = problem(5, 9, bits, torch.float32)
    codebook = torch.randn(3, 2**bits, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda book: ops.dequantize(packed, book, 9, group_rows=2), codebook)


@pytest.mark.parametrize("path", ["scalar", "avx2"])
def test_paths_of_lesser_processors(path: str) -> None:
    """The path is chosen once in a process."""
    if os.environ.get("KMQ_CPU_PATH"):
        pytest.skip("this is such a path")
    if kmq.build_info()["ops"]["codebook_grad"]["cpu"] == "plain torch":
        pytest.skip("the extension was not built")
    if path == "avx2" and kmq.build_info()["extension"]["cpu_path"] not in ("avx512", "amx"):
        pytest.skip("the other tests ran on this path, or this processor does not have it")
    environment = {**os.environ, "KMQ_CPU_PATH": path}
    shown = subprocess.run(
        [sys.executable, "-c", "import kmq_kernels as k; print(k.build_info()['extension']['cpu_path'])"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == path
    tests = ["test_codebook_grad.py", "test_codebook_linear_grad.py", "test_codebook_embedding_grad.py"]
    compiled = "grad0 or one_cluster or same_bits or empty"  # of the two implementations, the first
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", compiled]
    command += [os.path.join(os.path.dirname(__file__), name) for name in tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
