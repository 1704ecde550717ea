import os

import pytest
import torch
import torch.nn.functional as F
from oracles import linear64, relative_rms, weight64
from test_dequantize import problem

import kmq_kernels as kmq

input_grad = torch.ops.kmq.codebook_linear_input_grad
SHAPES = [(1, 1, 1), (5, 3, 2), (47, 127, 47), (49, 128, 1), (100, 300, 8), (100, 130, 32), (770, 700, 770)]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 25, 33]


@pytest.fixture(autouse=True)
def seeded_on_two_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("OUT", "IN", "group_rows"), SHAPES)
def test_forward_and_input_grad_against_float64(bits, OUT, IN, group_rows):
    assignments, packed, codebook = problem(OUT, IN, bits, group_rows, torch.float32)
    weight, bias = weight64(assignments, codebook, group_rows), torch.randn(OUT)
    for M in SIZES if OUT < 500 else (1, 4, 8, 20, 530):
        input, grad = torch.randn(M, IN), torch.randn(M, OUT)
        out = kmq.codebook_linear(input, packed, codebook, bias if M % 2 else None, group_rows=group_rows)
        assert relative_rms(out, linear64(input, weight, bias if M % 2 else None)) <= 1e-6
        assert relative_rms(input_grad(grad, packed, codebook, IN, group_rows), linear64(grad, weight.T, None)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 8, 12, 40])
def test_narrow_input_is_as_exact_as_one_rounding(dtype, M):
    """No kernel, torch's included, is below the error of the float64 result rounded once. A sum in fp32 now and then falls to the
    other side of a tie, so a hundred-thousandth above it is allowed."""
    ours = floor = 0.0
    for _ in range(10):
        assignments, packed, codebook = problem(100, 300, 4, 100, dtype)
        weight, bias, input = weight64(assignments, codebook, 100), torch.randn(100).to(dtype), torch.randn(M, 300).to(dtype)
        expected = linear64(input, weight, bias)
        out = kmq.codebook_linear(input, packed, codebook, bias)
        assert out.dtype == dtype
        ours += float((out.double() - expected).square().sum())
        floor += float((expected.to(dtype).double() - expected).square().sum())
        assert torch.equal(out, kmq.codebook_linear(input.float(), packed, codebook.float(), bias.float()).to(dtype))
    assert ours**0.5 <= floor**0.5 * (1 + 1e-5)
    grad = torch.randn(M, 100).to(dtype)
    wide = input_grad(grad.float(), packed, codebook.float(), 300, 100)
    assert torch.equal(input_grad(grad, packed, codebook, 300, 100), wide.to(dtype))


def test_narrowing_of_extreme_results():
    packed = kmq.pack(torch.tensor([[0], [1]], dtype=torch.uint8), 1)
    values = torch.tensor([65519.9, 65520.0, 1e-7, 2.9e-8, 3e-8, 6.1e-5, 5.96e-8, 0.0, -1e30, 1e-40, float("inf"), float("nan")])
    for dtype in (torch.bfloat16, torch.float16):
        input, codebook = torch.ones(1, 1, dtype=dtype), torch.stack([values, -values], 1)
        for k in range(len(values)):
            expected = codebook[k].to(dtype)
            out = kmq.codebook_linear(input, packed, codebook[k : k + 1])[0]
            assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)), (dtype, values[k])


@pytest.mark.parametrize("M", [1, 5, 20])
def test_padding_columns_do_not_reach_the_result(M):
    packed = kmq.pack(torch.ones(10, 130, dtype=torch.uint8), 4)
    codebook = torch.full((1, 16), float("inf"))
    codebook[0, 1] = 0.5
    assert torch.equal(kmq.codebook_linear(torch.ones(M, 130), packed, codebook), torch.full((M, 10), 65.0))
    assert torch.equal(input_grad(torch.ones(M, 10), packed, codebook, 130, 10), torch.full((M, 130), 5.0))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)])
def test_leading_shapes(shape):
    assignments, packed, codebook = problem(7, 40, 3, 7, torch.float32)
    input = torch.randn(shape)
    out = kmq.codebook_linear(input, packed, codebook)
    assert out.shape == (*shape[:-1], 7)
    torch.testing.assert_close(out, F.linear(input, weight64(assignments, codebook, 7).float()))
    assert input_grad(out, packed, codebook, 40, 7).shape == shape


def test_no_columns_and_no_rows():
    packed = kmq.pack(torch.zeros(3, 0, dtype=torch.uint8), 4)
    bias = torch.randn(3)
    for M in (1, 20):
        assert torch.equal(kmq.codebook_linear(torch.zeros(M, 0), packed, torch.zeros(1, 16), bias), bias.expand(M, 3))
    assert input_grad(torch.zeros(2, 3), packed, torch.zeros(1, 16), 0, 3).shape == (2, 0)


def test_not_contiguous_arguments():
    _, packed, codebook = problem(20, 50, 5, 20, torch.float32)
    input, bias = torch.randn(50, 12).T, torch.randn(40)[::2]
    out = kmq.codebook_linear(input, packed, codebook, bias)
    assert torch.equal(out, kmq.codebook_linear(input.contiguous(), packed, codebook, bias.contiguous()))


@pytest.mark.parametrize("M", [1, 4, 8, 16, 100])
def test_same_bits_for_any_number_of_threads(M):
    _, packed, codebook = problem(400, 900, 4, 400, torch.float32)
    input, grad = torch.randn(M, 900), torch.randn(M, 400)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((kmq.codebook_linear(input, packed, codebook), input_grad(grad, packed, codebook, 900, 400)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_gradient_opcheck_and_compile():
    _, packed, codebook = problem(6, 70, 2, 2, torch.float64)
    input, bias = torch.randn(3, 70, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    arguments = [t.requires_grad_() for t in (input, codebook, bias)]
    assert torch.autograd.gradcheck(lambda i, c, b: kmq.codebook_linear(i, packed, c, b, group_rows=2), arguments)
    torch.library.opcheck(torch.ops.kmq.codebook_linear, (input, packed, codebook, bias, 2))
    torch.library.opcheck(input_grad, (torch.randn(3, 6), packed, codebook.detach(), 70, 2), test_utils="test_schema")
    i, c, b = (t.detach().float() for t in arguments)
    compiled = torch.compile(lambda x: kmq.codebook_linear(x, packed, c, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i), kmq.codebook_linear(i, packed, c, b))


SCALAR = """
import json, torch, kmq_kernels as kmq
from oracles import linear64, relative_rms, weight64
torch.manual_seed(0)
worst = 0.0
for bits in range(1, 9):
    assignments = torch.randint(0, 2**bits, (50, 300), dtype=torch.uint8)
    packed, codebook = kmq.pack(assignments, bits), torch.randn(5, 2**bits)
    weight = weight64(assignments, codebook, 10)
    for M in (1, 5, 20):
        input, grad = torch.randn(M, 300), torch.randn(M, 50)
        out = kmq.codebook_linear(input, packed, codebook, group_rows=10)
        back = torch.ops.kmq.codebook_linear_input_grad(grad, packed, codebook, 300, 10)
        worst = max(worst, relative_rms(out, linear64(input, weight, None)), relative_rms(back, linear64(grad, weight.T, None)))
print(json.dumps([kmq.build_info()["extension"]["cpu_path"], worst]))
"""


@pytest.mark.skipif(isinstance(kmq.build_info()["extension"], str), reason="the extension is not built")
def test_scalar_path(run_python):
    path, worst = run_python(SCALAR, KMQ_CPU_PATH="scalar")
    assert path == "scalar"
    assert worst <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_of_a_narrow_output_in_strips(dtype):
    """Around the borders of a strip of rows, and of the columns that are decoded at once."""
    assignments, packed, codebook = problem(530, 140, 4, 530, torch.float32)
    weight = weight64(assignments, codebook, 530)
    whole = torch.randn(2100, 140).to(dtype)
    for M in (1019, 1020, 1021, 2100):
        out = kmq.codebook_linear(whole[:M], packed, codebook)
        expected = linear64(whole[:M].double(), weight, None)
        assert relative_rms(out.double(), expected) <= 2 * torch.finfo(dtype).eps
        assert torch.equal(out[:1000], kmq.codebook_linear(whole[:1000], packed, codebook))
        grad = input_grad(out, packed, codebook, 140, 530)
        assert relative_rms(grad.double(), linear64(out.double(), weight.T, None)) <= 2 * torch.finfo(dtype).eps


MEMORY = """
import json, os, torch
import kmq_kernels as kmq
torch.set_num_threads(1)
packed = kmq.pack(torch.randint(0, 16, (3072, 128), dtype=torch.uint8), 4)
codebook = torch.randn(1, 16)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
kept = []
for rows in (64, 16_384):
    kmq.codebook_linear(torch.zeros(rows, 128, dtype=torch.bfloat16), packed, codebook)
    kept.append(resident())
print(json.dumps(kept[1] - kept[0]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_many_rows_keep_no_memory(run_python):
    """An fp32 copy of the output would be 200 MB."""
    assert run_python(MEMORY) < 30
