"""Gradients of gradients through codebook layers: numerically, and as those of dense layers with the same weights."""

import pytest
import torch
from torch import nn

import kmq_kernels as kmq

OPTIONS = [{}, {"group_rows": 2}, {"outliers": 4, "row_scale": True}, {"group_rows": 1, "outliers": 3}]


def _filled(module):
    with torch.no_grad():
        module.codebook.normal_()
        index = torch.randint(0, 2**module.bits, (module.rows, module.cols), dtype=torch.uint8)
        module.packed.copy_(kmq.pack(index, module.bits))
        if module.outlier_index is not None:
            places = torch.randperm(module.rows * module.cols)[: len(module.outlier_index)]
            module.outlier_index.copy_(places.sort().values)
            module.outlier_values.normal_()
        if module.row_scale is not None:
            module.row_scale.normal_()
    return module


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", [1, 3])
def test_linear_numerically(bits, options):
    module = _filled(kmq.CodebookLinear(7, 5, bits, dtype=torch.float64, **options))
    for rows in (3, 70):  # sparse values go through sums of segments, or a dense product
        x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
        names = [name for name, _ in module.named_parameters()]
        values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

        def of_all(x, *values, names=names):
            return torch.tanh(torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))).sum(0)

        fast = bool(options) or rows > 10  # random directions instead of every entry
        assert torch.autograd.gradgradcheck(of_all, (x, *values), fast_mode=fast)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_embedding_against_a_dense_one(options, scale_grad_by_freq):
    module = _filled(
        kmq.CodebookEmbedding(6, 7, 2, padding_idx=1, scale_grad_by_freq=scale_grad_by_freq, dtype=torch.float64, **options)
    )
    ids = torch.tensor([[0, 1, 2], [2, 2, 5]])
    padding = (ids == 1)[..., None]
    count = ids.flatten().bincount(minlength=6)[ids][..., None].double() if scale_grad_by_freq else torch.tensor(1.0)

    def dense(ids):
        rows = module.decoded()[ids]  # torch's own embedding has no gradient of second order with scale_grad_by_freq
        rows = torch.where(padding, rows.detach(), rows)
        return rows.detach() + (rows - rows.detach()) / count

    def second(forward):
        parameters = list(module.parameters())
        first = torch.autograd.grad(torch.tanh(forward(ids)).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters)

    for ours, expected in zip(second(module), second(dense), strict=True):
        torch.testing.assert_close(ours, expected)
        assert ours.abs().sum() > 0


def test_gradient_penalty_is_that_of_the_dense_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    kmq.quantize_(net, kmq.KMQConfig(bits=4))

    def penalty(net, wanted):
        x = torch.ones(3, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *wanted])

    index = kmq.unpack(net[0].packed, 4, 8).long().flatten()
    ours = penalty(net, [net[0].codebook])
    dense = kmq.dequantize_(net)
    expected = penalty(dense, [dense[0].weight])
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1][0], torch.zeros(16).index_add_(0, index, expected[1].flatten()))


def test_hessian_vector_product_of_a_weight_that_is_read():
    layer = _filled(kmq.CodebookLinear(7, 5, 2, bias=False, dtype=torch.float64))
    book = layer.codebook
    (first,) = torch.autograd.grad(layer.weight.pow(3).sum(), book, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), book)
    members = kmq.unpack(layer.packed, 2, 7).flatten().long().bincount(minlength=4)
    torch.testing.assert_close(second[0], 6 * members * book.detach()[0])
