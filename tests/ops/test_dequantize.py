import pytest
import torch
from oracles import weight64

import kmq_kernels as kmq
from kmq_kernels import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(rows, cols, bits, group_rows, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed * 8 + bits)
    assignments = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(-(-rows // group_rows), 2**bits, generator=generator, dtype=torch.float64).to(dtype)
    return assignments, kmq.pack(assignments, bits), codebook


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "group_rows"), [(1, 1, 1), (5, 127, 5), (7, 128, 1), (9, 300, 4), (50, 513, 50)])
def test_exact(bits, dtype, rows, cols, group_rows):
    assignments, packed, codebook = problem(rows, cols, bits, group_rows, dtype)
    weight = ops.dequantize(packed, codebook, cols, group_rows=group_rows)
    assert weight.dtype == dtype
    assert torch.equal(weight.double(), weight64(assignments, codebook, group_rows))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_of_an_entry_is_kept(bits):
    patterns = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -3e-39, 3.4e38]).repeat(32)[: 2**bits]
    assignments = torch.arange(2**bits, dtype=torch.uint8)[None]
    weight = ops.dequantize(kmq.pack(assignments, bits), patterns[None], 2**bits)
    assert torch.equal(weight[0].view(torch.int32), patterns.view(torch.int32))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    packed = kmq.pack(torch.zeros(shape, dtype=torch.uint8), 4)
    weight = torch.ops.kmq.dequantize(packed, torch.zeros(min(shape[0], 1), 16), shape[1], 3)
    assert weight.shape == shape


def test_gradient_opcheck_and_compile():
    _, packed, codebook = problem(6, 70, 3, 2, torch.float64)
    codebook.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: ops.dequantize(packed, c, 70, group_rows=2), codebook)
    torch.library.opcheck(torch.ops.kmq.dequantize, (packed, codebook, 70, 2))
    compiled = torch.compile(lambda c: ops.dequantize(packed, c, 70, group_rows=2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codebook), ops.dequantize(packed, codebook, 70, group_rows=2))


SAME_BITS = """
import hashlib, json, torch, kmq_kernels as kmq
from kmq_kernels import ops
torch.manual_seed(0)
digest = hashlib.sha256()
for bits in range(1, 9):
    assignments = torch.randint(0, 2**bits, (9, 333), dtype=torch.uint8)
    packed = kmq.pack(assignments, bits)
    ids = torch.tensor([[8, 0, 3], [3, 3, 7]])
    results = [packed, kmq.unpack(packed, bits, 333)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        codebook = torch.randn(3, 2**bits).to(dtype)
        results += [ops.dequantize(packed, codebook, 333), ops.codebook_embedding(ids, packed, codebook, 333)]
    for result in results:
        digest.update(bytes(result.contiguous().view(torch.uint8).flatten().tolist()))
print(json.dumps([kmq.build_info()["extension"]["cpu_path"], digest.hexdigest()]))
"""


@pytest.mark.skipif(isinstance(kmq.build_info()["extension"], str), reason="the extension is not built")
def test_scalar_path_gives_the_same_bits(run_python):
    path, digest = run_python(SAME_BITS, KMQ_CPU_PATH="scalar")
    assert path == "scalar"
    assert run_python(SAME_BITS)[1] == digest
