import pytest
import torch
from oracles import weight64
from test_dequantize import DTYPES, problem

import kmq_kernels as kmq


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "group_rows"), [(1, 1, 1), (30, 200, 30), (31, 384, 4), (17, 129, 1)])
def test_rows_are_exact(bits, dtype, rows, cols, group_rows):
    assignments, packed, codebook = problem(rows, cols, bits, group_rows, dtype)
    ids = torch.randint(0, rows, (3, 5), generator=torch.Generator().manual_seed(bits))
    expected = weight64(assignments, codebook, group_rows)[ids]
    for kind in (ids, ids.int(), ids.T.contiguous().T):
        out = kmq.codebook_embedding(kind, packed, codebook, cols, group_rows=group_rows)
        assert out.dtype == dtype
        assert torch.equal(out.double(), expected)


def test_ids_are_checked():
    _, packed, codebook = problem(10, 40, 4, 10, torch.float32)
    for bad in ([0, 10], [-1, 3]):
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 10\), got "):
            kmq.codebook_embedding(torch.tensor(bad), packed, codebook, 40)
    with pytest.raises(TypeError, match=r"ids: expected int64 or int32"):
        kmq.codebook_embedding(torch.zeros(3), packed, codebook, 40)


def test_empty_and_scalar_ids():
    assignments, packed, codebook = problem(10, 40, 4, 10, torch.float32)
    assert kmq.codebook_embedding(torch.zeros(0, 3, dtype=torch.int64), packed, codebook, 40).shape == (0, 3, 40)
    one = kmq.codebook_embedding(torch.tensor(7), packed, codebook, 40)
    assert torch.equal(one.double(), weight64(assignments, codebook, 10)[7])


def test_gradient_opcheck_and_compile():
    _, packed, codebook = problem(9, 50, 2, 4, torch.float64)
    codebook.requires_grad_()
    ids = torch.tensor([[0, 8], [3, 3]])
    assert torch.autograd.gradcheck(lambda c: kmq.codebook_embedding(ids, packed, c, 50, group_rows=4), codebook)
    torch.library.opcheck(torch.ops.kmq.codebook_embedding, (ids, packed, codebook, 50, 4, -1))
    compiled = torch.compile(lambda c: kmq.codebook_embedding(ids, packed, c, 50), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codebook), kmq.codebook_embedding(ids, packed, codebook, 50))
