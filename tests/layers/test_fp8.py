"""optimize_(model, compute="fp8"): which layers change, when they compute in E4M3, and that nothing stored does."""

import copy

import pytest
import torch
from oracles import relative_rms
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import fp8
from kmq_kernels.layers.fp8 import Fp8CodebookLinear


def model_of(device, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 40)).eval()
    kmq.quantize_(model, kmq.KMQConfig(**{"bits": 4, "skip": [], **config}))
    return model.to(device)


@pytest.fixture
def anywhere(monkeypatch, device):
    """The interpreter stands for tensor cores where there are none."""
    if device == "cpu":
        monkeypatch.setattr(fp8, "_has_tensor_cores", lambda _: True)
    return device


def in_fp8(model):
    for module in model.modules():
        if type(module) is kmq.CodebookLinear:
            module.__class__ = Fp8CodebookLinear
    return model


@pytest.mark.parametrize("config", [{}, {"bits": 3, "granularity": "row"}, {"row_scale": True, "outlier_fraction": 0.01}])
def test_outputs_are_near_and_nothing_stored_changes(config, anywhere):
    """2 to 4 per cent of a layer's output, two layers here; row scales and exact values stay outside the rounding."""
    model = model_of(anywhere, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input = torch.randn(6, 200, device=anywhere)
    with torch.no_grad():
        expected = model(input)
        out = in_fp8(model)(input)
    assert 1e-3 < relative_rms(out.cpu(), expected.double().cpu()) < 0.08
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_gradients_and_a_changed_codebook(anywhere):
    model = in_fp8(model_of(anywhere))
    plain = copy.deepcopy(model)
    fp8.compute_as_before(plain)
    assert {type(module) for module in plain.modules() if isinstance(module, kmq.CodebookLinear)} == {kmq.CodebookLinear}
    input = torch.randn(3, 200, device=anywhere)
    assert torch.equal(model(input), plain(input))  # gradients are recorded: the ordinary product
    with torch.no_grad():
        assert torch.equal(model.train()(input), plain.train()(input))
        first = model.eval()(input)
        assert torch.equal(model(input), first)
        model[2].codebook.mul_(2)
        model[2].bias.mul_(2)
        assert relative_rms(model(input).cpu(), 2 * first.double().cpu()) < 1e-6


def test_what_does_not_fit_is_refused_in_a_sentence():
    model = model_of("cpu")
    with pytest.raises(ValueError, match='compute: "fp8" runs on CUDA devices, and a packed layer of the model is on cpu'):
        kmq.optimize_(model, compute="fp8")
    with pytest.raises(ValueError, match="compute: expected 'float', 'int8', 'fp8' or None, got 'fp4'"):
        kmq.optimize_(model, compute="fp4")
    assert not any(isinstance(module, Fp8CodebookLinear) for module in model.modules())


@pytest.mark.gpu
def test_on_a_device():
    model, input = model_of("cuda"), torch.randn(300, 200, device="cuda")
    with torch.no_grad():
        expected = model(input)
        assert relative_rms(kmq.optimize_(model, compute="fp8")(input).cpu(), expected.double().cpu()) < 0.08
        assert torch.equal(kmq.optimize_(model, compute=None)(input), expected)
