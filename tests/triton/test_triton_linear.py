"""The Triton kernels of codebook_linear and codebook_linear_input_grad, in the interpreter or on a device."""

import pytest
import torch
from oracles import linear64, relative_rms, weight64
from test_dequantize import problem

import kmq_kernels as kmq
from kmq_kernels.triton_kernels import codebook_linear as kernels
from kmq_kernels.triton_kernels.codebook_linear import Tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = Tile(64, 16, 4, 3, 1)
# M, OUT, IN, group_rows: one element; a tail in every direction; whole blocks; a codebook for each row; groups with a short last.
SHAPES = [(1, 1, 1, 1), (3, 17, 130, 17), (16, 32, 256, 1), (21, 37, 100, 8)]


def rounding(expected, dtype):
    """The error of rounding the exact result once, and a little for sums in fp32."""
    return 1.02 * relative_rms(expected.to(dtype), expected) + 1e-6


def on(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(bits, dtype, device):
    for M, OUT, IN, group_rows in SHAPES if dtype == torch.float32 else SHAPES[1::2]:
        assignments, packed, codebook = problem(OUT, IN, bits, group_rows, dtype)
        weight, bias = weight64(assignments, codebook, group_rows), torch.randn(OUT) if M % 2 else None
        input, grad = torch.randn(M, IN).to(dtype), torch.randn(M, OUT).to(dtype)
        out = kernels.codebook_linear(*on(device, input, packed, codebook, bias), group_rows)
        expected = linear64(input, weight, bias)
        assert out.dtype == dtype
        assert relative_rms(out.cpu(), expected) <= rounding(expected, dtype), (M, OUT, IN)
        back = kernels.codebook_linear_input_grad(*on(device, grad, packed, codebook), IN, group_rows)
        expected = linear64(grad, weight.T, None)
        assert back.dtype == dtype
        assert relative_rms(back.cpu(), expected) <= rounding(expected, dtype), (M, OUT, IN)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_rows", [1, 37])
def test_both_decoders_give_the_same_bits(bits, group_rows, device):
    _, packed, codebook = problem(37, 140, bits, group_rows, torch.float16)
    input, grad, bias = torch.randn(5, 140).half(), torch.randn(5, 37).half(), torch.randn(37)
    input, grad, packed, codebook, bias = on(device, input, grad, packed, codebook, bias)
    outs = [kernels.fused_linear(input, packed, codebook, bias, group_rows, TILE, lookup) for lookup in (True, False)]
    assert torch.equal(*outs)
    outs = [kernels.fused_input_grad(grad, packed, codebook, 140, group_rows, TILE, lookup) for lookup in (True, False)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("bits", [3, 8])
def test_pieces_of_the_reduction_are_added_in_a_fixed_order(bits, device):
    """Any number of pieces, also more than there are blocks; twice the same bits."""
    assignments, packed, codebook = problem(20, 400, bits, 8, torch.float32)
    weight, bias = weight64(assignments, codebook, 8), torch.randn(20)
    input, grad = torch.randn(4, 400), torch.randn(4, 20)
    expected, expected_back = linear64(input, weight, bias), linear64(grad, weight.T, None)
    packed, codebook, on_bias, input, grad = on(device, packed, codebook, bias, input, grad)
    for splits in (1, 4, 1000):
        tile = Tile(16, 16, 4, 3, splits)
        outs = [kernels.fused_linear(input, packed, codebook, on_bias, 8, tile) for _ in range(2)]
        assert torch.equal(*outs)
        assert relative_rms(outs[0].cpu(), expected) <= 1e-6
        outs = [kernels.fused_input_grad(grad, packed, codebook, 400, 8, tile) for _ in range(2)]
        assert torch.equal(*outs)
        assert relative_rms(outs[0].cpu(), expected_back) <= 1e-6


def test_pieces_cover_all_steps_once():
    for splits, tiles, steps in [(1, 1, 1), (2, 1, 5), (7, 3, 100), (1000, 1, 13), (1, 1, 0), (5, 0, 4)]:
        pieces, each = kernels.pieces_for(Tile(16, 16, 4, 3, splits), tiles, steps, torch.device("cpu"))
        assert pieces * each >= steps > (pieces - 1) * each or (steps == 0 and pieces == 1)


@pytest.mark.parametrize("group_rows", [1, 9])
def test_nothing_beyond_the_weight_reaches_the_result(group_rows, device):
    """Padding columns are index 0, and rows past the end are read again: an infinite entry there must not count."""
    index = torch.ones(9, 130, dtype=torch.uint8)
    codebook = torch.full((9 // group_rows, 16), float("inf"))
    codebook[:, 1] = 0.5
    packed = kmq.pack(index, 4)
    for dtype in DTYPES:
        out = kernels.codebook_linear(*on(device, torch.ones(3, 130, dtype=dtype), packed, codebook.to(dtype), None), group_rows)
        assert torch.equal(out.cpu(), torch.full((3, 9), 65.0, dtype=dtype))
        back = kernels.codebook_linear_input_grad(
            *on(device, torch.ones(3, 9, dtype=dtype), packed, codebook.to(dtype)), 130, group_rows
        )
        assert torch.equal(back.cpu(), torch.full((3, 130), 4.5, dtype=dtype))


def test_nothing_around_the_output_is_written(device):
    _, packed, codebook = problem(17, 130, 4, 17, torch.float32)
    input, packed, codebook = on(device, torch.randn(3, 130), packed, codebook)
    around = torch.full((3 * 17 + 128,), 7.0, device=device)
    kernels.linear_kernel[(2, 1, 1)](
        input, packed, codebook, None, around[64:], 3, 17, 130, 130, 2, 17,
        BITS=4, SHARED=True, HAS_BIAS=False, PARTIAL=False, TAIL=True,
        WEIGHT_ROWS=16, INPUT_ROWS=16, DTYPE=kernels.tl.float32, PRECISION="ieee", LOOKUP=False,
    )  # fmt: skip
    assert bool((around[:64] == 7).all())
    assert bool((around[64 + 51 :] == 7).all())
    expected = kernels.codebook_linear(input, packed, codebook, None, 17)
    assert torch.equal(around[64:][:51].view(3, 17), expected)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)])
def test_leading_shapes(shape, device):
    assignments, packed, codebook = problem(7, 40, 3, 7, torch.float32)
    input = torch.randn(shape)
    out = kernels.codebook_linear(*on(device, input, packed, codebook, None), 7)
    assert out.shape == (*shape[:-1], 7)
    weight = weight64(assignments, codebook, 7)
    torch.testing.assert_close(out.cpu(), (input.double() @ weight.T).float())
    assert kernels.codebook_linear_input_grad(out, *on(device, packed, codebook), 40, 7).shape == shape


def test_no_columns_and_no_rows(device):
    packed, bias = kmq.pack(torch.zeros(3, 0, dtype=torch.uint8), 4), torch.randn(3)
    out = kernels.codebook_linear(*on(device, torch.zeros(2, 0), packed, torch.zeros(1, 16), bias), 3)
    assert torch.equal(out.cpu(), bias.expand(2, 3))
    assert kernels.codebook_linear_input_grad(*on(device, torch.zeros(2, 3), packed, torch.zeros(1, 16)), 0, 3).shape == (2, 0)
    nothing = kmq.pack(torch.zeros(0, 20, dtype=torch.uint8), 4)
    assert kernels.codebook_linear(*on(device, torch.ones(2, 20), nothing, torch.zeros(0, 16), None), 1).shape == (2, 0)
    back = kernels.codebook_linear_input_grad(*on(device, torch.ones(2, 0), nothing, torch.zeros(0, 16)), 20, 1)
    assert torch.equal(back.cpu(), torch.zeros(2, 20))


def test_not_contiguous_and_not_aligned_arguments(device):
    _, packed, codebook = problem(20, 50, 5, 20, torch.float32)
    input, bias = torch.randn(50, 12).T, torch.randn(40)[::2]
    expected = kernels.codebook_linear(*on(device, input.contiguous(), packed, codebook, bias.contiguous()), 20)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=device)[1:].view(packed.shape)
    shifted.copy_(packed)
    out = kernels.codebook_linear(input.to(device), shifted, codebook.to(device), bias.to(device), 20)
    assert torch.equal(out, expected)


def test_codebook_wider_than_the_input_is_rounded_to_it(device):
    _, packed, codebook = problem(20, 50, 4, 20, torch.float32)
    input = torch.randn(3, 50).half()
    outs = [kernels.codebook_linear(*on(device, input, packed, book, None), 20) for book in (codebook, codebook.half())]
    assert torch.equal(*outs)


def test_many_rows_of_input_are_decoded_first(device, monkeypatch):
    """Beyond the largest M of the plan, torch multiplies by the decoded weight."""
    assignments, packed, codebook = problem(20, 130, 4, 8, torch.float32)
    weight, bias = weight64(assignments, codebook, 8), torch.randn(20)
    calls = []
    monkeypatch.setattr(kernels.F, "linear", lambda *args, real=kernels.F.linear: calls.append(args) or real(*args))
    for M, fused in [(16, True), (17, False), (600, False)]:
        input = torch.randn(M, 130)
        out = kernels.codebook_linear(*on(device, input, packed, codebook, bias), 8)
        assert relative_rms(out.cpu(), linear64(input, weight, bias)) <= 1e-6
        assert bool(calls) != fused
        calls.clear()
    grad = torch.randn(100, 20)
    back = kernels.codebook_linear_input_grad(*on(device, grad, packed, codebook), 130, 8)
    assert relative_rms(back.cpu(), linear64(grad, weight.T, None)) <= 1e-6


def test_plans():
    """Limits and tiles ascend, and every tile is one that Triton takes."""
    for plan in (*kernels.PLANS.values(), kernels.PLAN_FP32, kernels.PLAN_INPUT_GRAD, kernels.PLAN_INPUT_GRAD_FP32):
        assert list(plan) == sorted(plan)
        for limit, tile in plan.items():
            assert tile.weight_rows in (32, 64, 128)
            assert tile.input_rows in (16, 32, 64, 128)
            assert limit >= tile.input_rows
    half, single = torch.float16, torch.float32
    for capability, largest in [
        ((7, 5), 256),
        ((8, 0), 256),
        ((8, 9), 128),
        ((9, 0), 512),
        ((10, 0), 256),
        ((10, 3), 256),
        ((12, 0), 512),
    ]:
        assert kernels.plan_for(largest, half, capability) is not None
        assert kernels.plan_for(largest + 1, half, capability) is None
        assert kernels.plan_for(17, single, capability) is None


def test_tf32_follows_torch(device):
    """fp32 products are fp32, and take TF32 (and its tiles) where the user let torch use it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed, precision in [(False, "ieee"), (True, "tf32")]:
            matmul.fp32_precision = precision
            assert kernels._tf32() == allowed
            assert (kernels.plan_for(17, torch.float32, (8, 0)) is not None) == allowed
    finally:
        matmul.fp32_precision = before


def model_of(device):
    torch.manual_seed(0)
    layer = kmq.CodebookLinear(200, 96, bits=4, device=device)
    layer.packed.data = kmq.pack(torch.randint(0, 16, (96, 200), dtype=torch.uint8), 4).to(device)
    layer.codebook.data = torch.randn(1, 16, device=device)
    layer.bias.data = torch.randn(96, device=device)
    return layer


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_regimes_on_a_device(bits, dtype):
    for OUT, IN in [(768, 768), (1000, 130), (130, 1000)]:
        for group_rows in (OUT, 8, 1):
            assignments, packed, codebook = problem(OUT, IN, bits, group_rows, dtype)
            weight, bias = weight64(assignments, codebook, group_rows), torch.randn(OUT)
            for M in (1, 16, 17, 33, 100, 300, 1000):
                input = torch.randn(M, IN).to(dtype)
                expected = linear64(input, weight, bias)
                out = kmq.codebook_linear(*on("cuda", input, packed, codebook, bias), group_rows=group_rows)
                assert relative_rms(out.cpu(), expected) <= 2 * rounding(expected, dtype), (M, OUT, IN, group_rows)


@pytest.mark.gpu
def test_compile_graph_autocast_and_streams():
    layer, input = model_of("cuda"), torch.randn(8, 200, device="cuda")
    expected = layer(input)
    assert torch.equal(torch.compile(layer, fullgraph=True)(input), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = layer(input)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    for M in (8, 100, 700):  # every regime, captured without a synchronization
        more = torch.randn(M, 200, device="cuda").half()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
            eager = layer(more)
            assert eager.dtype == torch.float16
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(more)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    assert torch.equal(model_of(last)(input.to(last)).cpu(), expected.cpu())


@pytest.mark.gpu
def test_gradients_on_a_device():
    layer, input = model_of("cuda"), torch.randn(40, 200, device="cuda", requires_grad=True)
    layer(input).square().sum().backward()
    dense = layer.weight.detach().double()
    reference = input.detach().double().requires_grad_()
    torch.nn.functional.linear(reference, dense, layer.bias.detach().double()).square().sum().backward()
    assert relative_rms(input.grad.cpu(), reference.grad.cpu()) <= 1e-5
