"""Objective "output": never further from the unquantized model than plain clusters, on the texts held out; bad input."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import FAMILIES, family_config
from output_objective import batches_of, encoder, ids_of, quantized, same_weights
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import objective

pytestmark = pytest.mark.filterwarnings("ignore:calibration. fewer tokens:UserWarning")


@torch.no_grad()
def _distance(model, dense, batches):
    """Relative squared error of the last hidden states of the tokens that are no padding."""
    error = total = 0.0
    for batch in batches:
        found, wanted = (one(**batch).last_hidden_state[batch["attention_mask"] > 0].double() for one in (model, dense))
        error, total = error + float((found - wanted).square().sum()), total + float(wanted.square().sum())
    return error / total


@pytest.mark.parametrize("family", FAMILIES)
def test_nearer_than_plain_clusters(family):
    dense, batches = encoder(family), batches_of(6)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    plain = quantized(dense, bits=2)
    found = quantized(dense, batches, bits=2, objective="output")
    assert _distance(found, dense, batches[4::5]) < _distance(plain, dense, batches[4::5])
    assert _distance(found, dense, batches_of(3, seed=9)) < _distance(plain, dense, batches_of(3, seed=9))
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "row"},
        {"granularity": "group", "group_rows": 5},
        {"outlier_fraction": 0.02},
        {"row_scale": True},
        {"row_scale": True, "granularity": "group", "outlier_fraction": 0.01},
        {"module_bits": {"word_embeddings": 4, "query": 1}},
        {"allocation": "distortion", "bits_per_weight": 5.0},
        {"weighting": "fisher"},
    ],
    ids=str,
)
def test_with_every_other_option(options, tmp_path):
    dense, batches = encoder(num_hidden_layers=1), batches_of(5)
    options = {"bits": 2, **options}
    config = kmq.KMQConfig(**options, objective="output")
    extra = {}
    if config.needs_fisher:
        layers = [(name, m) for name, m in dense.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
        extra["sample_weight"] = {name: torch.rand_like(m.weight) for name, m in layers}
    plain, found = copy.deepcopy(dense), copy.deepcopy(dense)
    kmq.quantize_(plain, kmq.KMQConfig(**options), **extra)
    resolved = kmq.quantize_(found, config, calibration=batches, **extra)
    assert resolved.objective == "output"
    same = {name: m.bits for name, m in plain.named_modules() if isinstance(m, CodebookModule)}
    assert same == {name: m.bits for name, m in found.named_modules() if isinstance(m, CodebookModule)}
    assert _distance(found, dense, batches[4::5]) < _distance(plain, dense, batches[4::5])
    found.save_pretrained(tmp_path)
    again = kmq.load(tmp_path)
    assert torch.equal(again(**batches[0]).last_hidden_state, found(**batches[0]).last_hidden_state)
    assert sum(p.numel() for p in found.state_dict().values()) == sum(p.numel() for p in plain.state_dict().values())


def test_a_classifier_keeps_its_logits_and_the_same_call_gives_the_same():
    torch.manual_seed(1)
    dense = transformers.AutoModelForSequenceClassification.from_config(family_config("bert")).train()
    batches = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in batches_of(6)]
    first, second = (quantized(dense, batches, bits=3, objective="output") for _ in range(2))
    assert all(
        torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.training
    assert first.bert.encoder.layer[0].training
    plain = quantized(dense, bits=3)

    def logits(model):
        return model.eval()(**batches[4]).logits

    wanted = logits(copy.deepcopy(dense))
    assert (logits(first) - wanted).square().sum() < (logits(plain) - wanted).square().sum()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in first.modules())


def _precisions():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.mark.parametrize("kind", ["high", "medium", "by backend", "by all"])
def test_products_are_exact_whatever_else_is_allowed(kind):
    """bf16 products of a model with large means left second moments that are not positive definite."""
    dense, batches = encoder(), batches_of(6)
    before, wanted = _precisions(), quantized(dense, batches, bits=2, objective="output").state_dict()
    try:
        if kind == "by backend":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        elif kind == "by all":
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(kind)
        allowed = _precisions()
        found = quantized(dense, batches, bits=2, objective="output").state_dict()
        assert _precisions() == allowed
        if kind in ("high", "medium"):
            assert torch.get_float32_matmul_precision() == kind
        if kind == "by all":
            torch.backends.fp32_precision = "ieee"
            assert _precisions() == ["ieee", "ieee"]  # as inherited as before
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip((torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), before, strict=True):
            backend.fp32_precision = precision
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_layers_of_other_kinds():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(120, 16)
            self.mix = nn.Conv1d(16, 24, 1)
            self.dense = transformers.pytorch_utils.Conv1D(16, 24)
            self.tied = nn.Linear(16, 120, bias=False)
            self.tied.weight = self.emb.weight
            self.unused = nn.Linear(16, 16)

        def forward(self, input_ids):
            hidden = self.mix(self.emb(input_ids).transpose(1, 2)).transpose(1, 2)
            return self.tied(self.dense(hidden.relu().contiguous()))

    torch.manual_seed(2)
    dense = Net().eval()
    batches = [{"input_ids": batch["input_ids"]} for batch in batches_of(10)]
    found, plain = quantized(dense, batches, bits=2, objective="output"), quantized(dense, bits=2)
    assert found.tied.packed is found.emb.packed

    @torch.no_grad()
    def error(model):
        return sum(float((model(**batch) - dense(**batch)).square().sum()) for batch in batches[4::5])

    assert error(found) < error(plain)


def test_what_makes_it_worse_is_not_kept(monkeypatch):
    # A search that ruins every layer, then one that ruins only the sum of all.
    dense, batches = encoder(), batches_of(5)
    plain = quantized(dense, bits=2)

    def ruined(self, weight, moments):
        encoded = self.plain[weight.name]
        return encoded._replace(codebook=30 * encoded.codebook.flip(1))

    monkeypatch.setattr(objective._Search, "_fitted", ruined)
    monkeypatch.setattr(
        objective._Search, "_embeddings", lambda self, group: {w.name: ruined(self, w, None) for w in group.weights}
    )
    found = quantized(dense, batches, bits=2, objective="output")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), plain.state_dict().values(), strict=True))

    def accepted(self, group, few):
        return {weight.name: ruined(self, weight, None) for weight in group.weights}

    monkeypatch.setattr(objective._Search, "_group", accepted)
    with pytest.warns(UserWarning, match="plain clusters are nearer"):
        found = quantized(dense, batches, bits=2, objective="output")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), plain.state_dict().values(), strict=True))


def test_bad_input(tmp_path):
    dense, batches = encoder(), batches_of(5)
    state = {name: value.clone() for name, value in dense.state_dict().items()}

    def refused(match, given, **options):
        with pytest.raises(ValueError, match=match):
            kmq.quantize_(dense, kmq.KMQConfig(**{"objective": "output", **options}), calibration=given)
        assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
        assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in dense.modules())

    refused("calibration: objective 'output' needs batches of unlabelled texts, got none", None)
    refused("calibration: expected at least one batch of texts, got none", [])
    refused("calibration: expected at least one batch", [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}])
    refused("calibration: expected dictionaries of the model's arguments, .* got str", ["a text"])
    refused("calibration: BertModel does not take these batches", [{"texts": torch.zeros(1, 4)}])
    long, unknown = ({"input_ids": torch.full((2, length), word)} for length, word in ((600, 1), (4, 10**6)))
    for given in ([long, *batches], [*batches, long], [*batches[:2], unknown, *batches], [{"input_ids": torch.rand(2, 4)}]):
        refused("calibration: BertModel does not take these batches", given)
    refused("calibration: only objective 'output' takes batches", batches, objective="weights")
    with pytest.raises(ValueError, match="objective: expected one of 'weights', 'output', got 'outputs'"):
        kmq.KMQConfig(objective="outputs")
    with pytest.raises(ValueError, match="objective: 'output' moves centroids"):
        kmq.KMQConfig(objective="output", scheme="linear")
    with pytest.raises(ValueError, match="objective: preset 'paper' sets 'weights'"):
        kmq.KMQConfig(objective="output", preset="paper")
    with torch.no_grad():
        dense.encoder.layer[0].output.LayerNorm.bias[3] = float("nan")
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(ValueError, match=r"calibration: NaN or Inf in the inputs of encoder\.layer\.1\.attention\.self\.query"):
        kmq.quantize_(dense, kmq.KMQConfig(objective="output"), calibration=batches)
    encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="objective: 'output' needs texts, which from_pretrained has none of"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=kmq.KMQConfig(objective="output"))


def test_fewer_tokens_than_columns_is_said():
    with pytest.warns(UserWarning, match=r"calibration: fewer tokens than columns for encoder\.layer\.0\.\S+ and \d+ more"):
        quantized(encoder(), batches_of(5, rows=1, length=6), bits=2, objective="output")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized(encoder(), [*batches_of(6)], bits=2, objective="output", skip=["pooler"])


def test_fisher_weights_that_say_nothing_are_said():
    dense = encoder()
    weights = {name: torch.rand_like(layer.weight) for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)}
    for granularity, said in (("row", True), ("tensor", False)):
        config = kmq.KMQConfig(bits=2, weighting="fisher", objective="output", granularity=granularity, skip=["embeddings"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kmq.quantize_(copy.deepcopy(dense), config, sample_weight=weights, calibration=batches_of(6))
        assert any("takes Fisher weights for embeddings alone" in str(each.message) for each in caught) == said


def test_one_text_that_judges_itself_is_said():
    with pytest.warns(UserWarning, match="calibration: one text is all there is, so it judges what was fitted to it"):
        quantized(encoder(), batches_of(1, rows=1), bits=2, objective="output")


class _Net(nn.Module):
    """An embedding, a layer whose output gets the input added and is normalized, and two more layers."""

    def __init__(self, in_place=False, scaled=False):
        super().__init__()
        torch.manual_seed(1)
        self.in_place, self.scaled = in_place, scaled
        self.emb, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.a, self.b, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, input_ids):
        hidden = self.emb(input_ids)
        hidden = 8 * hidden + 3 if self.scaled else hidden
        sum_ = self.a(hidden)
        if self.in_place:
            sum_ += hidden
        else:
            sum_ = sum_ + hidden
        return self.out(torch.tanh(self.b(self.norm(sum_))))


@pytest.mark.parametrize(
    "options", [{}, {"row_scale": True, "outlier_fraction": 0.02, "granularity": "group", "group_rows": 3}], ids=str
)
def test_rows_that_share_no_codebook_are_clustered_one_after_the_other(monkeypatch, options):
    dense, batches = encoder(), batches_of(6)
    found = []
    for at_once in (1 << 22, 100):
        monkeypatch.setattr("kmq_kernels.quantization.objective.AT_ONCE", at_once)
        found.append(quantized(dense, batches, **{"bits": 2, "objective": "output", "granularity": "row", **options}))
    one, other = (_distance(model, dense, batches[4::5]) for model in found)
    assert abs(one - other) <= 0.05 * one
    names = [name for name in found[0].state_dict() if name.startswith("embeddings") and name.endswith("packed")]
    same = [(found[0].state_dict()[name] == found[1].state_dict()[name]).float().mean() for name in names]
    assert min(same) > 0.99


def test_an_embedding_whose_codebook_has_too_many_values_goes_by_the_norm(monkeypatch):
    dense, batches = encoder(), batches_of(6)
    plain = quantized(dense, bits=2)
    monkeypatch.setattr("kmq_kernels.quantization.objective.SHARED", 100)
    found = quantized(dense, batches, bits=2, objective="output")
    assert _distance(found, dense, batches[4::5]) < _distance(plain, dense, batches[4::5])


def test_what_is_added_in_place_is_seen():
    found = [quantized(_Net(in_place), ids_of([12] * 6), bits=2, objective="output") for in_place in (False, True)]
    assert same_weights(*found)


def test_hooks_of_embeddings_count():
    """One that scales the rows, and the same in the forward method."""
    hooked = _Net()
    hooked.emb.register_forward_hook(lambda module, args, output: 8 * output + 3)
    found = [quantized(model, ids_of([12] * 6), bits=3, objective="output") for model in (hooked, _Net(scaled=True))]
    assert same_weights(*found)


class _Routed(nn.Module):
    """Layers that see some tokens only, and one that runs for short texts only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.gate = nn.Embedding(50, 32), nn.Linear(32, 3)
        self.experts, self.short, self.norm = (
            nn.ModuleList(nn.Linear(32, 32) for _ in range(3)),
            nn.Linear(32, 32),
            nn.LayerNorm(32),
        )

    def forward(self, input_ids):
        hidden = self.emb(input_ids)
        chosen, found = self.gate(hidden).argmax(-1), torch.zeros_like(hidden)
        for i, expert in enumerate(self.experts):
            found[chosen == i] = expert(hidden[chosen == i])
        return self.norm(self.short(found) + found) if input_ids.shape[1] < 10 else found


def test_layers_that_see_some_tokens_or_texts_only():
    dense, texts = _Routed(), ids_of([8, 12] * 5)
    found, plain = (quantized(dense, texts if o == "output" else None, bits=2, objective=o) for o in ("output", "weights"))

    def distance(model):
        return sum(float((model(**batch) - dense(**batch)).square().sum()) for batch in texts[4::5])

    with torch.no_grad():
        assert distance(found) <= distance(plain)
