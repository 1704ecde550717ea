"""quantize_ and dequantize_ over the families: what is quantized, what is left, what stays shared."""

import copy

import pytest
import torch
from conftest import FAMILIES, family_model
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import model_size, plan

BITS = 2


def _dense_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


def _train_steps(model, ids, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(input_ids=ids, labels=torch.arange(len(ids)) % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_through_the_stages(family, ids):
    model = family_model(family)
    dense = {name: layer.weight.detach().clone() for name, layer in _dense_layers(model).items()}
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("classifier")}
    config = kmq.quantize_(model, kmq.KMQConfig(bits=BITS))

    assert {n for n in config.skip if n.startswith("classifier")} == {n for n in dense if n.startswith("classifier")}
    assert all(name.startswith("classifier") for name in config.skip)
    for key, value in head.items():
        assert torch.equal(model.state_dict()[key], value)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, CodebookModule)}
    assert set(quantized) == set(dense) - set(config.skip)
    for name, module in quantized.items():
        assert module.weight.unique().numel() <= 2**BITS
        assert module.weight.shape == dense[name].shape
        # Every weight went to its nearest centroid.
        nearest = (dense[name].flatten()[:, None] - module.codebook.detach()).abs().min(1).values
        torch.testing.assert_close((module.weight - dense[name]).abs().flatten(), nearest)

    before = {name: module.packed.clone() for name, module in quantized.items()}
    books = {name: module.codebook.detach().clone() for name, module in quantized.items()}
    _train_steps(model, ids)
    moved = 0
    for name, module in quantized.items():
        assert torch.equal(module.packed, before[name])
        assert module.weight.unique().numel() <= 2**BITS
        moved += not torch.equal(module.codebook, books[name])
    assert moved > len(quantized) // 2

    logits = model(ids).logits
    kmq.dequantize_(model)
    assert set(_dense_layers(model)) == set(dense)
    torch.testing.assert_close(model(ids).logits, logits)


def test_albert_shared_layers_are_one_module():
    model = family_model("albert", num_hidden_layers=4)
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    names = [n for n, m in model.named_modules() if isinstance(m, CodebookModule)]
    assert len([n for n in names if "attention.query" in n]) == 1


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "mpnet", "distilbert"])
def test_tied_head_stays_tied(family, ids):
    model = family_model(family, "MaskedLM")
    expected = {n for n, m in _dense_layers(model).items()}
    kmq.quantize_(model, kmq.KMQConfig(bits=4))
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert isinstance(embedding, kmq.CodebookEmbedding)
    assert isinstance(head, kmq.CodebookLinear)
    assert head.codebook is embedding.codebook
    assert head.packed is embedding.packed
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert embedding.codebook.grad is not None
    kmq.dequantize_(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {n for n, m in _dense_layers(model).items()} == expected


def test_granularity_and_module_bits():
    model = family_model("bert")
    other = {"word_embeddings": 6, "classifier": 8}
    config = kmq.KMQConfig(bits=3, granularity="group", group_rows=5, module_bits=other, skip=["pooler"])
    resolved = kmq.quantize_(model, config)
    words = model.bert.embeddings.word_embeddings
    assert (words.bits, tuple(words.codebook.shape)) == (6, (24, 64))
    assert model.classifier.bits == 8
    assert resolved.skip == ["bert.pooler.dense"]
    query = model.bert.encoder.layer[0].attention.self.query
    assert tuple(query.codebook.shape) == (7, 8)


def test_resolved_config_gives_the_same_plan():
    model = family_model("roberta")
    config = kmq.KMQConfig(skip=["pooler", r"layer\.0"])
    first = plan(model, config)
    again = plan(model, kmq.KMQConfig(skip=first.left))
    assert [(w.name, w.bits) for w in again.quantized] == [(w.name, w.bits) for w in first.quantized]
    assert {w.left for w in first.weights} == {"", "named in `skip`", "a classification layer"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_the_parameter_and_leaves_the_model(value):
    model = family_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        kmq.quantize_(model, kmq.KMQConfig())
    assert not any(isinstance(m, CodebookModule) for m in model.modules())
    torch.testing.assert_close(model.state_dict(), before, equal_nan=True)


def test_constant_and_few_distinct_values():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.fill_(0.25)
        model[1].weight.copy_(torch.tensor([0.0, 1.0, 3.0]).repeat(8).view(4, 6))
    dense = [layer.weight.detach().clone() for layer in model]
    kmq.quantize_(model, kmq.KMQConfig(bits=4))
    for layer, weight in zip(model, dense, strict=True):
        assert torch.equal(layer.weight, weight)
        assert int(kmq.unpack(layer.packed, 4, weight.shape[1]).max()) < weight.unique().numel()


def test_twice_and_nothing_to_quantize():
    model = nn.Sequential(nn.Linear(8, 6))
    kmq.quantize_(model, kmq.KMQConfig())
    with pytest.raises(ValueError, match="quantized already"):
        kmq.quantize_(model, kmq.KMQConfig())
    with pytest.raises(ValueError, match="no embedding or linear layer"):
        kmq.quantize_(nn.Sequential(nn.ReLU()), kmq.KMQConfig())


def test_max_norm_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        kmq.quantize_(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), kmq.KMQConfig())


def test_size_counts_everything_once():
    model = family_model("bert", "MaskedLM")
    weights = sum(p.numel() for p in model.parameters())
    kmq.quantize_(model, kmq.KMQConfig(bits=4))
    size = model_size(model)
    assert size.weights == weights
    stored = {id(value): value for value in model.state_dict(keep_vars=True).values()}  # the head's is the embedding's
    assert size.total_bytes == sum(value.numel() * value.element_size() for value in stored.values())


def test_paper_preset_trains_with_the_mean():
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(preset="paper", bits=2))
    assert {m.grad_reduction for m in model.modules() if isinstance(m, CodebookModule)} == {"mean"}
