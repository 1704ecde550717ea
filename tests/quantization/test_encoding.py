"""encode_weights: outliers stay exact, row factors and Fisher weights lower the error they are meant to lower."""

import pytest
import torch

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import encode_weights, encoded_bytes
from kmq_kernels.quantization.encoding import decode, decode_rows


def _heavy(rows, cols):
    return torch.distributions.StudentT(3.0).sample((rows, cols))


def _module(weight, config, importance=None):
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    kmq.quantize_(model, config, sample_weight=None if importance is None else {"0": importance})
    return model[0]


@pytest.mark.parametrize("scheme", ["kmeans", "linear"])
@pytest.mark.parametrize("options", [{}, {"row_scale": True}, {"granularity": "row"}, {"granularity": "group", "group_rows": 7}])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_outliers_are_exact_and_the_largest(scheme, options, bits):
    weight = _heavy(30, 50)
    config = kmq.KMQConfig(bits=bits, scheme=scheme, outlier_fraction=0.02, **options)
    module = _module(weight, config)
    assert len(module.outlier_values) == 30
    index = module.outlier_index.long()
    assert (index[1:] > index[:-1]).all()
    assert torch.equal(module.weight.detach().flatten()[index], weight.flatten()[index])
    far = (weight - weight.mean()).abs().flatten()
    others = far[~torch.isin(torch.arange(1500), index)]
    assert far[index].min() >= others.max()
    without = _module(weight, kmq.KMQConfig(bits=bits, scheme=scheme, **options))

    def error(found):
        return (found.weight.detach() - weight).double().square().sum()

    assert error(module) <= error(without)


def test_the_codebook_is_the_one_of_the_other_values():
    weight = _heavy(40, 40)
    module = _module(weight, kmq.KMQConfig(bits=3, outlier_fraction=0.01))
    kept = ~torch.isin(torch.arange(1600), module.outlier_index.long())
    expected = kmq.kmeans(weight.flatten()[kept], 8)
    torch.testing.assert_close(module.codebook.detach()[0], expected.centroids)
    linear = _module(weight, kmq.KMQConfig(bits=3, scheme="linear", outlier_fraction=0.01))
    expected = kmq.linear_codebook(weight.flatten()[kept], 8)
    torch.testing.assert_close(linear.codebook.detach()[0], expected.centroids)


def test_fisher_weights_choose_other_outliers():
    weight, importance = torch.randn(20, 30), torch.ones(20, 30)
    importance[4, 5] = 1e6
    module = _module(weight, kmq.KMQConfig(bits=2, outlier_fraction=0.002), importance)
    assert module.outlier_index.tolist() == [4 * 30 + 5]


@pytest.mark.parametrize("granularity", [{}, {"granularity": "group", "group_rows": 20}])
def test_row_factors_help_rows_of_different_spread(granularity):
    weight = torch.randn(60, 64) * torch.logspace(-2, 1, 60)[torch.randperm(60), None]
    weight[7] = 0.0
    plain = encode_weights([weight], [3], kmq.KMQConfig(**granularity))[0]
    scaled = encode_weights([weight], [3], kmq.KMQConfig(row_scale=True, **granularity))[0]
    assert scaled.error < 0.6 * plain.error
    assert scaled.row_scale.isfinite().all()
    module = _module(weight, kmq.KMQConfig(bits=3, row_scale=True, **granularity))
    error = float((module.weight.detach() - weight).double().square().sum())
    assert scaled.error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"granularity": "group", "group_rows": 3}])
def test_weighted_clustering_is_never_worse_in_the_weighted_norm(bits, options):
    weight = torch.randn(24, 70)
    importance = torch.rand(24, 70) ** 6
    config = kmq.KMQConfig(**options)
    weighted = encode_weights([weight], [bits], config, importance=[importance])[0]
    plain = _module(weight, kmq.KMQConfig(bits=bits, **options)).weight.detach()
    in_norm = float((importance * (weight - plain).square()).sum(dtype=torch.float64))
    assert weighted.error <= in_norm * (1 + 1e-6)


def test_rows_without_any_importance_still_get_a_codebook():
    weight, importance = torch.randn(6, 20), torch.rand(6, 20)
    importance[2] = 0.0
    found = encode_weights([weight], [2], kmq.KMQConfig(granularity="row"), importance=[importance])[0]
    alone = encode_weights([weight[2:3]], [2], kmq.KMQConfig(granularity="row"))[0]
    assert torch.equal(found.codebook[2], alone.codebook[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"row_scale": True}, {"outlier_fraction": 0.03}, {"row_scale": True, "outlier_fraction": 0.2}, {"granularity": "row"}],
)
def test_stated_bytes(options):
    module = _module(torch.randn(9, 140), kmq.KMQConfig(bits=5, **options))
    stored = sum(p.numel() * p.element_size() for p in module.stored().values())
    assert stored == encoded_bytes(9, 140, 5, kmq.KMQConfig(**options))


def test_not_finite_is_named():
    for options in ({"outlier_fraction": 0.1}, {"row_scale": True}):
        weight = torch.randn(5, 5)
        weight[1, 1] = float("inf")
        with pytest.raises(ValueError, match="layer7: expected finite values"):
            encode_weights([weight], [2], kmq.KMQConfig(**options), names=["layer7"])


def test_training_moves_factors_and_outliers_and_no_index():
    module = _module(_heavy(20, 30), kmq.KMQConfig(bits=2, row_scale=True, outlier_fraction=0.05))
    assert isinstance(module, CodebookModule)
    before = {name: value.detach().clone() for name, value in module.stored().items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    module(torch.randn(8, 30)).square().sum().backward()
    optimizer.step()
    for name, value in module.stored().items():
        assert torch.equal(value, before[name]) == (name in ("packed", "outlier_index")), name


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"granularity": "group", "group_rows": 7}])
@pytest.mark.parametrize("more", [{}, {"row_scale": True, "outlier_fraction": 0.05}])
def test_decoded_weights_and_rows_are_those_of_the_module(options, more):
    if more and options.get("granularity") == "row":
        more = {"outlier_fraction": 0.05}
    config = kmq.KMQConfig(bits=3, **options, **more)
    weight = _heavy(30, 50)
    (encoded,) = encode_weights([weight], [3], config)
    group_rows = config.rows_per_codebook(30)
    whole = decode(encoded, 50, group_rows)
    assert torch.equal(whole, _module(weight, config).weight)
    rows = torch.tensor([29, 0, 13, 14])
    assert torch.equal(decode_rows(encoded, rows, 50, group_rows), whole[rows])
