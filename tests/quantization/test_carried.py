"""What a layer has beside its weight: carried over and back, or the layer stays as it is and a warning names it."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import family_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import plan


def _quantized(model, said=(), **options):
    """quantize_ with 8 bits; the warnings are exactly those that match `said`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = kmq.quantize_(model, kmq.KMQConfig(**{"bits": 8, **options}))
    sentences = [str(warning.message) for warning in caught]
    assert len(sentences) == len(said), sentences
    for sentence, words in zip(sentences, said, strict=True):
        assert words in sentence
    return config


# Weights that are computed


def _old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def _pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.3)


COMPUTED = [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, _old_weight_norm, _pruned]


@pytest.mark.parametrize("norm", [*COMPUTED, nn.utils.spectral_norm])
def test_computed_weights_are_quantized_as_they_are_and_shared_by_none(norm):
    torch.manual_seed(0)
    model = nn.Sequential(*[norm(nn.Linear(16, 16)) for _ in range(4)]).eval()
    x = torch.randn(3, 16)
    model(x)
    dense, out = [layer.weight.detach().clone() for layer in model], model(x)
    state = {name: value.clone() for name, value in model.train().state_dict().items()}
    plan(model, kmq.KMQConfig())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    _quantized(model, ["0, 1, 2 and 1 more: the weight is quantized as"])
    assert len({id(layer.packed) for layer in model}) == 4
    for layer, weight in zip(model, dense, strict=True):
        assert (layer.weight - weight).norm() < 0.02 * weight.norm()
    torch.testing.assert_close(model(x), out, atol=0.05, rtol=0.05)
    values = [layer.weight.clone() for layer in model]
    kmq.dequantize_(model)
    for layer, value in zip(model, values, strict=True):
        assert type(layer) is nn.Linear
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert torch.equal(layer.weight, value)
    model(x).sum().backward()
    assert all(layer.weight.grad is not None for layer in model)


def test_a_computed_bias_is_resolved():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(16, 16))
    bias = model[0].bias.detach().clone()
    nn.utils.parametrize.register_parametrization(model[0], "bias", Twice())
    _quantized(model, ["Twice"])
    assert torch.equal(model[0].bias, 2 * bias)
    assert isinstance(model[0].bias, nn.Parameter)


def test_what_a_weight_is_computed_from_may_not_be_shared():
    one, other = nn.Linear(16, 16), nn.Linear(16, 16)
    other.weight = one.weight
    model = nn.Sequential(parametrizations.weight_norm(one), parametrizations.weight_norm(other), nn.Linear(16, 16))
    model[1].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
    config = _quantized(model, ["layers that stay as they are: 0 (shared with 1.", "% of the matrix weights"])
    assert config.skip == ["0", "1"]


# Options, hooks, flags, attributes


def test_hooks_go_on_and_can_be_removed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    calls = []
    handles = [
        model[0].register_forward_hook(lambda module, args, out: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda module, grads, out: calls.append("backward")),
        model[0].register_full_backward_pre_hook(lambda module, out: calls.append("before backward")),
        model[0].register_forward_hook(lambda module, args, out: calls.append("always"), always_call=True),
    ]
    _quantized(model)
    for model_now in (model, kmq.dequantize_(copy.deepcopy(model))):
        calls.clear()
        model_now(torch.randn(2, 16, requires_grad=True)).sum().backward()
        assert calls == ["before", "forward", "always", "before backward", "backward"]
    kmq.dequantize_(model)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert calls == []


def test_frozen_weights_stay_frozen_and_come_back_frozen():
    model = family_model("bert", "MaskedLM")
    model.get_input_embeddings().weight.requires_grad_(False)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    model.bert.encoder.layer[1].output.dense.bias.requires_grad_(False)
    _quantized(model, outlier_fraction=0.02, row_scale=True)
    frozen, trained = model.bert.encoder.layer[0].output.dense, model.bert.encoder.layer[1].output.dense
    for module in (frozen, model.get_input_embeddings(), model.get_output_embeddings()):
        assert [module.codebook.requires_grad, module.row_scale.requires_grad, module.outlier_values.requires_grad] == [False] * 3
    assert frozen.bias.requires_grad
    assert trained.codebook.requires_grad
    assert not trained.bias.requires_grad
    kmq.dequantize_(model)
    assert not model.get_input_embeddings().weight.requires_grad
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad
    assert model.bert.encoder.layer[1].output.dense.weight.requires_grad


def test_attributes_class_and_mode_come_along_and_back():
    class Named(nn.Linear):
        """A linear layer with a name."""

        def __init__(self, size, name):
            super().__init__(size, size)
            self.title = name

    model = nn.Sequential(Named(16, "first"), nn.Embedding(5, 16, padding_idx=2), nn.Linear(16, 16)).train()
    model[2].eval()
    model[2].scale = torch.tensor(3.0)
    _quantized(model)
    assert model[0].title == "first"
    assert model[2].scale == 3.0
    assert [module.training for module in model] == [True, True, False]
    model[0].title = "second"
    model[2].later = 1
    model = copy.deepcopy(model)
    kmq.dequantize_(model)
    assert type(model[0]) is Named
    assert (model[0].title, model[2].scale, model[2].later) == ("second", 3.0, 1)
    assert model[1].padding_idx == 2
    assert [module.training for module in model] == [True, True, False]
    assert not [name for name in vars(model[1]) if name in ("bits", "rows", "packed", "replaces")]


def test_gradients_scaled_by_frequency():
    plain = nn.Embedding(6, 16, scale_grad_by_freq=True, padding_idx=0)
    model = nn.Sequential(plain)
    _quantized(model, bits=3)
    ids = torch.tensor([[1, 1, 1, 2], [0, 0, 4, 2]])
    g = torch.randn(2, 4, 16)
    model(ids).backward(g)
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    plain(ids).backward(g)
    index = kmq.unpack(model[0].packed, 3, 16).long().flatten()
    expected = torch.zeros(8).index_add_(0, index, plain.weight.grad.flatten())
    torch.testing.assert_close(model[0].codebook.grad[0], expected)
    kmq.dequantize_(model)
    assert model[0].scale_grad_by_freq


def _with(make, change):
    layer = make()
    change(layer)
    return layer


def _linear():
    return nn.Linear(16, 16)


class OwnForward(nn.Linear):
    """A layer that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class OwnMethod(nn.Linear):
    """A layer that others ask something."""

    def norm(self):
        return self.weight.norm()


LEFT = {
    "max_norm": lambda: nn.Embedding(4, 16, max_norm=1.0),
    "sparse gradients": lambda: nn.Embedding(4, 16, sparse=True),
    "hook on the gradient": lambda: _with(_linear, lambda m: m.weight.register_hook(lambda grad: grad * 0)),
    "hook on the gradient of": lambda: _with(_linear, lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None)),
    "hook on its state dict": lambda: _with(_linear, lambda m: m.register_state_dict_post_hook(lambda *a: None)),
    "a forward put on it": lambda: _with(_linear, lambda m: setattr(m, "forward", lambda x: x)),
    "its own (scale)": lambda: _with(_linear, lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))),
    "its own (mask)": lambda: _with(_linear, lambda m: m.register_buffer("mask", torch.ones(1))),
    "its own (inner)": lambda: _with(_linear, lambda m: m.add_module("inner", nn.ReLU())),
    "an attribute bits that": lambda: _with(_linear, lambda m: setattr(m, "bits", 3)),
    "an attribute _compiled_call_impl": lambda: _with(_linear, lambda m: m.compile(backend="eager")),
    "grouped, strided or wider": lambda: nn.Conv1d(16, 16, 1, groups=4),
    "grouped, strided or wider than": lambda: nn.Conv1d(16, 16, 1, stride=2),
    "wider than 1": lambda: nn.Conv1d(16, 16, 3),
    "with padding": lambda: nn.Conv1d(16, 16, 1, padding=1),
    "not initialized yet": lambda: nn.LazyLinear(16),
    "complex64": lambda: nn.Linear(16, 16, dtype=torch.complex64),
}


@pytest.mark.parametrize("words", LEFT)
def test_a_layer_that_cannot_be_carried_over_is_left_and_named(words):
    model = nn.ModuleDict({"odd": LEFT[words](), "plain": nn.Linear(96, 96)})
    odd, state = model["odd"], list(model["odd"]._parameters.values())
    config = _quantized(model, ["layers that stay as they are: odd (", *["% of"] * (words == "wider than 1")])
    assert config.skip == ["odd"]
    assert model["odd"] is odd
    assert all(one is other for one, other in zip(state, odd._parameters.values(), strict=True))
    assert isinstance(model["plain"], CodebookModule)
    with pytest.raises(ValueError, match="no embedding or linear layer to quantize; layers that stay as they are") as caught:
        kmq.quantize_(nn.Sequential(LEFT[words]()), kmq.KMQConfig())
    assert words in str(caught.value)


@pytest.mark.parametrize("layer", [OwnForward, OwnMethod])
def test_a_class_of_its_own_is_left_and_said_where_it_is_much(layer):
    model = nn.Sequential(nn.Linear(64, 64), layer(4, 4))
    assert _quantized(model).skip == ["1"]
    model = nn.Sequential(nn.Linear(64, 64), layer(64, 64))
    assert _quantized(model, [f"50% of the matrix weights stay in floating point: 1 ({layer.__name__})"]).skip == ["1"]


def test_a_weight_that_something_else_has_too_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 16), nn.Linear(16, 16)
            self.table = self.words.weight

    model = Net()
    assert _quantized(model, ["words (shared with table,", "% of the"]).skip == ["words"]
    assert model.table is model.words.weight


def test_after_ddp_it_is_said_that_gradients_are_not_reduced():
    inner = nn.Sequential(nn.Linear(16, 16))
    wrapper = type("DistributedDataParallel", (nn.Module,), {})()
    wrapper.module = inner
    _quantized(wrapper, ["DistributedDataParallel: it was built on the weights that are replaced"])


# Adapters


def _library_class(name, module, **children):
    """A module of a class that stands in another package."""
    made = type(name, (nn.Module,), {"__module__": module})()
    for child, inner in children.items():
        made.add_module(child, inner)
    return made


def test_adapters_are_left_and_their_base_is_not():
    def linear():
        return nn.Linear(16, 16)

    lora = _library_class(
        "Linear", "peft.tuners.lora.layer",
        base_layer=linear(), lora_A=nn.ModuleDict({"default": linear()}), anything=nn.ModuleDict({"default": linear()}),
    )  # fmt: skip
    saved = _library_class(
        "ModulesToSaveWrapper", "peft.utils.other", original_module=linear(), modules_to_save=nn.ModuleDict({"default": linear()})
    )
    model = nn.ModuleDict({"query": lora, "dense": saved, "key": nn.ModuleDict({"lora_B": linear(), "base": linear()})})
    wrapped = _library_class(
        "PeftModel", "peft.peft_model", base_model=_library_class("LoraModel", "peft.tuners.lora.model", model=model),
        prompt_encoder=nn.ModuleDict({"default": nn.Embedding(4, 16)}),
    )  # fmt: skip
    config = _quantized(wrapped, ["(of an adapter)", "% of the matrix weights"])
    quantized = {name.removeprefix("base_model.model.") for name, m in wrapped.named_modules() if isinstance(m, CodebookModule)}
    assert quantized == {"query.base_layer", "dense.original_module", "key.base"}
    assert "prompt_encoder.default" in config.skip
    assert len(config.skip) == 5


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "PromptTuningConfig", "AdaLoraConfig", "VeraConfig", "LoHaConfig"])
def test_adapter_files_of_peft_load_again(kind, tmp_path, ids):
    peft = pytest.importorskip("peft")
    options = {
        "LoraConfig": {"r": 4, "init_lora_weights": False, "target_modules": ["value", "word_embeddings"]},
        "IA3Config": {"target_modules": ["value"], "feedforward_modules": []},
        "PromptTuningConfig": {"num_virtual_tokens": 3},
        "AdaLoraConfig": {"r": 4, "target_modules": ["value"], "total_step": 10},
        "VeraConfig": {"r": 4, "target_modules": ["value"]},
        "LoHaConfig": {"r": 4, "target_modules": ["value"], "init_weights": False},
    }[kind]
    model = peft.get_peft_model(family_model("bert"), getattr(peft, kind)(task_type="SEQ_CLS", **options)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kmq.quantize_(model, kmq.KMQConfig(bits=8))
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(family_model("bert"), tmp_path).eval()
    adapter = {name: value for name, value in model.named_parameters() if "codebook" not in name and value.dim() > 1}
    assert not [name for name in peft.get_peft_model_state_dict(model) if "codebook" in name or "packed" in name]
    for name, value in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(value, peft.get_peft_model_state_dict(model)[name])
    assert adapter
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=0.02, rtol=0.1)
    if kind == "LoraConfig":
        with pytest.raises(ValueError, match="merge: a packed layer has no weight"):
            model.merge_and_unload()


# Patterns, and what stays


def test_patterns_that_match_nothing_are_named():
    model = family_model("bert")
    said = ["skip, module_bits: 'poler', 'layer.9' matches no embedding or linear layer"]
    _quantized(model, said, skip=["poler", "classifier"], module_bits={"layer.9": 3})
    for wrong in ("pooler", 5, ["a", 3]):
        with pytest.raises(ValueError, match="skip: expected"):
            kmq.KMQConfig(skip=wrong)
    for wrong in ("pooler", ["pooler"], {3: 4}):
        with pytest.raises(ValueError, match="module_bits: expected"):
            kmq.KMQConfig(module_bits=wrong)


def test_names_of_the_task_model_count_in_its_base_model():
    model = family_model("bert")
    config = kmq.KMQConfig(skip=["bert.pooler.dense"], module_bits={r"^bert\.embeddings\.word_embeddings$": 3})
    chosen = plan(model.bert, config)
    assert chosen.left == ["pooler.dense"]
    assert {weight.name: weight.bits for weight in chosen.quantized}["embeddings.word_embeddings"] == 3
    assert not chosen.unmatched


def test_what_stays_is_said_with_its_share():
    model = nn.Sequential(nn.Linear(10, 10), nn.Conv2d(10, 10, 2), nn.LSTM(5, 5), nn.Linear(10, 10))
    # 100 + 400 + 4 * 5 * 5 * 2 + 100 weights in matrices; the layer in `skip` was asked for.
    _quantized(model, ["75% of the matrix weights stay in floating point: 1 (Conv2d), 2 (LSTM)"], skip=["3"])


# Conv1D of transformers and convolutions of width 1


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"outlier_fraction": 0.02, "row_scale": True}])
def test_conv1d_of_transformers(options, tmp_path, ids):
    import transformers
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    sizes = {"vocab_size": 120, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval()
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, Conv1D)}
    out = model(ids)[0]
    _quantized(model, **options)
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert layer.weight.shape == weight.shape
        assert (layer.rows, layer.cols) == tuple(weight.t().shape)
        assert (layer.weight - weight).abs().max() < 0.02 * weight.abs().max()
        if options.get("granularity") == "row":  # an output has a codebook of its own
            assert len(layer.codebook) == weight.shape[1]
    torch.testing.assert_close(model(ids)[0], out, atol=0.05, rtol=0.05)
    model.save_pretrained(tmp_path)
    again = kmq.load(tmp_path)
    assert torch.equal(again(ids)[0], model(ids)[0])
    again.dequantize()
    for name in dense:
        assert type(again.get_submodule(name)) is Conv1D
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
    torch.testing.assert_close(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("shape", [(16, 9), (3, 16, 9)])
def test_convolutions_of_width_1(shape):
    model = nn.Sequential(nn.Conv1d(16, 24, 1), nn.Conv1d(24, 8, 1, bias=False, padding="same"))
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    _quantized(model)
    dense = kmq.dequantize_(copy.deepcopy(model))
    assert [type(layer) for layer in dense] == [nn.Conv1d] * 2
    assert (dense[1].padding, dense[1].kernel_size, dense[1].bias) == ("same", (1,), None)
    out, expected = model(x), dense(y)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    index = kmq.unpack(model[0].packed, 8, 16).long().flatten()
    book = torch.zeros(256).index_add_(0, index, dense[0].weight.grad.flatten())
    torch.testing.assert_close(model[0].codebook.grad[0], book)
    again = nn.Sequential(nn.Conv1d(16, 24, 1), nn.Conv1d(24, 8, 1, bias=False))
    _quantized(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), out)
    with pytest.raises(ValueError, match="input: expected shape"):
        model(torch.randn(1, 3, 16, 9))


def test_squeezebert_says_what_it_leaves(tmp_path, ids):
    import transformers

    sizes = {"vocab_size": 120, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.SqueezeBertForSequenceClassification(
        transformers.SqueezeBertConfig(num_hidden_layers=4, max_position_embeddings=32, **sizes)
    ).eval()
    _quantized(model, ["convolution that is grouped", "% of the matrix weights stay in floating point: transformer.encoder"])
    assert isinstance(model.transformer.encoder.layers[0].post_attention.conv1d, kmq.CodebookLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(kmq.load(tmp_path)(ids).logits, model(ids).logits)


# Arguments


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Embedding(8, 8), OwnForward(8, 8), nn.Conv1d(8, 8, 1)])
def test_a_layer_by_itself_is_refused(layer):
    with pytest.raises(ValueError, match=f"model: a {type(layer).__name__} by itself cannot be replaced in place"):
        kmq.quantize_(layer, kmq.KMQConfig())
    assert not layer._modules
    model = nn.Sequential(nn.Linear(8, 8))
    kmq.quantize_(model, kmq.KMQConfig())
    with pytest.raises(ValueError, match="model: a CodebookLinear by itself"):
        kmq.dequantize_(model[0])
    with pytest.raises(ValueError, match="quantized already"):
        kmq.quantize_(model[0], kmq.KMQConfig())


def test_a_dict_numpy_numbers_and_a_model_without_values():
    one, other, third = (nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    for model in (other, third):
        model.load_state_dict(one.state_dict())
    config = kmq.KMQConfig(bits=3, granularity="group", group_rows=4, seed=5)
    kmq.quantize_(one, config)
    kmq.quantize_(other, {"bits": 3, "granularity": "group", "group_rows": 4, "seed": 5})
    numbers = {
        "bits": np.int64(3),
        "group_rows": np.int32(4),
        "seed": np.uint8(5),
        "tol": np.float32(0),
        "row_scale": np.bool_(False),
    }
    given = kmq.KMQConfig(granularity="group", module_bits={"x": np.int8(2)}, **numbers)
    assert given == kmq.KMQConfig(bits=3, granularity="group", group_rows=4, seed=5, module_bits={"x": 2})
    assert {type(value) for value in given.to_dict().values()} <= {int, float, str, bool, dict, type(None)}
    with pytest.warns(UserWarning, match="'x' matches no"):
        kmq.quantize_(third, given)
    for model in (other, third):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in one.state_dict().items())
    with pytest.raises(ValueError, match="config: expected a KMQConfig or a dict of its fields, got int"):
        kmq.quantize_(nn.Sequential(nn.Linear(8, 8)), 4)
    with pytest.raises(ValueError, match="unknown keys colour"):
        kmq.quantize_(nn.Sequential(nn.Linear(8, 8)), {"colour": 4})
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"model: 0\.weight is on the meta device"):
        kmq.quantize_(empty, kmq.KMQConfig())
    assert type(empty[0]) is nn.Linear


def test_sample_weight_has_the_shape_of_the_weight():
    model = nn.Sequential(nn.Conv1d(16, 24, 1))
    with pytest.raises(ValueError, match=r"sample_weight of 0\.weight: expected shape \(24, 16, 1\), got \(24, 16\)"):
        kmq.quantize_(model, kmq.KMQConfig(), sample_weight={"0": torch.ones(24, 16)})
    kmq.quantize_(model, kmq.KMQConfig(), sample_weight={"0": torch.rand(24, 16, 1)})
    assert isinstance(model[0], CodebookModule)
