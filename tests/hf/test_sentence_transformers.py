"""sentence-transformers on packed models, with the real library: quantize, train, save, load, and what a load without us says."""

import json

import numpy as np
import pytest
import tiny_task
import torch
from conftest import family_model
from huggingface_hub import ModelCard

import kmq_kernels as kmq
from kmq_kernels.checkpoint import make_plan, quantize_checkpoint
from kmq_kernels.layers import CodebookModule

pytest.importorskip("sentence_transformers")
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

TEXTS = ["good film", "very bad food", "not fine day", "poor"]
CONFIG = kmq.KMQConfig(bits=4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder of sentence-transformers: encoder, pooling, dense, layer norm."""
    folder = tmp_path_factory.mktemp("sentence")
    tiny_task.write_task(folder)
    encoder = modules.Transformer(str(folder / "model"))
    width = encoder.get_embedding_dimension()
    torch.manual_seed(2)
    parts = [encoder, modules.Pooling(width), modules.Dense(width, 16), modules.LayerNorm(16)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "dense"))
    return folder / "dense"


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, CodebookModule)]


def test_quantize_save_and_load(dense, tmp_path):
    whole = SentenceTransformer(str(dense), device="cpu")
    model = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG})
    assert len(packed_layers(model)) == len(packed_layers(model[0])) > 10  # the encoder; its model_kwargs reach no other module
    expected = model.encode(TEXTS)
    assert np.abs(expected - whole.encode(TEXTS)).max() < 0.5
    model.save_pretrained(str(tmp_path / "out"))
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.array_equal(again.encode(TEXTS), expected)
    short = SentenceTransformer(str(tmp_path / "out"), device="cpu", truncate_dim=5)
    assert np.array_equal(short.encode(TEXTS), expected[:, :5])
    # In place: a module that sentence-transformers reads by itself, from a folder of its own, is left and named.
    with pytest.warns(UserWarning, match="2.linear .of a module that sentence-transformers reads by itself"):
        kmq.quantize_(whole, CONFIG)
    assert np.array_equal(whole.encode(TEXTS), expected)
    whole.save_pretrained(str(tmp_path / "all"))
    assert np.array_equal(SentenceTransformer(str(tmp_path / "all"), device="cpu").encode(TEXTS), expected)


def test_optimized_and_in_half(dense):
    model = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG})
    expected = model.encode(TEXTS)
    kmq.optimize_(model)
    assert np.allclose(model.encode(TEXTS), expected, atol=1e-4)
    half = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG, "dtype": torch.bfloat16})
    assert np.allclose(half.encode(TEXTS), expected, atol=0.1)


def test_training_keeps_the_indices(dense, tmp_path):
    model = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG})
    before = {id(m): (m.packed.clone(), m.codebook.detach().clone()) for m in packed_layers(model)}
    pairs = Dataset.from_dict({"a": TEXTS * 2, "b": TEXTS[::-1] * 2})
    how = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=how, train_dataset=pairs, loss=loss).train()
    assert all(torch.equal(m.packed, before[id(m)][0]) for m in packed_layers(model))
    assert any(not torch.equal(m.codebook, before[id(m)][1]) for m in packed_layers(model))
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "out"))
    assert np.array_equal(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS), expected)


def test_cross_encoder(dense, tmp_path):
    model = CrossEncoder(str(dense.parent / "model"), device="cpu", model_kwargs={"quantization_config": CONFIG})
    assert packed_layers(model)
    pairs = [("good film", "very bad"), ("poor", "fine")]
    expected = model.predict(pairs)
    model.save_pretrained(str(tmp_path / "out"))
    assert np.array_equal(CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs), expected)


def test_sparse_encoder(tmp_path):
    words = len(tiny_task.SPECIAL) + len(tiny_task.WORDS)
    family_model("bert", "MaskedLM", vocab_size=words).save_pretrained(tmp_path / "model")
    tiny_task.word_tokenizer().save_pretrained(tmp_path / "model")
    encoder = MLMTransformer(str(tmp_path / "model"), model_args={"quantization_config": CONFIG})
    model = SparseEncoder(modules=[encoder, SpladePooling()], device="cpu")
    assert packed_layers(model)
    expected = model.encode(TEXTS).to_dense()
    model.save_pretrained(str(tmp_path / "out"))
    assert torch.equal(SparseEncoder(str(tmp_path / "out"), device="cpu").encode(TEXTS).to_dense(), expected)


def test_a_folder_of_the_command(dense, tmp_path):
    quantize_checkpoint(make_plan(dense, CONFIG), tmp_path / "out")
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    model = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG})
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "from sentence_transformers import SentenceTransformer" in card.text
    assert "sentence-transformers" in card.data.tags


def test_without_the_import_it_says_what_to_import(dense, tmp_path, run_python):
    model = SentenceTransformer(str(dense), device="cpu", model_kwargs={"quantization_config": CONFIG})
    model.save_pretrained(str(tmp_path / "saved"))
    quantize_checkpoint(make_plan(dense, CONFIG), tmp_path / "command")
    code = f"""
import json, sys
from sentence_transformers import SentenceTransformer
said = []
for folder in {[str(tmp_path / "saved"), str(tmp_path / "command")]!r}:
    try:
        SentenceTransformer(folder, device="cpu")
        said.append("nothing")
    except ImportError as error:
        said.append(str(error))
assert "kmq_kernels" not in sys.modules
import kmq_kernels
found = SentenceTransformer({str(tmp_path / "saved")!r}, device="cpu").encode({TEXTS!r}).tolist()
print(json.dumps([said, found]))
"""
    said, found = run_python(code)
    assert all("`import kmq_kernels`" in sentence and "random" in sentence for sentence in said), said
    assert np.allclose(found, model.encode(TEXTS))
    noted = json.loads((tmp_path / "saved/config_sentence_transformers.json").read_text())
    assert list(noted["requirements"]) == ["kmq_kernels.hf"]
    # What is plain again asks for nothing.
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    kmq.dequantize_(plain)
    plain.save_pretrained(str(tmp_path / "plain"))
    assert "requirements" not in json.loads((tmp_path / "plain/config_sentence_transformers.json").read_text())
