"""The Triton kernels of dequantize, codebook_embedding, pack and unpack, in the interpreter or on a device."""

import offline
import pytest
import torch
from oracles import packed_bytes, weight64
from test_dequantize import problem

import kmq_kernels as kmq
from kmq_kernels import ops
from kmq_kernels.triton_kernels import dequantize as kernels
from kmq_kernels.triton_kernels.codebook_embedding import codebook_embedding
from kmq_kernels.triton_kernels.dequantize import dequantize
from kmq_kernels.triton_kernels.pack import pack, unpack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (5, 127, 5), (7, 256, 1), (40, 130, 8)]  # rows, cols, group_rows


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_is_exact(bits, device):
    for dtype in DTYPES:
        for rows, cols, group_rows in SHAPES if dtype == torch.float32 else SHAPES[-1:]:
            assignments, packed, codebook = problem(rows, cols, bits, group_rows, dtype)
            weight = dequantize(packed.to(device), codebook.to(device), cols, group_rows)
            assert weight.dtype == dtype
            assert torch.equal(weight.cpu().double(), weight64(assignments, codebook, group_rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_an_entry_is_kept(dtype, device):
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    patterns = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 6e-8, -3e-39, 1.5], dtype=dtype)
    packed = kmq.pack(torch.arange(8, dtype=torch.uint8)[None], 3)
    weight = dequantize(packed.to(device), patterns[None].to(device), 8, 1)
    assert torch.equal(weight.cpu()[0].view(integer), patterns.view(integer))


@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_rows_are_exact(bits, device):
    for dtype in DTYPES[: 1 + (bits == 4) * 2]:
        for rows, cols, group_rows in SHAPES[2:]:
            assignments, packed, codebook = problem(rows, cols, bits, group_rows, dtype)
            ids = torch.randint(0, rows, (3, 5), generator=torch.Generator().manual_seed(bits))
            expected = weight64(assignments, codebook, group_rows)[ids]
            for kind in (ids, ids.int(), ids.T.contiguous().T):
                out = codebook_embedding(kind.to(device), packed.to(device), codebook.to(device), cols, group_rows, -1)
                assert out.dtype == dtype
                assert torch.equal(out.cpu().double(), expected)


def test_empty_and_scalar_ids(device):
    assignments, packed, codebook = problem(10, 40, 4, 10, torch.float32)
    arguments = packed.to(device), codebook.to(device), 40, 10, -1
    assert codebook_embedding(torch.zeros(0, 3, dtype=torch.int64, device=device), *arguments).shape == (0, 3, 40)
    one = codebook_embedding(torch.tensor(7, device=device), *arguments)
    assert torch.equal(one.cpu().double(), weight64(assignments, codebook, 10)[7])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there an assertion stops the kernel: the next test")
@pytest.mark.parametrize(("bad", "read"), [(-1, 0), (-(2**40), 0), (10, 9), (2**40, 9)])
def test_an_id_out_of_range_reads_nothing_else(bad, read):
    """The interpreter runs no assertion of a device, so that what would be read is seen: the first row, or the last."""
    assignments, packed, codebook = problem(10, 40, 4, 1, torch.float32)
    out = codebook_embedding(torch.tensor([3, bad]), packed, codebook, 40, 1, -1)
    assert torch.equal(out.double(), weight64(assignments, codebook, 1)[[3, read]])


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_compiled(architecture):
    """No spills; 16-byte loads of packed words and stores; the assertion about ids is in the code."""
    sizes = {"count": "i32", "rows": "i32", "cols": "i32", "group_rows": "i32"}
    pointers = {"ids": "*i64", "packed": "*u8", "codebook": "*fp16", "out": "*fp16"}
    constexprs = {"BITS": 4, "SHARED": True, "UNITS": kernels.UNITS, "DTYPE": "tl.float16"}
    name, aligned = "kmq_kernels.triton_kernels.dequantize:decode_rows_kernel", (*pointers, "cols")
    gather, whole = offline.compile_all(
        [
            offline.Kernel(name, {**pointers, **sizes}, {**constexprs, "GATHER": True}, aligned, debug=True),
            offline.Kernel(name, {**pointers, **sizes}, {**constexprs, "GATHER": False}, aligned),
        ],
        architecture,
    )
    for compiled in (gather, whole):
        assert compiled.spills == 0
        assert compiled.registers <= 128
        assert compiled.count(r"LDG\S*\.128")
    assert gather.count(r"\bCALL") > whole.count(r"\bCALL")


@pytest.mark.gpu
def test_an_id_out_of_range_is_told_on_a_device(run_python):
    code = """
import json, torch, kmq_kernels as kmq
packed = kmq.pack(torch.zeros(10, 40, dtype=torch.uint8), 4).cuda()
try:
    kmq.codebook_embedding(torch.tensor([3, 10], device="cuda"), packed, torch.zeros(1, 16, device="cuda"), 40)
    torch.cuda.synchronize()
    print(json.dumps("nothing"))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    assert "assert" in run_python(code)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (5000,), (3, 127), (2, 3, 130), (37, 256)])
def test_pack_and_unpack(bits, shape, device):
    assignments = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(assignments.to(device), bits)
    rows = assignments.reshape(-1, shape[-1]).numpy()
    assert torch.equal(packed.cpu().reshape(len(rows), -1), torch.from_numpy(packed_bytes(rows, bits)))
    assert packed.shape[:-1] == shape[:-1]
    assert torch.equal(unpack(packed, bits, shape[-1]).cpu(), assignments)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)])
def test_empty(shape, device):
    assignments = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(assignments.to(device), 3)
    assert packed.shape == kmq.pack(assignments, 3).shape
    assert unpack(packed, 3, shape[-1]).shape == shape
    if len(shape) == 2:
        assert dequantize(packed, torch.zeros(min(shape[0], 1), 8, device=device), shape[1], 4).shape == shape


def test_views_that_are_not_aligned(device):
    assignments, packed, codebook = problem(9, 200, 5, 3, torch.float32)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=device)[1:].view(packed.shape)
    shifted.copy_(packed)
    assert torch.equal(unpack(shifted, 5, 200).cpu(), assignments)
    out = dequantize(shifted, codebook.to(device), 200, 3)
    assert torch.equal(out.cpu().double(), weight64(assignments, codebook, 3))


def test_nothing_around_the_output_is_written(device):
    _, packed, codebook = problem(5, 130, 4, 5, torch.float32)
    around = torch.full((5 * 130 + 128,), 7.0, device=device)
    arguments = (None, packed.to(device), codebook.to(device), around[64:], 5, 5, 130, 5)
    kernels.decode_rows_kernel[(1,)](*arguments, BITS=4, SHARED=True, GATHER=False, UNITS=32, DTYPE=kernels.tl.float32)
    assert bool((around[:64] == 7).all())
    assert bool((around[64 + 650 :] == 7).all())
    assert torch.equal(around[64:][:650].view(5, 130), dequantize(*arguments[1:3], 130, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
def test_ops_on_a_device(bits):
    """The registered ops choose these kernels for CUDA tensors, and the plain form for fp64."""
    for dtype in (*DTYPES, torch.float64):
        assignments, packed, codebook = problem(300, 770, bits, 8, dtype)
        assert torch.equal(kmq.pack(assignments.cuda(), bits).cpu(), packed)
        assert torch.equal(kmq.unpack(packed.cuda(), bits, 770).cpu(), assignments)
        weight = weight64(assignments, codebook, 8)
        out = ops.dequantize(packed.cuda(), codebook.cuda(), 770, group_rows=8)
        assert torch.equal(out.cpu().double(), weight)
        ids = torch.randint(0, 300, (4, 9))
        rows = kmq.codebook_embedding(ids.cuda(), packed.cuda(), codebook.cuda(), 770, group_rows=8)
        assert torch.equal(rows.cpu().double(), weight[ids])
    assert kmq.build_info()["ops"]["dequantize"]["cuda"].startswith("Triton")
