"""Settings of modules that are no tensors, before or after optimize_: the compiled encoder takes them over or stands back."""

import copy

import pytest
import torch
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels import ops

pytestmark = pytest.mark.skipif(not ops.has_compiled_encoder(), reason="the extension was not built")


def change_eps(model):
    model.bert.encoder.layer[0].output.LayerNorm.eps = 0.5


def change_scaling(model):
    model.bert.encoder.layer[1].attention.self.scaling = 0.01


@pytest.fixture
def model():
    model = family_model("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    return model


@pytest.mark.parametrize("change", [change_eps, change_scaling])
@pytest.mark.parametrize("when", ["before", "after"])
def test_settings_count(change, when, model, ids):
    ordinary = copy.deepcopy(model)
    with torch.no_grad():
        unchanged = ordinary(ids).logits
        change(ordinary)
        expected = ordinary(ids).logits
        assert not torch.allclose(expected, unchanged, atol=1e-4)
        if when == "before":
            change(model)
        if when == "before" and change is change_scaling:
            with pytest.warns(UserWarning, match=r"its attention is scaled by 0\.01, the compiled code's by 0\.353553"):
                kmq.optimize_(model)
        else:
            kmq.optimize_(model)
            model(ids)
        if when == "after":
            change(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
