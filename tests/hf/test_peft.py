"""LoRA of PEFT on packed layers, with the real library: nothing but the import of kmq_kernels is needed."""

import pytest
import torch
from conftest import family_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, GPT2LMHeadModel

import kmq_kernels as kmq

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
