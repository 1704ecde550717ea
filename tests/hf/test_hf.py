"""from_pretrained, save_pretrained and kmq.load: bit-equal, tied, typed, and never silently random."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, family_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import kmq_kernels as kmq
from kmq_kernels.files import CheckpointError
from kmq_kernels.layers import CodebookModule


@pytest.fixture
def packed(tmp_path):
    """A packed BERT folder and its logits."""
    model = family_model("bert")
    model.save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=kmq.KMQConfig(bits=3))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


ORDERS = {
    "ours first": "import kmq_kernels",
    "theirs first": "import transformers.quantizers, kmq_kernels",
    "the integration first": "import kmq_kernels.hf.quantizer",
    "pickled": "import torch; assert torch.equal(torch.load(folder + '.pt', weights_only=False)(ids).logits, logits)",
}
LOAD = """
import inspect, json, pickle, sys
import torch
ids, logits = torch.load({inputs!r})
folder = {folder!r}
{order}
import kmq_kernels as kmq
from kmq_kernels.imports import _Follower
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(folder)
assert torch.equal(model(ids).logits, logits)
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["kmq"] is type(model.hf_quantizer)
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
assert not any(isinstance(finder, _Follower) and finder._other in sys.modules for finder in sys.meta_path)
assert pickle.loads(pickle.dumps(model.hf_quantizer)).quantization_config == model.config.quantization_config
print(json.dumps("fine"))
"""


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports(order, packed, ids, tmp_path, run_python):
    model = kmq.load(packed)
    torch.save(model, f"{packed}.pt")
    torch.save((ids, model(ids).logits.detach()), tmp_path / "inputs.pt")
    code = LOAD.format(inputs=str(tmp_path / "inputs.pt"), folder=str(packed), order=ORDERS[order])
    assert run_python(code) == "fine"


def test_importing_us_imports_no_quantizers_and_no_models(run_python):
    found = run_python("import json, sys, kmq_kernels.cli, kmq_kernels.checkpoint; print(json.dumps(list(sys.modules)))")
    heavy = ("transformers.quantizers", "transformers.modeling_utils", "torch._dynamo", "sympy", "accelerate")
    assert not [name for name in found if name.startswith(heavy)]


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload_are_bit_equal(family, ids, tmp_path):
    family_model(family).save_pretrained(tmp_path / "dense")
    auto = AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=kmq.KMQConfig(bits=4)).eval()
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    again = auto.from_pretrained(tmp_path / "one")
    assert torch.equal(again(ids).logits, logits)
    assert again.config.quantization_config.skip == model.config.quantization_config.skip
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(kmq.load(tmp_path / "two")(ids).logits, logits)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    again.dequantize()
    torch.testing.assert_close(again(ids).logits, logits)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_outliers_and_row_factors_are_saved_tied_and_trained(family, ids, tmp_path):
    for head in ("SequenceClassification", "MaskedLM"):
        model = family_model(family, head)
        kmq.quantize_(model, kmq.KMQConfig(bits=2, outlier_fraction=0.02, row_scale=True))
        model.save_pretrained(tmp_path / head)
        again = kmq.load(tmp_path / head).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        for name, module in again.named_modules():
            if isinstance(module, CodebookModule):
                stored = model.get_submodule(name).stored()
                assert all(torch.equal(value, stored[part]) for part, value in module.stored().items()), name
        if head == "MaskedLM":
            one, other = again.get_input_embeddings(), again.get_output_embeddings()
            assert all(value is other.stored()[part] for part, value in one.stored().items())
            again(ids, labels=ids).loss.backward()
            assert one.outlier_values.grad.abs().sum() > 0
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "SequenceClassification", dtype=torch.bfloat16)
    embedding = half.get_input_embeddings()
    assert (embedding.outlier_index.dtype, embedding.outlier_values.dtype) == (torch.int32, torch.bfloat16)
    model.dequantize()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_quantize_in_place_saves_like_from_pretrained(packed, ids, tmp_path):
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own/model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "own", packed))
    assert ours["quantization_config"] == theirs["quantization_config"]


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_tied_masked_lm(family, ids, tmp_path):
    family_model(family, "MaskedLM").save_pretrained(tmp_path / "dense")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", quantization_config=kmq.KMQConfig(bits=4)).eval()
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed").eval()
    assert again.get_output_embeddings().packed is again.get_input_embeddings().packed
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_bfloat16(packed, ids):
    model = kmq.load(packed)
    half = AutoModelForSequenceClassification.from_pretrained(packed, dtype=torch.bfloat16)
    assert half.bert.pooler.dense.codebook.dtype == torch.bfloat16
    assert half.bert.pooler.dense.packed.dtype == torch.uint8
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, atol=0.05, rtol=0.05)


def test_base_model_of_a_classifier(packed, ids):
    base = AutoModel.from_pretrained(packed)
    expected = kmq.load(packed).bert(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, expected)


def test_plain_checkpoint_loads_too(tmp_path, ids):
    model = family_model("bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(kmq.load(tmp_path)(ids).logits, model(ids).logits)


def test_compile(packed, ids):
    model = kmq.load(packed)
    layer = torch.compile(model.bert.encoder.layer[0].intermediate, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), model.bert.encoder.layer[0].intermediate(x))


def test_missing_tensor(packed):
    file = packed / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.pooler.dense.packed"]
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (kmq.load, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.packed is missing"):
            load(packed)


def test_shape_that_does_not_fit(packed):
    file = packed / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.pooler.dense.codebook"] = torch.zeros(1, 16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.codebook has shape \(1, 16\)"):
        kmq.load(packed)


@pytest.mark.parametrize("keep", [0, 5, 200, 5000, -1])
def test_cut_short(packed, keep):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        kmq.load(packed)


def test_index_that_does_not_fit(packed):
    (packed / "model.safetensors").rename(packed / "model-1.safetensors")
    index = packed / "model.safetensors.index.json"
    for text, sentence in [
        ("{", "not an index"),
        ("[]", "not an index"),
        (json.dumps({"weight_map": {"a": "model-9.safetensors"}}), "which is not there"),
        (json.dumps({"weight_map": {"a": "../model-1.safetensors"}}), "not the name of a file"),
        (json.dumps({"weight_map": {"a": "model-1.safetensors"}}), "names a, which none"),
    ]:
        index.write_text(text)
        with pytest.raises(CheckpointError, match=sentence):
            kmq.load(packed)


def test_folder_without_weights(packed, tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        kmq.load(tmp_path / "nowhere")
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        kmq.load(packed)
    (packed / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        kmq.load(packed)


def test_trainer_resumes_and_loads_best(packed, tmp_path, ids):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids.repeat(4, 1))]

    def train(**options):
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", per_device_train_batch_size=4,
            report_to=[], load_best_model_at_end=True, disable_tqdm=True, learning_rate=1e-2, logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        model = kmq.load(packed)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train(**options)
        return model

    whole = train()
    before = {n: m.packed.clone() for n, m in kmq.load(packed).named_modules() if isinstance(m, CodebookModule)}
    for name, packed_now in ((n, m.packed) for n, m in whole.named_modules() if isinstance(m, CodebookModule)):
        assert torch.equal(packed_now, before[name])
    resumed = train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


DDP = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from conftest import family_model
import kmq_kernels as kmq
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=int(sys.argv[1]), world_size=2)
model = family_model("bert")
kmq.quantize_(model, kmq.KMQConfig(bits=3, **eval(sys.argv[4])))
ids = torch.randint(5, 120, (4, 12), generator=torch.Generator().manual_seed(3))
labels = torch.arange(4) % 3
ddp = torch.nn.parallel.DistributedDataParallel(model)
half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
ddp(input_ids=ids[half], labels=labels[half]).loss.backward()
grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
model.zero_grad()
model(input_ids=ids, labels=labels).loss.backward()
for name, p in model.named_parameters():
    if p.requires_grad:
        torch.testing.assert_close(grads[name], p.grad, atol=1e-6, rtol=1e-4)
print("same gradients")
"""


@pytest.mark.parametrize("options", ["{}", "{'outlier_fraction': 0.02, 'row_scale': True}"])
def test_ddp_gradient_is_that_of_the_whole_batch(tmp_path, options):
    from pathlib import Path

    tests = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), tests, str(tmp_path / "rendezvous"), options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err.decode()[-2000:]
        assert b"same gradients" in out
