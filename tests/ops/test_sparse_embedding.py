"""sparse_embedding and its gradient: against dense rows in float64, with repeated ids, empty rows and a padding row."""

import pytest
import torch
import torch.nn.functional as F

from kmq_kernels import ops


def _sparse(rows, cols, count):
    index = torch.randperm(rows * cols)[:count].sort().values.int()
    return index, torch.randn(count, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize(("rows", "cols", "count"), [(20, 7, 30), (4, 3, 12), (100, 5, 3), (6, 2, 0)])
def test_values_and_gradient(rows, cols, count, padding_idx):
    index, values = _sparse(rows, cols, count)
    ids = torch.randint(0, rows, (3, 9))
    ids[0, :2] = 2
    dense = torch.zeros(rows * cols, dtype=torch.float64).index_put((index.long(),), values).view(rows, cols)
    expected = F.embedding(ids, dense, padding_idx)
    out = ops.sparse_embedding(ids, index, values, cols, padding_idx=padding_idx)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, values, g)
    (grad_expected,) = torch.autograd.grad(expected, values, g)
    torch.testing.assert_close(grad, grad_expected)


def test_opcheck():
    index, values = _sparse(9, 6, 20)
    torch.library.opcheck(torch.ops.kmq.sparse_embedding, (torch.randint(0, 9, (2, 5)), index, values, 6, 1))


def test_bad_ids():
    index, values = _sparse(5, 4, 3)
    with pytest.raises(TypeError, match="ids: expected int64 or int32"):
        ops.sparse_embedding(torch.zeros(3), index, values, 4)
