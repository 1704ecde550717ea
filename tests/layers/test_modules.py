"""CodebookLinear and CodebookEmbedding against dense layers with the same weight."""

import pytest
import torch
import torch.nn.functional as F

import kmq_kernels as kmq


def _linear(bits=3, group_rows=None, reduction="sum", dtype=torch.float64):
    module = kmq.CodebookLinear(37, 10, bits, group_rows=group_rows, grad_reduction=reduction, dtype=dtype)
    with torch.no_grad():
        module.codebook.copy_(torch.randn_like(module.codebook))
        module.packed.copy_(kmq.pack(torch.randint(0, 2**bits, (10, 37), dtype=torch.uint8), bits))
        module.bias.normal_()
    return module


@pytest.mark.parametrize("group_rows", [None, 1, 4])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_linear_equals_dense(bits, group_rows):
    module = _linear(bits, group_rows)
    index = kmq.unpack(module.packed, bits, 37).long()
    book = torch.arange(10) // module.group_rows
    codebook = module.codebook.detach().clone().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    x = torch.randn(2, 5, 37, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, dense = module(x), F.linear(y, codebook[book[:, None], index], bias)
    torch.testing.assert_close(ours, dense)
    g = torch.randn_like(dense)
    ours.backward(g)
    dense.backward(g)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module.codebook.grad, codebook.grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
    assert module.packed.grad is None


def test_mean_divides_by_members_and_empty_is_zero():
    total, mean = _linear(2), _linear(2, reduction="mean")
    index = torch.randint(0, 3, (10, 37), dtype=torch.uint8)  # centroid 3 has no member
    for module in (total, mean):
        with torch.no_grad():
            module.packed.copy_(kmq.pack(index, 2))
            module.codebook.copy_(torch.arange(4.0)[None])
        module(torch.ones(1, 37, dtype=torch.float64)).square().sum().backward()
    bias_free = total.codebook.grad[0, :3] / index.flatten().long().bincount()[:3]
    with torch.no_grad():
        mean.bias.copy_(total.bias)
    mean.zero_grad()
    mean(torch.ones(1, 37, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(mean.codebook.grad[0, :3], bias_free)
    assert mean.codebook.grad[0, 3] == 0
    assert total.codebook.grad[0, 3] == 0


def test_mean_counts_follow_a_loaded_state():
    module, other = _linear(2, reduction="mean"), _linear(2, reduction="mean")
    module(torch.ones(1, 37, dtype=torch.float64)).sum().backward()
    module.load_state_dict(other.state_dict())
    module.zero_grad()
    for m in (module, other):
        m(torch.ones(1, 37, dtype=torch.float64)).sum().backward()
    assert torch.equal(module.codebook.grad, other.codebook.grad)


def test_embedding_equals_dense_and_padding_gives_no_gradient():
    module = kmq.CodebookEmbedding(50, 20, 4, padding_idx=2, dtype=torch.float64)
    with torch.no_grad():
        module.codebook.normal_()
        module.packed.copy_(kmq.pack(torch.randint(0, 16, (50, 20), dtype=torch.uint8), 4))
    ids = torch.randint(0, 50, (3, 7))
    ids[0, :3] = 2
    codebook = module.codebook.detach().clone().requires_grad_()
    dense = F.embedding(ids, codebook[0][kmq.unpack(module.packed, 4, 20).long()])
    out = module(ids)
    torch.testing.assert_close(out, dense)
    g = torch.randn_like(out)
    out.backward(g)
    dense.backward(torch.where((ids == 2)[..., None], 0.0, g))
    torch.testing.assert_close(module.codebook.grad, codebook.grad)


def test_embedding_id_out_of_range():
    module = kmq.CodebookEmbedding(5, 8)
    with pytest.raises(IndexError, match="ids"):
        module(torch.tensor([1, 5]))


@pytest.mark.parametrize("padding_idx", [-1, -50, 2, 0])
def test_padding_idx_is_that_of_torch(padding_idx):
    module = kmq.CodebookEmbedding(50, 20, 4, padding_idx=padding_idx)
    dense = torch.nn.Embedding(50, 20, padding_idx=padding_idx)
    assert module.padding_idx == dense.padding_idx
    with torch.no_grad():
        module.packed.copy_(kmq.pack(torch.randint(0, 16, (50, 20), dtype=torch.uint8), 4))
    for ids in (torch.tensor([dense.padding_idx]), torch.tensor([7])):
        module.zero_grad()
        module(ids).sum().backward()
        assert bool(module.codebook.grad.any()) == (ids.item() != dense.padding_idx)
        book = module.codebook.detach().requires_grad_()
        kmq.codebook_embedding(ids, module.packed, book, 20, padding_idx=padding_idx).sum().backward()
        assert torch.equal(book.grad, module.codebook.grad)


@pytest.mark.parametrize("padding_idx", [50, -51, 99])
def test_padding_idx_outside_the_rows(padding_idx):
    with pytest.raises(ValueError, match=f"padding_idx: expected one of the 50 rows, got {padding_idx}"):
        kmq.CodebookEmbedding(50, 20, 4, padding_idx=padding_idx)
    with pytest.raises(ValueError, match="padding_idx: expected one of the 5 rows"):
        kmq.codebook_embedding(torch.tensor([1]), torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(1, 16), 8, padding_idx=5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 0}, "bits: expected 1 to 8, got 0"),
        ({"bits": 9}, "bits: expected 1 to 8, got 9"),
        ({"group_rows": 0}, "group_rows: expected at least 1, got 0"),
        ({"grad_reduction": "max"}, "grad_reduction: expected 'sum' or 'mean', got 'max'"),
        ({"outliers": 41}, "outliers: expected 0 to 40 of a weight of 8 x 5, got 41"),
        ({"outliers": -1}, "outliers: expected 0 to 40"),
    ],
)
def test_layers_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        kmq.CodebookLinear(5, 8, **options)
    with pytest.raises(ValueError, match=sentence):
        kmq.CodebookEmbedding(8, 5, **options)


def test_autocast_gives_the_dtype_of_a_linear_layer():
    module = _linear(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.randn(3, 37))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.codebook.grad.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_compile_fullgraph(reduction):
    module = _linear(4, reduction=reduction, dtype=torch.float32)
    x = torch.randn(3, 37)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    grad = module.codebook.grad.clone()
    module.zero_grad()
    module(x).sum().backward()
    torch.testing.assert_close(grad, module.codebook.grad)


def test_weight_cannot_be_assigned():
    with pytest.raises(AttributeError):
        _linear().weight = torch.zeros(3)


def test_gradient_checkpointing_and_double_use():
    from torch.utils.checkpoint import checkpoint

    module = kmq.CodebookLinear(16, 16, 3, dtype=torch.float64)
    with torch.no_grad():
        module.codebook.normal_()
        module.packed.copy_(kmq.pack(torch.randint(0, 8, (16, 16), dtype=torch.uint8), 3))
    x = torch.randn(4, 16, dtype=torch.float64)
    module(torch.tanh(module(x))).sum().backward()
    grad = module.codebook.grad.clone()
    module.zero_grad()
    out = checkpoint(module, torch.tanh(checkpoint(module, x, use_reentrant=False)), use_reentrant=False)
    out.sum().backward()
    assert torch.equal(module.codebook.grad, grad)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("group_rows", [None, 4])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_outliers_and_row_factors_equal_dense(bits, group_rows, row_scale, reduction):
    options = {"group_rows": group_rows, "row_scale": row_scale, "outliers": 9, "dtype": torch.float64}
    layer = kmq.CodebookLinear(37, 10, bits, grad_reduction=reduction, **options)
    rows = kmq.CodebookEmbedding(10, 37, bits, grad_reduction=reduction, padding_idx=3, **options)
    with torch.no_grad():
        for module in (layer, rows):
            module.codebook.normal_()
            module.packed.copy_(kmq.pack(torch.randint(0, 2**bits, (10, 37), dtype=torch.uint8), bits))
            module.outlier_index.copy_(torch.randperm(370)[:9].sort().values)
            module.outlier_values.normal_()
            if row_scale:
                module.row_scale.normal_()
    x, ids = torch.randn(6, 37, dtype=torch.float64, requires_grad=True), torch.randint(0, 10, (5, 8))
    for module, ours, dense in (
        (layer, lambda: layer(x), lambda: F.linear(x, layer.weight, layer.bias)),
        (rows, lambda: rows(ids), lambda: F.embedding(ids, rows.weight, padding_idx=3)),
    ):
        out, expected = ours(), dense()
        torch.testing.assert_close(out, expected)
        parameters = [p for p in module.stored().values() if p.requires_grad] + ([x] if module is layer else [])
        g = torch.randn_like(out)
        for a, b in zip(torch.autograd.grad(out, parameters, g), torch.autograd.grad(expected, parameters, g), strict=True):
            torch.testing.assert_close(a, b)


def test_outliers_and_row_factors_compile_fullgraph():
    options = {"row_scale": True, "outliers": 5}
    for module, x in (
        (kmq.CodebookLinear(37, 10, 3, **options), torch.randn(3, 37)),
        (kmq.CodebookEmbedding(20, 8, 3, **options), torch.randint(0, 20, (3, 4))),
    ):
        with torch.no_grad():
            module.codebook.normal_()
            module.outlier_index.copy_(torch.arange(5))
            module.outlier_values.normal_()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).sum().backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
        module(x).sum().backward()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, module.get_parameter(name).grad)
