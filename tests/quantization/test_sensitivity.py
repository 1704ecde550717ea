"""Fisher diagonal and Hessian eigenvalues: against gradients one by one and a full Hessian; resuming; files of other models."""

import pytest
import torch
from conftest import family_model
from safetensors.torch import save_file
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.sensitivity import SensitivityError, fisher_diagonal, hessian_eigenvalues, importance


class Net(nn.Module):
    """Small enough for its whole Hessian."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def _batches(count=5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(2, n, generator=generator)  # noqa: E731
    return [{"x": draw(3), "y": draw(2)} for _ in range(count)]


def test_fisher_is_the_mean_of_squared_gradients():
    model, batches = Net(), _batches()
    found = fisher_diagonal(model, batches, loss=_loss)
    assert set(found) == {"first", "second"}
    for name in found:
        expected = torch.zeros_like(model.get_submodule(name).weight)
        for batch in batches:
            model.zero_grad()
            _loss(model, batch).backward()
            expected += model.get_submodule(name).weight.grad ** 2 / len(batches)
        torch.testing.assert_close(found[name], expected)
    again = fisher_diagonal(model, iter(batches), loss=_loss)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_eigenvalues_are_those_of_the_blocks_of_the_hessian():
    model, batches = Net(), _batches()
    found = hessian_eigenvalues(model, batches, loss=_loss, iterations=300, tol=1e-9)
    for name in found:
        values = []
        weight = model.get_submodule(name).weight
        for batch in batches:

            def at(value, name=name, batch=batch):
                return (torch.func.functional_call(model, {f"{name}.weight": value}, batch["x"]) - batch["y"]).square().mean()

            block = torch.autograd.functional.hessian(at, weight.detach()).reshape(weight.numel(), -1)
            spectrum = torch.linalg.eigvalsh(block.double())
            values.append(spectrum[spectrum.abs().argmax()])
        values = torch.stack(values)
        assert found[name] == pytest.approx(float(values.mean().abs() + values.std(correction=0)), rel=1e-3)


@pytest.mark.parametrize("kind", [fisher_diagonal, hessian_eigenvalues])
def test_an_interrupted_computation_goes_on(kind, tmp_path):
    model, batches, path = Net(), _batches(), tmp_path / "s.safetensors"
    whole = kind(model, batches, loss=_loss)
    options = {"save_every": 1} if kind is fisher_diagonal else {}

    def stops():
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kind(model, stops(), loss=_loss, path=path, **options)
    used = []

    def loss(model, batch):
        used.append(batch)
        return _loss(model, batch)

    resumed = kind(model, batches, loss=loss, path=path, **options)
    order = [next(i for i, batch in enumerate(batches) if torch.equal(batch["x"], each["x"])) for each in used]
    assert order == [0, 3, 4]  # the first one says whether it is the same loss
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(resumed[name]), torch.as_tensor(value))
    # A finished one is read.
    again = kind(model, iter(batches), num_batches=5, loss=loss, path=path, **options)
    assert len(used) == 4
    assert all(torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value)) for name, value in whole.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors"]


@pytest.mark.parametrize("kind", [fisher_diagonal, hessian_eigenvalues])
def test_bad_input_is_a_sentence(kind, tmp_path):
    model, batches, path = Net(), _batches(), tmp_path / "s.safetensors"
    for empty in ([], iter(())):
        with pytest.raises(SensitivityError, match="the data loader gave none"):
            kind(model, empty, loss=_loss, path=path)
    assert not path.exists()
    batches[3]["x"] = batches[3]["x"] * float("nan")
    with pytest.raises(SensitivityError, match=r"batch 3: NaN or Inf in the gradient of first\.weight"):
        kind(model, batches, loss=_loss)

    kind(model, _batches(), loss=_loss, path=path)
    other = Net()
    with torch.no_grad():
        other.first.weight[0, 0] += 1e-3
    with pytest.raises(SensitivityError, match="made for other weights"):
        kind(other, _batches(), loss=_loss, path=path)
    if kind is fisher_diagonal:
        other.first = nn.Linear(3, 5)
        with pytest.raises(SensitivityError, match=r"of another model: first has shape \(5, 3\), the file \(4, 3\)"):
            kind(other, _batches(), loss=_loss, path=path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SensitivityError, match="not a complete safetensors file"):
        kind(model, _batches(), loss=_loss, path=path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(SensitivityError, match="no sensitivity of kind"):
        kind(model, _batches(), loss=_loss, path=path)
    with pytest.raises(SensitivityError, match="no embedding or linear layer"):
        kind(nn.Sequential(nn.ReLU()), _batches(), loss=_loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformer_with_labels(attention, ids):
    model = family_model("bert", attn_implementation=attention).train()
    model.bert.pooler.dense.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.ones(3)
    batches = [{"input_ids": part, "labels": torch.arange(len(part)) % 3} for part in (ids, ids[:2])]
    fisher = fisher_diagonal(model, batches)
    eigenvalues = hessian_eigenvalues(model, batches, iterations=3)
    assert set(fisher) == set(eigenvalues)
    assert "classifier" not in fisher
    assert fisher["bert.pooler.dense"].abs().sum() > 0
    assert max(eigenvalues.values()) > 0
    assert all(value >= 0 for value in eigenvalues.values())
    # Unseen rows of the embedding have none; the model is as it was.
    unseen = torch.ones(120, dtype=torch.bool)
    unseen[ids.unique()] = False
    assert not fisher["bert.embeddings.word_embeddings"][unseen].any()
    assert importance(fisher)["bert.embeddings.word_embeddings"][unseen].min() > 0
    assert model.training
    assert not model.bert.pooler.dense.weight.requires_grad
    assert torch.equal(model.classifier.bias.grad, torch.ones(3))
    with pytest.raises(SensitivityError, match="the model gives no loss"):
        fisher_diagonal(model, [{"input_ids": ids}])

    kmq.quantize_(model, kmq.KMQConfig(allocation="fisher", bits=3), sample_weight=importance(fisher))
    assert len({m.bits for m in model.modules() if hasattr(m, "packed")}) > 1
