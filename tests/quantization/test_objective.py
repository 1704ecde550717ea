"""Objective "output": never further from the unquantized model than plain clusters, on the texts held out; bad input."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import FAMILIES, family_config
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import distance, objective, plan
from kmq_kernels.quantization.calibration import Passes, read_batches
from kmq_kernels.quantization.distance import gradient_moments

pytestmark = pytest.mark.filterwarnings("ignore:calibration. fewer tokens:UserWarning")


def _batches(count, seed=5, rows=8, length=12):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 120, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 8:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def _model(family="bert", **options):
    torch.manual_seed(1)
    return transformers.AutoModel.from_config(family_config(family, **options)).eval()


@torch.no_grad()
def _distance(model, dense, batches):
    """Relative squared error of the last hidden states of the tokens that are no padding."""
    error = total = 0.0
    for batch in batches:
        found, wanted = (one(**batch).last_hidden_state[batch["attention_mask"] > 0].double() for one in (model, dense))
        error, total = error + float((found - wanted).square().sum()), total + float(wanted.square().sum())
    return error / total


def _quantized(model, batches=None, **options):
    model = copy.deepcopy(model)
    kmq.quantize_(model, kmq.KMQConfig(**options), calibration=batches)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_nearer_than_plain_clusters(family):
    dense, batches = _model(family), _batches(6)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    plain = _quantized(dense, bits=2)
    found = _quantized(dense, batches, bits=2, objective="output")
    assert _distance(found, dense, batches[4::5]) < _distance(plain, dense, batches[4::5])
    assert _distance(found, dense, _batches(3, seed=9)) < _distance(plain, dense, _batches(3, seed=9))
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
    dense, batches = _model(num_hidden_layers=1), _batches(5)
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
    batches = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in _batches(6)]
    first, second = (_quantized(dense, batches, bits=3, objective="output") for _ in range(2))
    assert all(
        torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.training
    assert first.bert.encoder.layer[0].training
    plain = _quantized(dense, bits=3)

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
    dense, batches = _model(), _batches(6)
    before, wanted = _precisions(), _quantized(dense, batches, bits=2, objective="output").state_dict()
    try:
        if kind == "by backend":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        elif kind == "by all":
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(kind)
        allowed = _precisions()
        found = _quantized(dense, batches, bits=2, objective="output").state_dict()
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
    batches = [{"input_ids": batch["input_ids"]} for batch in _batches(10)]
    found, plain = _quantized(dense, batches, bits=2, objective="output"), _quantized(dense, bits=2)
    assert found.tied.packed is found.emb.packed

    @torch.no_grad()
    def error(model):
        return sum(float((model(**batch) - dense(**batch)).square().sum()) for batch in batches[4::5])

    assert error(found) < error(plain)


def test_what_makes_it_worse_is_not_kept(monkeypatch):
    # A search that ruins every layer, then one that ruins only the sum of all.
    dense, batches = _model(), _batches(5)
    plain = _quantized(dense, bits=2)

    def ruined(self, weight, moments):
        encoded = self.plain[weight.name]
        return encoded._replace(codebook=30 * encoded.codebook.flip(1))

    monkeypatch.setattr(objective._Search, "_fitted", ruined)
    monkeypatch.setattr(
        objective._Search, "_embeddings", lambda self, group: {w.name: ruined(self, w, None) for w in group.weights}
    )
    found = _quantized(dense, batches, bits=2, objective="output")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), plain.state_dict().values(), strict=True))

    def accepted(self, group, few):
        return {weight.name: ruined(self, weight, None) for weight in group.weights}

    monkeypatch.setattr(objective._Search, "_group", accepted)
    with pytest.warns(UserWarning, match="plain clusters are nearer"):
        found = _quantized(dense, batches, bits=2, objective="output")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), plain.state_dict().values(), strict=True))


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
    model = _model(family)
    weights = plan(model, kmq.KMQConfig()).quantized
    passes = Passes(model, _batches(1), [], lambda weight, rows: None)
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
    fitted, judged = read_batches(_batches(11))
    assert (len(fitted), len(judged)) == (9, 2)
    for count in (39, 40, 41, 50, 192, 200):
        numbered = [{"input_ids": torch.full((8, 4), i)} for i in range(count)]
        fitted, judged = read_batches(numbered)
        places = [int(batch["input_ids"][0, 0]) for batch in judged]
        assert (len(fitted) + len(judged), len(judged) <= 8) == (count, True)
        assert len(judged) >= 6
        assert {one - other for one, other in zip(places[1:], places, strict=False)} == {places[0] + 1}
    fitted, judged = read_batches(_batches(1))
    assert len(judged) == 1
    assert sum(len(batch["input_ids"]) for batch in fitted + judged) == 8
    fitted, judged = read_batches(_batches(1, rows=1))
    assert fitted[0] is judged[0]


def test_bad_input(tmp_path):
    dense, batches = _model(), _batches(5)
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
    _model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="objective: 'output' needs texts, which from_pretrained has none of"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=kmq.KMQConfig(objective="output"))


def test_fewer_tokens_than_columns_is_said():
    with pytest.warns(UserWarning, match=r"calibration: fewer tokens than columns for encoder\.layer\.0\.\S+ and \d+ more"):
        _quantized(_model(), _batches(5, rows=1, length=6), bits=2, objective="output")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _quantized(_model(), [*_batches(6)], bits=2, objective="output", skip=["pooler"])


def test_what_layers_give_is_computed_no_further_than_there_is_room_for_it(monkeypatch):
    """The model's own size; a batch here gives 8 x 12 x 32 values of 4 bytes."""
    calls, block = [], Passes._block
    monkeypatch.setattr(Passes, "_block", lambda self, *one: calls.append(one) or block(self, *one))
    dense = _model()
    room = sum(p.numel() * 4 for p in dense.parameters()) // (8 * 12 * 32 * 4)
    _quantized(dense, _batches(2 * room), bits=2, objective="output")
    assert len(calls) == room + 1


def test_fisher_weights_that_say_nothing_are_said():
    dense = _model()
    weights = {name: torch.rand_like(layer.weight) for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)}
    for granularity, said in (("row", True), ("tensor", False)):
        config = kmq.KMQConfig(bits=2, weighting="fisher", objective="output", granularity=granularity, skip=["embeddings"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kmq.quantize_(copy.deepcopy(dense), config, sample_weight=weights, calibration=_batches(6))
        assert any("takes Fisher weights for embeddings alone" in str(each.message) for each in caught) == said


def test_one_text_that_judges_itself_is_said():
    with pytest.warns(UserWarning, match="calibration: one text is all there is, so it judges what was fitted to it"):
        _quantized(_model(), _batches(1, rows=1), bits=2, objective="output")


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
    model, batches = _Sum(), _ids([40] * 200)
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
    model, batches = _Asks(), _ids([12] * 6)
    moments = gradient_moments(model, batches, [model.a, model.b, model.c])
    assert [len(moments[id(layer)]) for layer in (model.a, model.b, model.c)] == [16, 8, 8]
    seen = []
    search = objective._Search._clustered_embedding

    def spied(self, weight, gram, often):
        seen.append((weight.name, (gram.diagonal() > 1.01 * gram.diagonal().min()).tolist()))
        return search(self, weight, gram, often)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective._Search, "_clustered_embedding", spied)
        _quantized(model, batches, bits=2, objective="output", skip=[])
    assert seen[0] == ("a", [True] * 8 + [False] * 8)
    assert (seen[1][0], len(seen[1][1])) == ("b", 8)
    assert sum(seen[1][1]) == 7  # all but the least, of both layers


def _refuses(input_ids):
    assert len(input_ids) == 8


@pytest.mark.parametrize("kind", ["whole batches", "inference tensors", "inference mode", "memory", "hook"])
def test_gradients_change_nothing_else(monkeypatch, kind):
    monkeypatch.setattr("kmq_kernels.quantization.distance.TOKENS", 50)
    model, batches = _Asks(_refuses if kind == "whole batches" else None), _ids([12] * 6)
    wanted = None if kind != "inference mode" else _quantized(model, batches, bits=2, objective="output")
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
            assert _equal(wanted, again)
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
    assert gradient_moments(model, _ids([12] * 3), [model.word]) == {}
    assert model.word.weight.requires_grad
    _quantized(model, _ids([12] * 6), bits=2, objective="output")


@pytest.mark.parametrize(
    "options", [{}, {"row_scale": True, "outlier_fraction": 0.02, "granularity": "group", "group_rows": 3}], ids=str
)
def test_rows_that_share_no_codebook_are_clustered_one_after_the_other(monkeypatch, options):
    dense, batches = _model(), _batches(6)
    found = []
    for at_once in (1 << 22, 100):
        monkeypatch.setattr("kmq_kernels.quantization.objective.AT_ONCE", at_once)
        found.append(_quantized(dense, batches, **{"bits": 2, "objective": "output", "granularity": "row", **options}))
    one, other = (_distance(model, dense, batches[4::5]) for model in found)
    assert abs(one - other) <= 0.05 * one
    names = [name for name in found[0].state_dict() if name.startswith("embeddings") and name.endswith("packed")]
    same = [(found[0].state_dict()[name] == found[1].state_dict()[name]).float().mean() for name in names]
    assert min(same) > 0.99


def test_an_embedding_whose_codebook_has_too_many_values_goes_by_the_norm(monkeypatch):
    dense, batches = _model(), _batches(6)
    plain = _quantized(dense, bits=2)
    monkeypatch.setattr("kmq_kernels.quantization.objective.SHARED", 100)
    found = _quantized(dense, batches, bits=2, objective="output")
    assert _distance(found, dense, batches[4::5]) < _distance(plain, dense, batches[4::5])


def _ids(lengths, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (8, length), generator=generator)} for length in lengths]


def _equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_what_is_added_in_place_is_seen():
    found = [_quantized(_Net(in_place), _ids([12] * 6), bits=2, objective="output") for in_place in (False, True)]
    assert _equal(*found)


def test_hooks_of_embeddings_count():
    """One that scales the rows, and the same in the forward method."""
    hooked = _Net()
    hooked.emb.register_forward_hook(lambda module, args, output: 8 * output + 3)
    found = [_quantized(model, _ids([12] * 6), bits=3, objective="output") for model in (hooked, _Net(scaled=True))]
    assert _equal(*found)


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
    dense, texts = _Routed(), _ids([8, 12] * 5)
    found, plain = (_quantized(dense, texts if o == "output" else None, bits=2, objective=o) for o in ("output", "weights"))

    def distance(model):
        return sum(float((model(**batch) - dense(**batch)).square().sum()) for batch in texts[4::5])

    with torch.no_grad():
        assert distance(found) <= distance(plain)
