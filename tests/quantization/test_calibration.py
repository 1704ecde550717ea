"""Batches that are fitted to and judged by, and passes that keep what the layers before give: they are those of the model."""

import pytest
import torch
from conftest import FAMILIES
from output_objective import batches_of, encoder, quantized
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.quantization import plan
from kmq_kernels.quantization.calibration import Passes, read_batches

pytestmark = pytest.mark.filterwarnings("ignore:calibration. fewer tokens:UserWarning")


class _Stack(nn.Module):
    """Linear layers one after the other, that may use more of one another than the last output, or write into it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(4)])

    def forward(self, x):
        every = [x]
        for layer in self.layers:
            every.append(layer(every[-1]).tanh() if self.kind != "writes" else layer(every[-1]).tanh_())
        return sum(every) if self.kind == "sums" else every[-1]


@pytest.mark.parametrize("kind", ["plain", "sums", "writes"])
def test_what_is_kept_changes_no_pass(kind):
    torch.manual_seed(0)
    model = _Stack(kind)
    batches = [{"x": torch.randn(6, 12)} for _ in range(3)]
    weights = plan(model, kmq.KMQConfig(skip=[])).quantized
    halves = {weight.name: (weight.tensor / 2, None) for weight in weights}
    keeps, plain = (Passes(model, batches[:2], batches[2:], lambda weight, rows: halves[weight.name]) for _ in range(2))
    groups = keeps.groups(weights)
    assert [len(plain.groups(weights)), len(groups)] == [4, 4]
    for group in groups:
        keeps.advance(group)
        for number, replaced in ((0, False), (1, True), (0, True)):
            (found,), (wanted,) = (one.inputs(number, replaced, group)[0] for one in (keeps, plain))
            assert torch.equal(found, wanted)
        assert torch.equal(keeps.output(2, True), plain.output(2, True))
    assert keeps._passed == {"plain": 3, "sums": 1, "writes": 0}[kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_a_family(family):
    model = encoder(family)
    weights = plan(model, kmq.KMQConfig()).quantized
    passes = Passes(model, batches_of(1), [], lambda weight, rows: None)
    groups = passes.groups(weights)
    assert sum(len(group.weights) for group in groups) + len(passes.uncalled) == len(weights)
    assert [weight.name for weight in passes.uncalled] == (["encoder.rel_embeddings"] if family == "deberta-v2" else [])
    names = [{weight.name.rpartition(".")[2] for weight in group.weights} for group in groups]
    together = {"distilbert": {"q_lin", "k_lin", "v_lin"}, "mpnet": {"q", "k", "v"}, "deberta-v2": {"query_proj", "key_proj"}}
    assert together.get(family, {"query", "key", "value"}) in names
    added = [group.weights[0].name for group in groups if group.norm is not None and len(group.weights) == 1]
    assert len([name for name in added if "embeddings" not in name]) == (0 if family == "albert" else 4)
    assert all("word_embeddings" in name for name in added[:1])


def test_batches_are_held_out_and_cut():
    fitted, judged = read_batches(batches_of(11))
    assert (len(fitted), len(judged)) == (9, 2)
    for count in (39, 40, 41, 50, 192, 200):
        numbered = [{"input_ids": torch.full((8, 4), i)} for i in range(count)]
        fitted, judged = read_batches(numbered)
        places = [int(batch["input_ids"][0, 0]) for batch in judged]
        assert (len(fitted) + len(judged), len(judged) <= 8) == (count, True)
        assert len(judged) >= 6
        assert {one - other for one, other in zip(places[1:], places, strict=False)} == {places[0] + 1}
    fitted, judged = read_batches(batches_of(1))
    assert len(judged) == 1
    assert sum(len(batch["input_ids"]) for batch in fitted + judged) == 8
    fitted, judged = read_batches(batches_of(1, rows=1))
    assert fitted[0] is judged[0]


def test_what_layers_give_is_computed_no_further_than_there_is_room_for_it(monkeypatch):
    """The model's own size; a batch here gives 8 x 12 x 32 values of 4 bytes."""
    calls, block = [], Passes._block
    monkeypatch.setattr(Passes, "_block", lambda self, *one: calls.append(one) or block(self, *one))
    dense = encoder()
    room = sum(p.numel() * 4 for p in dense.parameters()) // (8 * 12 * 32 * 4)
    quantized(dense, batches_of(2 * room), bits=2, objective="output")
    assert len(calls) == room + 1
