"""Bits for a budget: equal to brute force, never over the budget, and the size that was stated is the size on disk."""

import itertools
import re

import pytest
import torch
from conftest import family_config, family_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import BudgetError, by_eigenvalue, distortion_curves, least_error, model_size


def _brute(costs, errors, budget):
    """The least total error of all choices that fit, one by one; None where none does."""
    totals = [
        sum(errors[i][c] for i, c in enumerate(choice))
        for choice in itertools.product(*(range(len(row)) for row in costs))
        if sum(costs[i][c] for i, c in enumerate(choice)) <= budget
    ]
    return min(totals, default=None)


@pytest.mark.parametrize("kind", ["curves", "arbitrary", "ties"])
def test_least_error_equals_brute_force(kind):
    generator = torch.Generator().manual_seed(["curves", "arbitrary", "ties"].index(kind))

    def draw(high, *shape):
        return torch.randint(1, high, shape, generator=generator)

    for _ in range(60):
        modules, choices = int(draw(6, 1)), int(draw(6, 1))
        if kind == "curves":  # what tensors look like: size grows with the bits, error falls by about 4 a bit
            sizes = draw(1000, modules, 1) * torch.arange(1, choices + 1) + draw(50, modules, 1)
            errors = draw(1000, modules, 1).double() * 4.0 ** -torch.arange(choices) * (0.8 + 0.4 * torch.rand(modules, choices))
        else:
            sizes, errors = draw(40, modules, choices), draw(5 if kind == "ties" else 1000, modules, choices).double() - 1
        costs, errors = sizes.tolist(), errors.tolist()
        least, most = sum(map(min, costs)), sum(map(max, costs))
        for budget in (least, (least + most) // 2, int(least + 0.1 * (most - least)), most):
            choice = least_error(costs, errors, budget)
            assert sum(costs[i][c] for i, c in enumerate(choice)) <= budget
            assert sum(errors[i][c] for i, c in enumerate(choice)) == pytest.approx(_brute(costs, errors, budget), rel=1e-12)
        with pytest.raises(BudgetError, match=f"smallest possible is {least} bytes, got {least - 1}"):
            least_error(costs, errors, least - 1)


def test_least_error_of_many_modules_is_near_its_lower_bound():
    # Too many for brute force: the linear relaxation bounds the optimum from below, within one step of one module.
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(10_000, 3_000_000, (200, 1), generator=generator) * torch.arange(1, 9)
    errors = torch.rand(200, 1, generator=generator).double() ** 4 * 4.0 ** -torch.arange(8.0)
    budget = int(sizes.sum(0)[2])
    choice = least_error(sizes.tolist(), errors.tolist(), budget)
    spent = sum(int(sizes[i, c]) for i, c in enumerate(choice))
    found = sum(float(errors[i, c]) for i, c in enumerate(choice))
    assert spent <= budget
    bound = max(
        float((errors + price * sizes).min(1).values.sum()) - price * budget for price in torch.logspace(-14, -6, 4000).tolist()
    )
    assert bound <= found <= bound * 1.001


def test_arguments_of_least_error():
    assert least_error([], [], 5) == []
    assert least_error([[3, 1], [2, 4]], [[0.0, 0.0], [0.0, 0.0]], 3) == [1, 0]
    with pytest.raises(ValueError, match="expected the shape of costs"):
        least_error([[1, 2]], [[1.0]], 5)
    with pytest.raises(ValueError, match="finite numbers"):
        least_error([[1, 2]], [[float("nan"), 1.0]], 5)


def test_larger_eigenvalues_never_get_fewer_bits():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        eigenvalues = (10 ** (4 * torch.rand(7, generator=generator) - 2)).tolist()
        unit = torch.randint(100, 1000, (7, 1), generator=generator)
        costs = (unit * torch.arange(1, 9)).tolist()
        budget = int(sum(row[0] for row in costs) * (1 + 5 * torch.rand((), generator=generator)))
        choice = by_eigenvalue(costs, eigenvalues, budget)
        assert sum(costs[i][c] for i, c in enumerate(choice)) <= budget
        order = sorted(range(7), key=eigenvalues.__getitem__)
        assert [choice[i] for i in order] == sorted(choice)
    assert by_eigenvalue([[1, 2], [1, 2]], [0.0, 5.0], 3) == [0, 1]


def test_curves_fall_and_are_the_error_of_the_decoded_weight():
    weights = [torch.randn(12, 40), torch.randn(30, 9) ** 3]
    importance = [torch.rand(12, 40), None]
    config = kmq.KMQConfig(granularity="group", group_rows=5)
    curves = distortion_curves(weights, config, importance=importance)
    assert (curves[:, 1:] <= curves[:, :-1]).all()
    layer = nn.Linear(40, 12, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights[0])
    model = nn.Sequential(layer)
    kmq.quantize_(model, kmq.KMQConfig(bits=3, granularity="group", group_rows=5), sample_weight={"0": importance[0]})
    error = (importance[0].double() * (weights[0].double() - model[0].weight.detach().double()) ** 2).sum()
    assert curves[0, 2] == pytest.approx(float(error), rel=1e-5)


def _wide_model():
    torch.manual_seed(4)
    config = family_config("bert", hidden_size=128, intermediate_size=256, vocab_size=600)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outlier_fraction": 0.01},
        {"row_scale": True},
        {"granularity": "group", "group_rows": 32},
        {"scheme": "linear"},
        {"allocation": "uniform"},
        {"allocation": "fisher"},
        {"allocation": "hessian", "scheme": "linear"},
    ],
)
def test_budgets_are_kept_and_sizes_are_those_on_disk(options, tmp_path):
    options = {"allocation": "distortion", **options}
    given = _wide_model()
    names = [name for name, m in given.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and name != "classifier"]
    extra = {}
    if options["allocation"] == "fisher":
        extra["sample_weight"] = {name: torch.rand_like(given.get_submodule(name).weight) for name in names}
    if options["allocation"] == "hessian":
        extra["eigenvalues"] = {name: float(i + 1) for i, name in enumerate(names)}
    for budget in ({"bits_per_weight": 3.4}, {"size": 140_000}):
        model = _wide_model()
        resolved = kmq.quantize_(model, kmq.KMQConfig(**options, **budget), **extra)
        size = model_size(model)
        model.save_pretrained(tmp_path / "packed")
        on_disk = (tmp_path / "packed/model.safetensors").stat().st_size
        if "size" in budget:
            assert on_disk <= budget["size"]
            assert on_disk > 0.7 * budget["size"]
        else:
            assert size.bits_per_weight <= budget["bits_per_weight"]
            assert size.bits_per_weight > 0.7 * budget["bits_per_weight"]
        header = on_disk - size.total_bytes
        assert 0 < header < 60 * 170  # of the file: 8 bytes and JSON, an entry a tensor
        again = kmq.load(tmp_path / "packed")
        bits = {name: m.bits for name, m in model.named_modules() if isinstance(m, CodebookModule)}
        assert bits == {name: m.bits for name, m in again.named_modules() if isinstance(m, CodebookModule)}
        assert len(resolved.module_bits) == len(bits)
        ids = torch.randint(5, 120, (2, 6))
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_stated_size_is_that_on_disk_to_one_percent(tmp_path):
    torch.manual_seed(4)
    config = family_config("bert", hidden_size=256, intermediate_size=512, vocab_size=12_000)
    model = AutoModelForSequenceClassification.from_config(config)
    kmq.quantize_(model, kmq.KMQConfig(allocation="distortion", bits_per_weight=2.5, outlier_fraction=0.002))
    stated = model_size(model).total_bytes
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert stated <= on_disk <= 1.01 * stated
    assert 2.45 < model_size(model).bits_per_weight <= 2.5


def test_given_bits_stay_and_count():
    model = _wide_model()
    config = kmq.KMQConfig(allocation="distortion", bits_per_weight=4.5, module_bits={"word_embeddings": 1, r"layer\.0": 7})
    kmq.quantize_(model, config)
    assert model.bert.embeddings.word_embeddings.bits == 1
    assert {m.bits for m in model.bert.encoder.layer[0].modules() if isinstance(m, CodebookModule)} == {7}
    assert model_size(model).bits_per_weight <= 4.5


@pytest.mark.parametrize("allocation", ["uniform", "distortion", "fisher", "hessian"])
def test_one_bit_is_given_only_where_two_do_not_fit(allocation):
    for budget, fewest in ((2.6, 2), (1.9, 1)):
        model = _wide_model()
        names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and name != "classifier"]
        # Importance that all but vanishes in every other module asks for as few bits as there are.
        ones = {name: torch.full_like(model.get_submodule(name).weight, 1e-9 if i % 2 else 1.0) for i, name in enumerate(names)}
        extra = {
            "fisher": {"sample_weight": ones},
            "hessian": {"eigenvalues": {name: 1e-9 if i % 2 else 1.0 for i, name in enumerate(names)}},
        }.get(allocation, {})
        kmq.quantize_(model, kmq.KMQConfig(allocation=allocation, bits_per_weight=budget), **extra)
        assert min(m.bits for m in model.modules() if isinstance(m, CodebookModule)) == fewest
        assert model_size(model).bits_per_weight <= budget


def test_without_a_budget_it_is_the_size_of_uniform_bits():
    uniform, model = _wide_model(), _wide_model()
    kmq.quantize_(uniform, kmq.KMQConfig(bits=3))
    kmq.quantize_(model, kmq.KMQConfig(bits=3, allocation="distortion"))
    assert model_size(model).total_bytes <= model_size(uniform).total_bytes
    dense = _wide_model()

    def error(quantized):
        return sum(
            float((m.weight.double() - dense.get_submodule(n).weight.double()).detach().square().sum())
            for n, m in quantized.named_modules()
            if isinstance(m, CodebookModule)
        )

    assert error(model) <= error(uniform)


@pytest.mark.parametrize("budget", [{"bits_per_weight": 0.9}, {"size": 1000}])
def test_a_budget_that_cannot_be_met_names_the_smallest(budget):
    model = _wide_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"the smallest possible for this model is [0-9.]+") as caught:
        kmq.quantize_(model, kmq.KMQConfig(allocation="distortion", **budget))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The smallest possible is possible, and then it is what comes out.
    least = float(re.search(r"model is ([0-9.]+)", str(caught.value)).group(1))
    again = {"size": int(least)} if "size" in budget else {"bits_per_weight": least + 1e-4}
    kmq.quantize_(model, kmq.KMQConfig(allocation="distortion", **again))
    assert {m.bits for m in model.modules() if isinstance(m, CodebookModule)} == {1}


def test_sensitivities_that_are_missing():
    model = family_model("bert")
    with pytest.raises(ValueError, match="need the Fisher diagonal"):
        kmq.quantize_(model, kmq.KMQConfig(allocation="fisher"))
    with pytest.raises(ValueError, match="eigenvalues: allocation 'hessian' needs one for every module"):
        kmq.quantize_(model, kmq.KMQConfig(preset="hessian"))
    assert not any(isinstance(m, CodebookModule) for m in model.modules())


def test_names_of_chosen_modules_match_one_module_each():
    model = nn.Sequential(nn.Linear(40, 40), nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)))
    with torch.no_grad():
        model[0].weight.mul_(100)
    resolved = kmq.quantize_(model, kmq.KMQConfig(allocation="distortion", bits=3))
    assert model[0].bits > model[1][0].bits
    assert len(resolved.module_bits) == 3
