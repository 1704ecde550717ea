"""codebook_embedding_grad: the gradient of a codebook from the rows of a batch's ids, against float64 brute force."""

import numpy as np
import oracles
import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1), (30, 129, 50), (200, 384, 300))  # rows, cols, ids


def problem(rows: int, cols: int, count: int, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + cols + bits)
    index = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, rows, (count,), generator=generator)
    grad_output = torch.randn(count, cols, generator=generator, dtype=torch.float64).to(dtype)
    return grad_output, ids, index, kmq.pack(index, bits)


def assert_sums(out: torch.Tensor, grad_output, ids, index: torch.Tensor, bits: int, group_rows: int, padding_idx: int) -> None:
    """Within a few roundings of the sum of magnitudes."""
    grad64, rows = grad_output.double().numpy(), index.shape[0]
    weight_grad = oracles.embedding_weight_grad(grad64, ids.numpy(), rows, padding_idx)
    magnitude = oracles.embedding_weight_grad(np.abs(grad64), ids.numpy(), rows, padding_idx)
    expected = oracles.cluster_sums(weight_grad, index.numpy(), 2**bits, group_rows)
    scale = oracles.cluster_sums(magnitude, index.numpy(), 2**bits, group_rows)
    unit = 1e-14 if grad_output.dtype == torch.float64 else 1e-6
    assert np.all(np.abs(out.double().numpy() - expected) <= unit * scale)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [torch.ops.kmq.codebook_embedding_grad, reference.codebook_embedding_grad])
def test_against_brute_force(bits: int, dtype: torch.dtype, implementation) -> None:
    for rows, cols, count in SHAPES[: 3 if bits in (2, 4) else 2]:
        grad_output, ids, index, packed = problem(rows, cols, count, bits, dtype)
        for padding_idx in (-1, int(ids[0])):
            for group_rows in {min(8, rows), rows}:
                out = implementation(grad_output, ids, packed, -(-rows // group_rows), 2**bits, group_rows, padding_idx)
                assert_sums(out, grad_output, ids, index, bits, group_rows, padding_idx)


def test_no_ids_give_zero() -> None:
    _, _, _, packed = problem(10, 20, 1, 4, torch.float32)
    out = torch.ops.kmq.codebook_embedding_grad(torch.empty(0, 20), torch.empty(0, dtype=torch.int32), packed, 2, 16, 5, -1)
    assert torch.equal(out, torch.zeros(2, 16))


def test_id_out_of_range() -> None:
    grad_output, ids, _, packed = problem(10, 20, 4, 4, torch.float32)
    ids[2] = 10
    with pytest.raises(IndexError):
        torch.ops.kmq.codebook_embedding_grad(grad_output, ids, packed, 1, 16, 10, -1)


@pytest.mark.parametrize("group_rows", [1, 8, 200])
def test_same_bits_for_any_number_of_threads(group_rows: int) -> None:
    grad_output, ids, _, packed = problem(200, 384, 2000, 4, torch.float32)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            books = -(-200 // group_rows)
            outs.append(torch.ops.kmq.codebook_embedding_grad(grad_output, ids, packed, books, 16, group_rows, 7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    grad_output, ids, _, packed = problem(6, 20, 5, 3, dtype)
    torch.library.opcheck(torch.ops.kmq.codebook_embedding_grad, (grad_output, ids, packed, 3, 8, 2, 1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_gradcheck_through_codebook_embedding(bits: int) -> None:
    _, ids, _, packed = problem(5, 9, 7, bits, torch.float64)
    codebook = torch.randn(3, 2**bits, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda book: kmq.codebook_embedding(ids, packed, book, 9, group_rows=2), codebook)
