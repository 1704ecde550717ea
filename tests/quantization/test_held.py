"""What a model holds beside its modules: layers in lists, flags on parameters, bits and skips of layers that share a weight."""

import pytest
import torch
from conftest import family_model
from torch import nn
from torch.nn import functional as F

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule


class Holding(nn.Module):
    """Two layers; the forward reaches the first by another way than its name."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.how = how
        if how == "list":
            self.layers = [self.first]
        elif how == "dict":
            self.layers = {"x": [self.first]}
        elif how == "method":
            self.call = self.first.forward
        elif how == "attribute":
            object.__setattr__(self, "hidden", self.first)
        elif how == "weight":
            self.weights = (self.first.weight,)

    def forward(self, x):
        if self.how in ("list", "dict"):
            return self.second(self.layers[0](x) if self.how == "list" else self.layers["x"][0](x))
        if self.how == "weight":
            return self.second(F.linear(x, self.weights[0]))
        return self.second(self.call(x) if self.how == "method" else self.hidden(x))


@pytest.mark.parametrize("how", ["list", "dict", "method", "attribute", "weight"])
def test_a_layer_that_is_held_elsewhere_is_left_and_named(how):
    model = Holding(how)
    x = torch.randn(3, 16)
    with pytest.warns(UserWarning, match=r"stay as they are: first \(held, or its weight, by a list, a dict or an attribute"):
        kmq.quantize_(model, kmq.KMQConfig(bits=2))
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, CodebookModule)
    kept = model(x)
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.first.bias.mul_(2)
    assert not torch.equal(model(x), kept)  # the model still computes with what its name leads to


def test_flags_of_a_weight_go_to_its_codebook_and_back():
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.no_weight_decay = True
    kmq.quantize_(model, kmq.KMQConfig(bits=2, row_scale=True))
    assert model[0].codebook.no_weight_decay
    assert model[0].row_scale.no_weight_decay
    assert not hasattr(model[0].bias, "no_weight_decay")
    kmq.dequantize_(model)
    assert model[0].weight.no_weight_decay


def test_layers_that_share_a_weight_cannot_have_different_bits():
    model = family_model("bert", "MaskedLM")
    bits = {"decoder": 2, "word_embeddings": 6}
    sentence = r"module_bits: bert\.embeddings\.word_embeddings and cls\.predictions\.decoder share a weight, got 6 bits"
    with pytest.raises(ValueError, match=sentence):
        kmq.quantize_(model, kmq.KMQConfig(module_bits=bits))
    assert not any(isinstance(module, CodebookModule) for module in model.modules())
    kmq.quantize_(model, kmq.KMQConfig(module_bits={"decoder": 2}))
    assert model.bert.embeddings.word_embeddings.bits == 2


def test_a_layer_that_shares_a_weight_with_a_skipped_one_is_named():
    model = family_model("bert", "MaskedLM")
    with pytest.warns(UserWarning, match=r"word_embeddings, cls\.predictions\.decoder \(sharing a weight with a layer named in"):
        kmq.quantize_(model, kmq.KMQConfig(skip=["decoder"]))
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
