"""sparse_linear and its gradients: against a dense product in float64, for few and many rows, and the same on every run."""

import pytest
import torch

from kmq_kernels import ops


def _sparse(rows, cols, count, dtype=torch.float64):
    index = torch.randperm(rows * cols)[:count].sort().values.int()
    values = torch.randn(count, dtype=dtype)
    dense = torch.zeros(rows * cols, dtype=torch.float64)
    dense[index.long()] = values.double()
    return index, values, dense.view(rows, cols)


@pytest.mark.parametrize("batch", [(1,), (), (3, 7), (5, 40)])
@pytest.mark.parametrize(("rows", "cols", "count"), [(10, 37, 25), (1, 5, 1), (6, 4, 24), (50, 3, 0)])
def test_values_and_gradients(batch, rows, cols, count):
    index, values, dense = _sparse(rows, cols, count)
    x = torch.randn(*batch, cols, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    out = ops.sparse_linear(x, index, values, rows)
    torch.testing.assert_close(out, x @ dense.T)
    g = torch.randn_like(out)
    grad_x, grad_values = torch.autograd.grad(out, (x, values), g)
    torch.testing.assert_close(grad_x, g @ dense)
    full = g.reshape(-1, rows).T @ x.detach().reshape(-1, cols)
    torch.testing.assert_close(grad_values, full.reshape(-1)[index.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_rounded_once(dtype):
    index, values, dense = _sparse(8, 20, 40, dtype)
    x = torch.randn(3, 20).to(dtype)
    out = ops.sparse_linear(x, index, values, 8)
    assert out.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.float(), (x.double() @ dense.T).float(), atol=atol, rtol=0.01)


@pytest.mark.parametrize("batch", [4, 100])
def test_opcheck(batch):
    index, values, _ = _sparse(9, 11, 30)
    x = torch.randn(batch, 11, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.kmq.sparse_linear, (x, index, values.requires_grad_(), 9))


def test_same_bits_for_any_number_of_threads():
    index, values, _ = _sparse(60, 40, 500, torch.float32)
    x, g = torch.randn(17, 40), torch.randn(17, 60)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            inputs = x.clone().requires_grad_(), values.clone().requires_grad_()
            out = ops.sparse_linear(inputs[0], index, inputs[1], 60)
            found.append((out, *torch.autograd.grad(out, inputs, g)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"index": torch.zeros(4)}, "index: expected int32"),
        ({"values": torch.zeros(3)}, r"values: expected shape \(4,\)"),
        ({"input": torch.zeros(2, 5, dtype=torch.int64)}, "input: expected a floating-point tensor"),
    ],
)
def test_bad_arguments(change, sentence):
    arguments = {"input": torch.zeros(2, 5), "index": torch.arange(4, dtype=torch.int32), "values": torch.zeros(4), "rows": 3}
    with pytest.raises((TypeError, ValueError), match=sentence):
        ops.sparse_linear(**{**arguments, **change})
