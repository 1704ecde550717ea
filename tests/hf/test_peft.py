"""LoRA of PEFT on packed layers, with the real library: nothing but the import of kmq_kernels is needed."""

import json
import warnings

import pytest
import torch
from conftest import family_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, GPT2LMHeadModel

import kmq_kernels as kmq
from kmq_kernels.checkpoint import make_plan, quantize_checkpoint

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LABELS = torch.tensor([0, 1, 2, 0])
TARGETS = {"two": ["query", "value"], "all": "all-linear", "embedding": ["word_embeddings", "query"]}


@pytest.fixture
def ids():
    return torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(1))


def plain():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(family_config("bert", num_labels=3)).eval()


def packed(**options):
    model = plain()
    kmq.quantize_(model, kmq.KMQConfig(**{"bits": 4, **options}))
    return model


def trained(model, ids, steps=3):
    """The model after a few steps on everything that trains, and its logits."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(steps):
        model(ids, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()(ids).logits.detach()


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["query", "value"], **options}))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", list(TARGETS))
def test_train_save_load_merge(targets, dora, ids, tmp_path):
    model = packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(ids).logits
    wrapped = adapted(model, target_modules=TARGETS[targets], use_dora=dora).eval()
    assert torch.equal(wrapped(ids).logits, expected)  # B begins with zeros
    logits = trained(wrapped, ids)
    assert not torch.equal(logits, expected)
    with wrapped.disable_adapter():
        assert torch.equal(F.log_softmax(wrapped.base_model.model.bert(ids)[0], -1), F.log_softmax(model.bert(ids)[0], -1))
    wrapped.save_pretrained(tmp_path)
    assert not [name for name in wrapped.state_dict() if "packed" in name and name.endswith("lora_A")]
    again = PeftModel.from_pretrained(packed(), tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)
    dense = PeftModel.from_pretrained(plain(), tmp_path).eval()  # the same adapter on the weights before clustering
    assert torch.allclose(dense(ids).logits, logits, atol=0.1)
    for refused in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(ValueError, match=r"dequantize_\(model\) first, then merge, then quantize_"):
            refused()
    assert torch.equal(wrapped(ids).logits, logits)
    base = wrapped.unload()
    own = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.items())  # nothing below the adapter has moved
    # The way that the sentence names.
    kmq.dequantize_(again)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-5)
    kmq.quantize_(merged, kmq.KMQConfig(bits=8))
    assert torch.allclose(merged(ids).logits, logits, atol=0.05)


def test_the_adapter_is_the_low_rank_product(ids):
    """In float64, against the decoded weight and the product written out."""
    layer = kmq.CodebookLinear(6, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.codebook.copy_(torch.randn(1, 8, dtype=torch.float64))
        layer.packed.copy_(kmq.pack(torch.randint(0, 8, (5, 6), dtype=torch.uint8), 3))
    wrapped = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, lora_alpha=3, init_lora_weights=False))
    adapter = wrapped.base_model.model[0]
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = F.linear(x, layer.weight.detach() + 1.5 * (b @ a).double(), layer.bias)
    assert torch.allclose(wrapped(x), expected, atol=1e-6)


def test_several_adapters_and_batches_of_them(ids):
    wrapped = adapted(packed(), target_modules="all-linear")
    first = trained(wrapped, ids)
    wrapped.add_adapter("second", LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4))
    wrapped.set_adapter("second")
    names = {name for name, module in wrapped.named_modules() if "lora_A" in name and name.endswith("second")}
    assert len(names) == 13  # 2 layers of 6, and the pooler; the classifier is saved whole
    second = trained(wrapped, ids)
    wrapped.set_adapter("default")
    assert torch.equal(wrapped.eval()(ids).logits, first)
    mixed = wrapped(ids, adapter_names=["default", "second", "second", "default"]).logits
    assert torch.allclose(mixed, torch.stack([first[0], second[1], second[2], first[3]]), atol=1e-6)


def test_the_head_is_saved_whole_and_only_what_is_asked_for_trains(ids, tmp_path):
    wrapped = adapted(packed(), modules_to_save=["classifier"])
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in names)
    assert any("classifier" in name for name in names)
    logits = trained(wrapped, ids)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(packed(), tmp_path).eval()(ids).logits, logits)


def test_prepared_for_training_in_few_bits(ids):
    model = packed().to(torch.bfloat16)
    prepared = prepare_model_for_kbit_training(model)
    assert not any(p.requires_grad for p in prepared.parameters())
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    prepared.gradient_checkpointing_enable()
    prepared.enable_input_require_grads()
    trained(adapted(prepared), ids)


def test_adapters_of_transformers_itself(ids, tmp_path):
    model = packed()
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    other = packed()
    other.load_adapter(str(tmp_path))
    assert torch.equal(other.eval()(ids).logits, logits)


def test_a_saved_packed_base_takes_adapters(ids, tmp_path):
    packed().save_pretrained(tmp_path / "base")
    base = kmq.load(tmp_path / "base")
    logits = trained(adapted(base), ids)
    base_of = PeftModel.from_pretrained(kmq.load(tmp_path / "base"), _saved(base, tmp_path))
    assert base_of.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert torch.isfinite(logits).all()


def _saved(model, tmp_path):
    adapted(kmq.load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_conv1d_and_tied_heads():
    torch.manual_seed(0)
    tiny = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
    model = GPT2LMHeadModel(tiny).eval()
    kmq.quantize_(model, kmq.KMQConfig(bits=4))
    ids = torch.randint(0, 40, (2, 5))
    expected = model(ids).logits
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    ).eval()
    assert "lm_head" not in wrapped.peft_config["default"].target_modules
    logits = wrapped(ids).logits
    assert not torch.allclose(logits, expected)
    kmq.dequantize_(wrapped)
    assert torch.allclose(wrapped.merge_and_unload()(ids).logits, logits, atol=1e-5)
    tied = AutoModelForMaskedLM.from_config(family_config("bert")).eval()
    kmq.quantize_(tied, kmq.KMQConfig(bits=4))
    get_peft_model(tied, LoraConfig(target_modules="all-linear"))(torch.randint(5, 60, (2, 5)))


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_that_rewrite_the_weight_are_refused(start):
    more = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    with pytest.raises(ValueError, match=rf"init_lora_weights: '{start}' begins with another weight.*expected True"):
        adapted(packed(), init_lora_weights=start, **more)


def test_what_a_packed_layer_cannot_have():
    network = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    kmq.quantize_(network, kmq.KMQConfig(bits=2))
    with pytest.raises(ValueError, match="a packed Conv1d takes no adapter"):
        get_peft_model(network, LoraConfig(target_modules=["0"]))


def test_an_adapter_of_another_base(ids, tmp_path):
    adapted(packed()).save_pretrained(tmp_path / "adapter")
    wide = AutoModelForSequenceClassification.from_config(family_config("bert", hidden_size=48, num_labels=3))
    kmq.quantize_(wide, kmq.KMQConfig(bits=4))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        PeftModel.from_pretrained(wide, tmp_path / "adapter")
    other = AutoModelForSequenceClassification.from_config(family_config("mpnet", num_labels=3))
    kmq.quantize_(other, kmq.KMQConfig(bits=4))
    with pytest.raises(ValueError, match="No modules were targeted for adaptation"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def seeded(seed, **options):
    """A classifier of the same shapes for every seed, as a model, packed where options say how."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(family_config("bert", num_labels=3)).eval()
    if options:
        kmq.quantize_(model, kmq.KMQConfig(**options))
    return model


def said_at_load(base, adapter):
    """Our sentences when an adapter is loaded on a base."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, adapter)
    return [str(each.message) for each in found if "was trained on" in str(each.message)]


BITS = [
    {"bits": 1},
    {"bits": 2, "scheme": "linear"},
    {"bits": 3, "granularity": "row", "outlier_fraction": 0.01},
    {"bits": 8, "row_scale": True},
]


@pytest.mark.parametrize("how", BITS, ids=lambda how: f"{how['bits']}bit")
@pytest.mark.parametrize("trained_on", ["dense", "packed"])
def test_a_base_of_the_same_shape_is_told_by_its_weights(trained_on, how, tmp_path):
    """Both saved by us and by the command, whether the adapter was trained on floating point or on 4 bits."""
    for name, seed in (("one", 1), ("other", 2)):
        seeded(seed).save_pretrained(tmp_path / f"{name}-dense")
        seeded(seed, bits=4, granularity="group", row_scale=True).save_pretrained(tmp_path / f"{name}-packed")
        seeded(seed, **how).save_pretrained(tmp_path / f"{name}-saved")
        quantize_checkpoint(make_plan(tmp_path / f"{name}-dense", kmq.KMQConfig(**how)), tmp_path / f"{name}-command")
    base = kmq.load(tmp_path / f"one-{trained_on}")
    adapted(base).save_pretrained(tmp_path / "adapter")
    for made in ("saved", "command"):
        assert said_at_load(kmq.load(tmp_path / f"one-{made}"), tmp_path / "adapter") == []
        (said,) = said_at_load(kmq.load(tmp_path / f"other-{made}"), tmp_path / "adapter")
        assert said.startswith(f"adapter: it was trained on {tmp_path / f'one-{trained_on}'}, and the packed model")
        assert str(tmp_path / f"other-{made}") in said
        assert "has other weights" in said
        assert "\n" not in said
    # In memory, and the base alone under its own names.
    (said,) = said_at_load(seeded(2, bits=4), tmp_path / "adapter")
    assert "and the packed model has other weights" in said
    assert said_at_load(seeded(1, bits=4), tmp_path / "adapter") == []


def test_a_base_that_is_not_here_is_told_by_its_name(tmp_path):
    """Ids on the hub: what the adapter names beside what the card of the packed model names."""
    seeded(1).save_pretrained(tmp_path / "source")
    plan = make_plan(tmp_path / "source", kmq.KMQConfig(bits=4), base_model="somebody/one")
    quantize_checkpoint(plan, tmp_path / "packed")
    adapted(kmq.load(tmp_path / "packed")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())

    def said_of(name):
        file.write_text(json.dumps({**content, "base_model_name_or_path": name}))
        return said_at_load(kmq.load(tmp_path / "packed"), tmp_path / "adapter")

    (said,) = said_of("somebody/other")
    assert said.startswith("adapter: it was trained on somebody/other, and the packed model")
    assert "was made from somebody/one" in said
    for nothing in ("somebody/one", None, "", str(tmp_path / "packed"), str(tmp_path / "nowhere")):
        assert said_of(nothing) == []


def test_the_cache_of_the_hub_has_the_base(tmp_path, monkeypatch):
    """No question goes to the hub; the revision is the adapter's."""
    folder = tmp_path / "hub/models--somebody--one/snapshots" / ("a" * 40)
    seeded(1).save_pretrained(folder)
    (tmp_path / "hub/models--somebody--one/refs").mkdir()
    (tmp_path / "hub/models--somebody--one/refs/main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapted(seeded(1, bits=4)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "somebody/one"}))
    assert said_at_load(seeded(1, bits=2), tmp_path / "adapter") == []
    (said,) = said_at_load(seeded(2, bits=2), tmp_path / "adapter")
    assert "trained on somebody/one" in said


def test_a_second_adapter_of_another_base(tmp_path):
    for seed in (1, 2):
        seeded(seed).save_pretrained(tmp_path / f"base{seed}")
        adapted(kmq.load(tmp_path / f"base{seed}")).save_pretrained(tmp_path / f"adapter{seed}")
    model = PeftModel.from_pretrained(seeded(1, bits=4), tmp_path / "adapter1")
    with pytest.warns(UserWarning, match=r"trained on .*base2.* has other weights"):
        model.load_adapter(tmp_path / "adapter2", "second")
    with pytest.warns(UserWarning, match=r"trained on .*base2.* has other weights"):
        seeded(1, bits=4).load_adapter(str(tmp_path / "adapter2"))  # transformers' own


def test_plain_models_are_left_to_peft(ids):
    wrapped = adapted(plain())
    assert {type(m).__module__ for m in wrapped.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    logits = trained(wrapped, ids)
    assert torch.allclose(wrapped.merge_and_unload()(ids).logits, logits, atol=1e-5)
    assert BertConfig().model_type == "bert"


def test_the_import_may_come_after_peft(run_python):
    code = """
import json, peft
before = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__name__
import kmq_kernels
print(json.dumps([before, peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__name__]))
"""
    assert run_python(code) == ["LoraModel", "PackedLoraModel"]
