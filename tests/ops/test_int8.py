"""The integer linear layer against brute force: integers by a product of integers in NumPy, bit for bit, on every path."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dequantize import problem

import kmq_kernels as kmq
from kmq_kernels import ops, reference

SHAPES = [(1, 1, 1), (5, 3, 2), (47, 127, 47), (49, 128, 1), (100, 300, 8), (33, 515, 33)]
PATH = (kmq.build_info()["extension"] or {"cpu_path": "none"})["cpu_path"]


def most_added(cols):
    """How many products more than its own a row may cost."""
    return max(2, -(-cols // 128))


def cost(q, first):
    """Products more that integers need beyond [first, first + 255], counted column by column."""
    needed = {}
    for c, value in enumerate(q):
        block, field, lane = c // 128, c % 128 // 16, c % 16
        for side, beyond in (("above", value - first - 255), ("below", first - value)):
            key = side, block, field % 2, lane
            needed[key] = max(needed.get(key, 0), -(-max(beyond, 0) // 256))
    return sum(needed.values())


def rounded(input):
    """Integers (M, IN) and steps (M,) of an input, one number after the other."""
    f32 = np.float32
    rows, steps = [], []
    for x in input.float().numpy():
        high, low = max(x.max(initial=0), f32(0)), min(x.min(initial=0), f32(0))
        step = f32(high / f32(255)) - f32(low / f32(255))
        if step < 1e-36:
            rows.append(np.zeros(len(x), np.int64))
            steps.append(f32(0))
            continue
        q = np.rint(x * (1 / step)).astype(np.int64)
        first = int(np.rint(low * (1 / step)))
        q = q.clip(first, first + 255)
        for halvings in range(1, 5):
            inverse = f32(1 / step) * f32(2**halvings)
            finer = np.rint(x * inverse).astype(np.int64)
            if cost(finer, max(int(np.rint(low * inverse)), -128)) > most_added(len(x)):
                break
            q, last = finer, f32(step / f32(2**halvings))
        else:
            halvings += 1
        rows.append(q)
        steps.append(step if halvings == 1 else last)
    return np.stack(rows), np.array(steps, f32)[:, None]


def with_outliers(M, IN, seed=0):
    """Rows of every kind: plain, with a few large numbers of one sign or both, skewed, constant, of any size."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((M, IN))
    for m in range(M):
        kind = m % 6
        if kind in (1, 2):
            at = random.integers(0, IN, 1 + m % 3)
            x[m, at] = random.choice([-1, 1] if kind == 1 else [1], len(at)) * random.uniform(8, 90, len(at))
        if kind == 3:
            x[m] = np.maximum(x[m], -0.2) ** 3
        if kind == 4:
            x[m] = -np.abs(x[m])
        if kind == 5:
            x[m, :] = 0.5
    return torch.from_numpy((x * np.logspace(-3, 3, M)[:, None]).astype(np.float32))


def integers(assignments, table, group_rows):
    """Entries (OUT, IN) of the table at the indices."""
    book = np.arange(assignments.shape[0]) // group_rows
    return table.numpy().astype(np.int64)[book[:, None], assignments.numpy()]


def expected_output(input, weight, factor, bias, added=0.0):
    """The formula in fp32, operation by operation; the sum in integers."""
    q, scale = rounded(input)
    out = (q @ weight.T).astype(np.float32) * scale * factor.numpy() + np.float32(added)
    return torch.from_numpy(out + bias.numpy() if bias is not None else out)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("OUT", "IN", "group_rows"), SHAPES)
def test_integer_products_bit_for_bit(bits, OUT, IN, group_rows):
    assignments, packed, codebook = problem(OUT, IN, bits, group_rows, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, IN, group_rows=group_rows)
    factor, bias = scale.repeat_interleave(group_rows)[:OUT], torch.randn(OUT)
    weight = integers(assignments, table, group_rows)
    assert np.array_equal(row_sum.numpy(), weight.sum(1))
    for M in (1, 2, 3, 4, 5, 7, 8, 13, 30):
        input = with_outliers(M, IN, seed=M)
        out = ops.int8_linear(input, packed, table, factor, row_sum, bias if M % 2 else None, group_rows=group_rows)
        assert torch.equal(out, expected_output(input, weight, factor, bias if M % 2 else None))


@pytest.mark.parametrize("bits", [1, 4, 5, 6, 8])
def test_extreme_integers_do_not_saturate(bits):
    """All products of the largest magnitude, of either sign."""
    table = torch.full((1, 2**bits), 127, dtype=torch.int8)
    table[0, 0] = -127
    for sign in (0, 1):
        packed = kmq.pack(torch.full((40, 640), sign, dtype=torch.uint8), bits)
        row_sum = torch.full((40,), 640 * 127 * (2 * sign - 1), dtype=torch.int32)
        for value in (255.0, -255.0):
            out = ops.int8_linear(torch.full((5, 640), value), packed, table, torch.ones(40), row_sum)
            assert torch.equal(out, torch.full((5, 40), value * (2 * sign - 1) * 640 * 127))


def test_integers_of_an_input_are_those_of_the_rule():
    """Of the reference too, whose results say which numbers were taken for large ones."""
    halved = 0
    for M, IN in ((40, 1), (60, 5), (60, 127), (60, 128), (90, 384), (40, 1000)):
        x = with_outliers(M, IN, seed=IN)
        q, step = rounded(x)
        got, got_step = reference.int8_round(x)
        assert np.array_equal(got.numpy(), q)
        assert np.array_equal(got_step.numpy(), step[:, 0])
        halved += int((np.abs(q) > 255).any(1).sum())
        error = np.abs(q * step.astype(np.float64) - x.numpy())
        assert (error <= step * 1.001).all()
    assert halved >= 60


@pytest.mark.skipif(PATH == "none", reason="the extension is not built")
def test_paths_give_the_same_bits(cpu_paths, run_python):
    code = """
import json, torch
from kmq_kernels import ops
import kmq_kernels as kmq
torch.manual_seed(0)
digest = []
for bits in range(1, 9):
    packed, codebook = kmq.pack(torch.randint(0, 2**bits, (45, 300), dtype=torch.uint8), bits), torch.randn(9, 2**bits)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 300, group_rows=5)
    index, delta = torch.arange(7, 13000, 311, dtype=torch.int32), torch.randn(42)
    for M, activation in ((60, "none"), (33, "gelu"), (17, "gelu_tanh"), (5, "relu"), (3, "silu")):
        input, factor, bias = torch.randn(M, 300) * torch.randn(M, 300) ** 4, scale.repeat_interleave(5), torch.randn(45)
        out = ops.int8_linear(input, packed, table, factor, row_sum, bias, group_rows=5,
                              outlier_index=index, outlier_delta=delta, activation=activation)
        digest += [int(out.view(torch.int32).long().sum()), int(table.long().sum()), int(scale.view(torch.int32).long().sum())]
print(json.dumps(digest))
"""
    expected, *others = [run_python(code, KMQ_CPU_PATH=path) for path in cpu_paths]
    for path, found in zip(cpu_paths[1:], others, strict=True):
        assert found == expected, path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 6, 40])
def test_narrow_input_is_widened_and_rounded_once(dtype, M):
    _, packed, codebook = problem(100, 300, 3, 100, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 300)
    factor, bias, input = scale.repeat_interleave(100), torch.randn(100), torch.randn(M, 300).to(dtype)
    out = ops.int8_linear(input, packed, table, factor, row_sum, bias)
    assert torch.equal(out, ops.int8_linear(input.float(), packed, table, factor, row_sum, bias).to(dtype))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_against_float64(activation):
    packed = kmq.pack(torch.zeros(1, 1, dtype=torch.uint8), 1)
    table, row_sum = torch.tensor([[1, 1]], dtype=torch.int8), torch.tensor([1], dtype=torch.int32)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e36, -100.0, -40.0, 0.0, 1e-20, 40.0, 1e4])])
    got = ops.int8_linear(x[:, None], packed, table, torch.ones(1), row_sum, activation=activation)[:, 0]
    function = (lambda v: F.gelu(v, approximate="tanh")) if activation == "gelu_tanh" else getattr(F, activation)
    assert float((got.double() - function(x.double())).abs().div(x.double().abs().clamp_min(1)).max()) <= 1e-6


def test_outliers_add_to_single_weights():
    _, packed, codebook = problem(37, 90, 4, 37, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 90)
    index = torch.tensor([0, 5, 89, 90, 2000, 37 * 90 - 1], dtype=torch.int32)
    delta, input = torch.randn(6) * 5, torch.randn(9, 90)
    factor = scale.repeat_interleave(37)
    out = ops.int8_linear(input, packed, table, factor, row_sum, outlier_index=index, outlier_delta=delta)
    sparse = torch.zeros(37 * 90, dtype=torch.float64)
    sparse[index.long()] = delta.double()
    plain = ops.int8_linear(input, packed, table, factor, row_sum).double()
    assert float((out - (plain + input.double() @ sparse.view(37, 90).T)).abs().max()) <= 1e-4


def test_a_long_input_gives_what_its_parts_give():
    """An input of more than a core's cache shares panels and is cut; its parts are neither. Rows and outliers in all panels."""
    rows, cols = 32 * 14 + 7, 1500
    _, packed, codebook = problem(rows, cols, 4, 5, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, cols, group_rows=5)
    factor, bias, input = scale.repeat_interleave(5)[:rows], torch.randn(rows), with_outliers(900, cols)
    index = torch.arange(3, rows * cols, 9973, dtype=torch.int32)
    given = {"group_rows": 5, "outlier_index": index, "outlier_delta": torch.randn(len(index)), "activation": "gelu"}
    parts = [ops.int8_linear(part, packed, table, factor, row_sum, bias, **given) for part in input.split(50)]
    assert torch.equal(ops.int8_linear(input, packed, table, factor, row_sum, bias, **given), torch.cat(parts))


@pytest.mark.parametrize("bits", [4, 8])
def test_entries_of_few_weights_are_left_out_where_they_are_large(bits):
    """Those more than 1.4 times as large as the rest, if some are twice as large; not where the largest is less than that."""
    codebook = torch.linspace(-1, 1, 2**bits)[None]
    codebook[0, -3:] = torch.tensor([1.3, 1.5, 2.5])
    assignments = torch.randint(0, 2**bits - 3, (64, 2048), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        assignments[0, i] = 2**bits - 3 + i
    table, scale, _ = ops.int8_codebook(kmq.pack(assignments, bits), codebook, 2048)
    assert table[0, -3] != 0
    assert table[0, -2:].tolist() == [0, 0]
    assert float((codebook - scale * table)[0, :-2].abs().max()) <= 1.3 / reference.INT8_LIMIT
    codebook[0, -1] = 1.6
    assert (ops.int8_codebook(kmq.pack(assignments, bits), codebook, 2048)[0][0, -3:] != 0).all()
    for ours, theirs in zip(
        ops.int8_codebook(kmq.pack(assignments, bits), codebook, 2048),
        reference.int8_codebook(kmq.pack(assignments, bits), codebook, 2048, 64),
        strict=True,
    ):
        assert torch.allclose(ours.float(), theirs.float(), rtol=1e-6)


def test_rows_that_are_not_finite_or_tiny():
    _, packed, codebook = problem(20, 130, 4, 20, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 130)
    input, bias = torch.randn(6, 130), torch.randn(20)
    input[1, 7], input[2, 129], input[3, 0] = float("inf"), float("-inf"), float("nan")
    input[4], input[5] = 0.0, 1e-40
    out = ops.int8_linear(input, packed, table, scale.repeat_interleave(20), row_sum, bias)
    assert out[0].isfinite().all()
    assert out[1:4].isnan().all()
    assert torch.equal(out[4:], bias.expand(2, 20))


def test_scale_of_a_codebook_is_the_best_of_those_tried():
    """The cost over the weights, cluster sizes and all, is not above that of rounding with max / limit, the scale then fitted."""

    def cost(errors):
        return errors.square().sum() + 0.1 * errors.sum().square() / 10  # rows of a codebook

    for bits in range(1, 9):
        assignments, packed, codebook = problem(30, 257, bits, 10, torch.float32, seed=3)
        assignments[:, :200] = 0  # one large cluster
        packed = kmq.pack(assignments, bits)
        table, scale, _ = ops.int8_codebook(packed, codebook, 257, group_rows=10)
        limit = reference.INT8_LIMIT
        assert int(table.abs().max()) <= limit
        for g in range(3):
            used = assignments[10 * g : 10 * g + 10].long().flatten()
            c = codebook[g].double()
            plain = (c * limit / c[used.unique()].abs().max()).round().clamp(-limit, limit)
            fitted = (c * plain)[used].sum() / plain[used].square().sum()
            assert cost((c - scale[g].double() * table[g])[used]) <= cost((c - fitted * plain)[used]) * (1 + 1e-6)
            q = table[g].double()
            best_factor = (c * q)[used].sum() / q[used].square().sum()
            assert abs(float(best_factor / scale[g] - 1)) <= 1e-6


def test_codebook_of_zeros_or_not_finite():
    packed = kmq.pack(torch.zeros(4, 10, dtype=torch.uint8), 2)
    codebook = torch.tensor([[0.0, 0, 0, 0], [1.0, float("inf"), 0, 0], [float("nan"), 1, 1, 1], [2.0, 5, 5, 5]])
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 10, group_rows=1)
    assert scale[0] == 0
    assert scale[1:3].isnan().all()
    assert abs(float(scale[3] * table[3, 0]) - 2) <= 1e-6  # the only entry in use
    out = ops.int8_linear(torch.ones(1, 10), packed, table, scale, row_sum, group_rows=1)
    assert out[0, 0] == 0
    assert out[0, 1:3].isnan().all()
    assert abs(float(out[0, 3]) - 20) <= 1e-4


@pytest.mark.parametrize("bits", [2, 5, 7])
def test_reference_is_the_same_function(bits):
    _, packed, codebook = problem(30, 140, bits, 7, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 140, group_rows=7)
    plain = reference.int8_codebook(packed, codebook, 140, 7)
    assert torch.equal(table, plain[0])
    assert torch.allclose(scale, plain[1], rtol=1e-6)
    assert torch.equal(row_sum, plain[2])
    index, delta = torch.tensor([3, 700], dtype=torch.int32), torch.randn(2)
    input, factor, bias = torch.randn(2, 3, 140), scale.repeat_interleave(7)[:30], torch.randn(30)
    for activation in reference.ACTIVATIONS:
        got = torch.ops.kmq.int8_linear(input, packed, table, factor, row_sum, bias, 7, index, delta, activation)
        want = reference.int8_linear(input, packed, table, factor, row_sum, bias, 7, index, delta, activation)
        assert got.shape == want.shape == (2, 3, 30)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)])
def test_leading_shapes_and_threads(shape):
    _, packed, codebook = problem(70, 40, 3, 70, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 40)
    input, factor = torch.randn(shape), scale.repeat_interleave(70)
    out = ops.int8_linear(input, packed, table, factor, row_sum)
    assert out.shape == (*shape[:-1], 70)
    flat = torch.stack(
        [ops.int8_linear(row, packed, table, factor, row_sum) for row in input.reshape(-1, 40)] or [torch.zeros(70)]
    )
    assert input.numel() == 0 or torch.equal(out.reshape(-1, 70), flat)


def test_opcheck():
    _, packed, codebook = problem(20, 40, 3, 5, torch.float32)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, 40, group_rows=5)
    torch.library.opcheck(torch.ops.kmq.int8_codebook, (packed, codebook, 40, 5))
    arguments = (torch.randn(3, 40), packed, table, scale.repeat_interleave(5), row_sum, torch.randn(20), 5, None, None, "gelu")
    torch.library.opcheck(torch.ops.kmq.int8_linear, arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": torch.ones(2, 40, dtype=torch.float64)}, "input: expected fp32, bf16 or fp16"),
        ({"input": torch.tensor(1.0)}, r"input: expected shape \(..., IN\)"),
        ({"input": torch.ones(2, 300)}, "packed: expected"),
        ({"table": torch.zeros(1, 8)}, "table: expected int8"),
        ({"table": torch.zeros(8, dtype=torch.int8)}, r"table: expected shape \(G, K\)"),
        ({"factor": torch.ones(3)}, r"factor: expected shape \(20,\)"),
        ({"row_sum": torch.ones(20)}, "row_sum: expected int32"),
        ({"bias": torch.ones(3)}, r"bias: expected shape \(20,\)"),
        ({"outlier_index": torch.zeros(1, dtype=torch.int32)}, "outlier_delta: expected both"),
        ({"activation": "tanh"}, "activation: expected one of none, gelu"),
        ({"group_rows": 7}, "group_rows"),
        ({"table": torch.full((1, 8), -128, dtype=torch.int8)}, "table: expected entries of at least -127, got -128"),
        ({"outlier_index": torch.tensor([800], dtype=torch.int32), "outlier_delta": torch.ones(1)}, "outlier_index: expected"),
    ],
)
def test_bad_arguments_get_a_sentence(changed, message):
    given = {
        "input": torch.ones(2, 40),
        "packed": kmq.pack(torch.zeros(20, 40, dtype=torch.uint8), 3),
        "table": torch.zeros(1, 8, dtype=torch.int8),
        "factor": torch.ones(20),
        "row_sum": torch.zeros(20, dtype=torch.int32),
    }
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        ops.int8_linear(**{**given, **changed})


def test_too_many_columns_get_a_sentence():
    packed = torch.zeros(1, (32768 // 128 + 1) * 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cols: integer sums take up to 32768 columns, got 32769"):
        ops.int8_codebook(packed, torch.ones(1, 2), 32769)
