"""Second moments of gradients for embeddings: those of a linear model, each embedding's own, and nothing else changed."""

import copy

import pytest
import torch
from output_objective import ids_of, quantized, same_weights
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.quantization import distance, objective
from kmq_kernels.quantization.distance import gradient_moments

pytestmark = pytest.mark.filterwarnings("ignore:calibration. fewer tokens:UserWarning")


class _Sum(nn.Module):
    """Two embeddings, one of them added in place, and a layer."""

    def __init__(self, closed=False):
        super().__init__()
        torch.manual_seed(1)
        self.closed = closed
        self.word, self.place, self.out = nn.Embedding(50, 12), nn.Embedding(40, 12), nn.Linear(12, 20)
        self.out.weight.requires_grad_(False)

    def forward(self, input_ids):
        hidden = self.word(input_ids)
        hidden += self.place(torch.arange(input_ids.shape[1]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.closed):
            return self.out(hidden)


@pytest.mark.parametrize("at_once", [1024, 50])
def test_moments_of_gradients(monkeypatch, at_once):
    """Of a linear model: W' W, up to the norm of the outputs of a piece and what random signs leave."""
    monkeypatch.setattr("kmq_kernels.quantization.distance.TOKENS", at_once)
    model, batches = _Sum(), ids_of([40] * 200)
    found = gradient_moments(model, batches, [model.word, model.place])
    product = (model.out.weight.t() @ model.out.weight).detach()
    for layer in (model.word, model.place):
        moments = (found[id(layer)] / found[id(layer)].trace() * product.trace()).float()
        assert float((moments - product).norm() / product.norm()) < 0.05
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    again = gradient_moments(model, batches, [model.word, model.place])
    assert all(torch.equal(again[key], value) for key, value in found.items())


class _Asks(nn.Module):
    """Two embeddings of the same ids, of which different columns count; a weight that two embeddings share; what one asks for."""

    def __init__(self, asks=None):
        super().__init__()
        torch.manual_seed(1)
        self.asks = asks
        self.a, self.b, self.c = nn.Embedding(50, 16), nn.Embedding(50, 8), nn.Embedding(50, 8)
        self.c.weight = self.b.weight
        self.out = nn.Linear(8, 8)

    def forward(self, input_ids, scale=None):
        if self.asks is not None:
            self.asks(input_ids)
        hidden = (
            self.a(input_ids)[..., :8] + self.b(input_ids) * torch.arange(8).lt(4) + self.c(input_ids) * torch.arange(8).ge(4)
        )
        return self.out(hidden if scale is None else hidden * scale[..., None])


def test_each_embedding_has_its_own_moments():
    model, batches = _Asks(), ids_of([12] * 6)
    moments = gradient_moments(model, batches, [model.a, model.b, model.c])
    assert [len(moments[id(layer)]) for layer in (model.a, model.b, model.c)] == [16, 8, 8]
    seen = []
    search = objective._Search._clustered_embedding

    def spied(self, weight, gram, often):
        seen.append((weight.name, (gram.diagonal() > 1.01 * gram.diagonal().min()).tolist()))
        return search(self, weight, gram, often)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective._Search, "_clustered_embedding", spied)
        quantized(model, batches, bits=2, objective="output", skip=[])
    assert seen[0] == ("a", [True] * 8 + [False] * 8)
    assert (seen[1][0], len(seen[1][1])) == ("b", 8)
    assert sum(seen[1][1]) == 7  # all but the least, of both layers


def _refuses(input_ids):
    assert len(input_ids) == 8


@pytest.mark.parametrize("kind", ["whole batches", "inference tensors", "inference mode", "memory", "hook"])
def test_gradients_change_nothing_else(monkeypatch, kind):
    monkeypatch.setattr("kmq_kernels.quantization.distance.TOKENS", 50)
    model, batches = _Asks(_refuses if kind == "whole batches" else None), ids_of([12] * 6)
    wanted = None if kind != "inference mode" else quantized(model, batches, bits=2, objective="output")
    if kind == "inference tensors":
        with torch.inference_mode():
            model.more = nn.Linear(2, 2)
    if kind == "hook":
        model.a.register_forward_hook(lambda module, args, output: (output, output)[0].repeat(1, 1, 2)[..., :16])
    trains = [parameter.requires_grad for parameter in model.parameters()]
    if kind == "memory":

        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("no memory left")

        monkeypatch.setattr(torch.autograd, "grad", full)
        with pytest.raises(torch.OutOfMemoryError):
            gradient_moments(model, batches, [model.a])
    again = copy.deepcopy(model)
    with torch.inference_mode(kind == "inference mode"):
        found = gradient_moments(model, batches, [model.a]) if kind != "memory" else None
        if kind == "inference mode":
            kmq.quantize_(again, kmq.KMQConfig(bits=2, objective="output"), calibration=batches)
            assert same_weights(wanted, again)
    assert bool(found) == (kind not in ("whole batches", "memory"))
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_pieces_have_all_texts_once():
    """Whatever stands beside the ids, at most so many ids in a piece."""
    ids, scale = torch.arange(64 * 128).view(64, 128), torch.ones(1, 128)
    for batch, least in (
        ({"input_ids": ids, "scale": scale}, 8),
        ({"input_ids": ids.view(16, 4, 128)}, 8),
        ({"x": ids * 1.0}, 1),
    ):
        pieces = list(distance._pieces([batch]))
        name = next(iter(batch))
        assert torch.equal(torch.cat([piece[name] for piece, _ in pieces]), batch[name])
        assert len(pieces) >= least
        assert all(piece[name].numel() <= distance.TOKENS for piece, _ in pieces) or name == "x"
        assert sum(share for _, share in pieces) == pytest.approx(1)
        assert all(piece.get("scale", scale).shape == scale.shape for piece, _ in pieces)


def test_a_model_without_gradients_has_no_moments():
    model = _Sum(closed=True)
    assert gradient_moments(model, ids_of([12] * 3), [model.word]) == {}
    assert model.word.weight.requires_grad
    quantized(model, ids_of([12] * 6), bits=2, objective="output")
