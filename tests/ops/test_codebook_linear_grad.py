"""codebook_linear_grad: the gradient of a codebook from grad_output and input, against float64 brute force."""

import numpy as np
import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1), (7, 5, 130), (130, 200, 260), (129, 197, 513))  # M, OUT, IN


def problem(M: int, OUT: int, IN: int, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(M + OUT + IN + bits)
    index = torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, generator=generator)
    grad_output = torch.randn(M, OUT, generator=generator, dtype=torch.float64).to(dtype)
    input = torch.randn(M, IN, generator=generator, dtype=torch.float64).to(dtype)
    return grad_output, input, index, kmq.pack(index, bits)


def assert_sums(out: torch.Tensor, grad_output, input, index: torch.Tensor, bits: int, group_rows: int) -> None:
    """Within a few roundings of the sum of magnitudes."""
    left, right = grad_output.double().numpy(), input.double().numpy()
    expected = oracles.cluster_sums(oracles.linear_weight_grad(left, right), index.numpy(), 2**bits, group_rows)
    scale = oracles.cluster_sums(oracles.linear_weight_grad(np.abs(left), np.abs(right)), index.numpy(), 2**bits, group_rows)
    unit = 1e-14 if input.dtype == torch.float64 else 1e-6
    assert np.all(np.abs(out.double().numpy() - expected) <= unit * scale)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [torch.ops.kmq.codebook_linear_grad, reference.codebook_linear_grad])
def test_against_brute_force(bits: int, dtype: torch.dtype, implementation) -> None:
    shapes = SHAPES if bits in (1, 4, 7) else SHAPES[:2]
    for M, OUT, IN in shapes:
        grad_output, input, index, packed = problem(M, OUT, IN, bits, dtype)
        for group_rows in {1, min(8, OUT), OUT}:
            out = implementation(grad_output, input, packed, -(-OUT // group_rows), 2**bits, group_rows)
            assert_sums(out, grad_output, input, index, bits, group_rows)


def test_no_rows_of_input_give_zero() -> None:
    _, _, _, packed = problem(1, 20, 30, 4, torch.float32)
    out = torch.ops.kmq.codebook_linear_grad(torch.empty(2, 0, 20), torch.empty(2, 0, 30), packed, 1, 16, 20)
    assert torch.equal(out, torch.zeros(1, 16))


def test_mixed_dtypes_and_batches() -> None:
    grad_output, input, _, packed = problem(24, 33, 40, 4, torch.float32)
    half = grad_output.bfloat16().view(2, 12, 33)
    out = torch.ops.kmq.codebook_linear_grad(half, input.view(2, 12, 40), packed, 1, 16, 33)
    torch.testing.assert_close(out, reference.codebook_linear_grad(half, input.view(2, 12, 40), packed, 1, 16, 33))


@pytest.mark.parametrize("group_rows", [1, 8, 500])
def test_same_bits_for_any_number_of_threads(group_rows: int) -> None:
    grad_output, input, _, packed = problem(150, 500, 600, 4, torch.float32)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(torch.ops.kmq.codebook_linear_grad(grad_output, input, packed, -(-500 // group_rows), 16, group_rows))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    grad_output, input, _, packed = problem(5, 6, 20, 3, dtype)
    torch.library.opcheck(torch.ops.kmq.codebook_linear_grad, (grad_output, input, packed, 3, 8, 2))


@pytest.mark.parametrize("bits", range(1, 9))
def test_gradcheck_through_codebook_linear(bits: int) -> None:
    _, _, _, packed = problem(4, 5, 9, bits, torch.float64)
    input = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(3, 2**bits, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, book, b: kmq.codebook_linear(x, packed, book, b, group_rows=2), (input, codebook, bias))
