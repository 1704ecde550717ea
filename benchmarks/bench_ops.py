"""Every op on one weight of BERT-base, with pytest-benchmark: `python -m pytest benchmarks/bench_ops.py --benchmark-only`.

Each result is compared with the plain-torch reference before it is timed. The scripts beside this one hold the comparisons with
other packages.
"""

import pytest
import torch
from shapes import BERT_BASE_LINEARS

import kmq_kernels as kmq
from kmq_kernels import ops, packing, reference

ROWS, COLS = BERT_BASE_LINEARS[1]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _timed(benchmark, device, ours, expected):
    torch.testing.assert_close(ours(), expected(), atol=1e-3, rtol=1e-3)

    def call():
        ours()
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark(call)


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=[1, 2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def weight(request, device):
    bits = request.param
    assignments = torch.randint(0, 2**bits, (ROWS, COLS), dtype=torch.uint8)
    codebook = torch.randn(1, 2**bits).sort().values
    return assignments.to(device), packing.pack(assignments, bits).to(device), codebook.to(device), bits


def test_pack(benchmark, device, weight):
    assignments, packed, _, bits = weight
    _timed(benchmark, device, lambda: kmq.pack(assignments, bits), lambda: packed)


def test_unpack(benchmark, device, weight):
    assignments, packed, _, bits = weight
    _timed(benchmark, device, lambda: kmq.unpack(packed, bits, COLS), lambda: assignments)


def test_dequantize(benchmark, device, weight):
    _, packed, codebook, _ = weight
    _timed(
        benchmark,
        device,
        lambda: ops.dequantize(packed, codebook, COLS),
        lambda: reference.dequantize(packed, codebook, COLS, ROWS),
    )


@pytest.mark.parametrize("M", [1, 64, 512])
def test_codebook_linear(benchmark, device, weight, M):
    _, packed, codebook, _ = weight
    x = torch.randn(M, COLS, device=device)
    _timed(
        benchmark,
        device,
        lambda: kmq.codebook_linear(x, packed, codebook),
        lambda: reference.codebook_linear(x, packed, codebook, None, ROWS),
    )


def test_codebook_embedding(benchmark, device, weight):
    _, packed, codebook, _ = weight
    ids = torch.randint(0, ROWS, (32, 64), device=device)
    _timed(
        benchmark,
        device,
        lambda: kmq.codebook_embedding(ids, packed, codebook, COLS),
        lambda: reference.codebook_embedding(ids, packed, codebook, COLS, ROWS, -1),
    )


def test_codebook_grad(benchmark, device, weight):
    _, packed, _, bits = weight
    grad = torch.randn(ROWS, COLS, device=device)
    _timed(
        benchmark,
        device,
        lambda: kmq.codebook_grad(grad, packed, 2**bits),
        lambda: reference.codebook_grad(grad, packed, 1, 2**bits, ROWS),
    )


def test_assign(benchmark, device, weight):
    _, _, codebook, _ = weight
    values = torch.randn(1, ROWS * COLS, device=device)
    _timed(benchmark, device, lambda: ops.assign(values, codebook), lambda: reference.assign(values, codebook))


def test_kmeans(benchmark, weight):
    if weight[0].is_cuda:
        pytest.skip("clustering runs on the host")
    values = torch.randn(ROWS * COLS)
    result = kmq.kmeans(values, 2 ** weight[3])
    assert torch.equal(result.assignments[None], reference.assign(values[None], result.centroids[None]))
    benchmark(lambda: kmq.kmeans(values, 2 ** weight[3]))
