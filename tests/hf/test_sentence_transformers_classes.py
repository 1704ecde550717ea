"""SentenceTransformer, CrossEncoder and SparseEncoder alike: model_kwargs, optimize_, their trainers, push_to_hub, pools."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny_task
import torch
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels.checkpoint import make_plan, quantize_checkpoint
from kmq_kernels.layers import CodebookModule

pytest.importorskip("sentence_transformers")
import sentence_transformers as st
from datasets import Dataset
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

TEXTS = ["good film", "very bad food", "not fine day", "poor"] * 2
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
CONFIG = kmq.KMQConfig(bits=4)


@dataclasses.dataclass
class Kind:
    """One of the classes: how it is made into a folder, what it computes, how it trains."""

    cls: Any
    make: Callable[[Any], Any]
    outputs: Callable[..., np.ndarray]
    trainer: Any
    arguments: Any
    loss: Callable[[Any], Any]
    data: dict[str, Any]


def _sentence(folder):
    encoder = modules.Transformer(str(folder / "model"))
    width = encoder.get_embedding_dimension()
    torch.manual_seed(2)
    parts = [encoder, modules.Pooling(width), modules.Dense(width, 16), modules.LayerNorm(16)]
    return st.SentenceTransformer(modules=parts, device="cpu")


def _sparse(folder):
    words = len(tiny_task.SPECIAL) + len(tiny_task.WORDS)
    family_model("bert", "MaskedLM", vocab_size=words).save_pretrained(folder / "masked")
    tiny_task.word_tokenizer().save_pretrained(folder / "masked")
    return st.SparseEncoder(modules=[MLMTransformer(str(folder / "masked")), SpladePooling()], device="cpu")


def _cross(folder):
    family_model("bert", num_labels=1).save_pretrained(folder / "scores")
    tiny_task.word_tokenizer().save_pretrained(folder / "scores")
    return st.CrossEncoder(str(folder / "scores"), device="cpu")


_TEXT_PAIRS = {"a": TEXTS, "b": TEXTS[::-1]}
KINDS = {
    "sentence": Kind(
        st.SentenceTransformer, _sentence, lambda model, **how: model.encode(TEXTS, **how),
        st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments, losses.MultipleNegativesRankingLoss, _TEXT_PAIRS,
    ),
    "cross": Kind(
        st.CrossEncoder, _cross, lambda model, **how: model.predict(PAIRS, **how),
        st.CrossEncoderTrainer, st.CrossEncoderTrainingArguments, cross_losses.BinaryCrossEntropyLoss,
        {**_TEXT_PAIRS, "label": [1.0, 0.0] * 4},
    ),
    "sparse": Kind(
        st.SparseEncoder, _sparse, lambda model, **how: model.encode(TEXTS, **how).to_dense().numpy(),
        st.SparseEncoderTrainer, st.SparseEncoderTrainingArguments,
        lambda model: sparse_losses.SpladeLoss(
            model, sparse_losses.SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-3
        ),
        _TEXT_PAIRS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each class in floating point, by name."""
    folder = tmp_path_factory.mktemp("classes")
    tiny_task.write_task(folder)
    for name, kind in KINDS.items():
        kind.make(folder).save_pretrained(str(folder / name))
    return {name: folder / name for name in KINDS}


@pytest.fixture(params=KINDS)
def packed(request, folders):
    """A kind, its folder, and its packed model: quantized by model_kwargs."""
    kind, folder = KINDS[request.param], folders[request.param]
    return kind, folder, load(kind, folder, model_kwargs={"quantization_config": CONFIG})


def load(kind, folder, **options):
    return kind.cls(str(folder), device="cpu", **options)


def layers(model):
    return [module for module in model.modules() if isinstance(module, CodebookModule)]


def test_model_kwargs_quantize_as_quantize_does(packed):
    """Against the same model in floating point with the encoder alone quantized by quantize_."""
    kind, folder, model = packed
    assert len(layers(model)) > 10
    other = load(kind, folder)
    encoder = next(module for module in other.modules() if hasattr(module, "base_model_prefix"))
    kmq.quantize_(encoder, CONFIG)
    assert np.array_equal(kind.outputs(model), kind.outputs(other))


def test_optimized(packed):
    kind, _, model = packed
    expected = kind.outputs(model)
    kmq.optimize_(model)
    assert any(type(module).__module__.startswith("kmq_kernels") for module in model.modules() if not list(module.children()))
    assert np.allclose(kind.outputs(model), expected, atol=1e-4)
    kmq.optimize_(model, compute="int8")
    assert np.allclose(kind.outputs(model), expected, atol=0.1)


def test_its_trainer_keeps_the_indices(packed, tmp_path):
    """Stage 3: codebooks move, indices stay, and what is saved is what was trained."""
    kind, _, model = packed
    before = {id(m): (m.packed.clone(), m.codebook.detach().clone()) for m in layers(model)}
    how = kind.arguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    kind.trainer(model=model, args=how, train_dataset=Dataset.from_dict(kind.data), loss=kind.loss(model)).train()
    assert all(torch.equal(m.packed, before[id(m)][0]) for m in layers(model))
    assert sum(not torch.equal(m.codebook, before[id(m)][1]) for m in layers(model)) > 10
    expected = kind.outputs(model)
    model.save_pretrained(str(tmp_path / "out"))
    assert np.array_equal(kind.outputs(load(kind, tmp_path / "out")), expected)


class Hub:
    """What huggingface_hub would upload, copied instead: no request leaves the machine."""

    def __init__(self, monkeypatch, place):
        self.place, self.asked = place, []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **options):
        self.asked.append(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.place)
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )


def test_what_push_to_hub_uploads(packed, tmp_path, monkeypatch):
    """The folder loads to the same outputs and asks for the import; its card is that of sentence-transformers."""
    kind, _, model = packed
    hub = Hub(monkeypatch, tmp_path / "uploaded")
    expected = kind.outputs(model)
    model.push_to_hub("somebody/packed")
    assert hub.asked == ["somebody/packed"]
    again = load(kind, hub.place)
    assert len(layers(again)) == len(layers(model))
    assert np.array_equal(kind.outputs(again), expected)
    needs = json.loads((hub.place / "config_sentence_transformers.json").read_text())["requirements"]
    assert list(needs) == ["kmq_kernels.hf"]
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    weights = {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert weights
    assert all((hub.place / path).read_bytes() == (tmp_path / "saved" / path).read_bytes() for path in weights)
    assert huggingface_hub.ModelCard.load(hub.place / "README.md").data.library_name == "sentence-transformers"
    # Without it the folder has ours.
    card = huggingface_hub.ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.library_name == "kmq_kernels"
    assert {"quantized", "4-bit"} <= set(card.data.tags)


def test_what_push_to_hub_uploads_of_a_folder(folders, tmp_path, monkeypatch):
    """`local_model_path`: what `kmq quantize` wrote goes up as it is."""
    for name, kind in KINDS.items():
        out = tmp_path / name
        quantize_checkpoint(make_plan(folders[name], CONFIG), out)
        hub = Hub(monkeypatch, tmp_path / f"{name}-uploaded")
        model = load(kind, out)
        model.push_to_hub("somebody/packed", local_model_path=str(out))
        assert sorted(path.relative_to(out) for path in out.rglob("*")) == sorted(
            path.relative_to(hub.place) for path in hub.place.rglob("*")
        )
        assert np.array_equal(kind.outputs(load(kind, hub.place)), kind.outputs(model))
        assert huggingface_hub.ModelCard.load(hub.place / "README.md").data.library_name == "kmq_kernels"


def test_truncated(folders, tmp_path):
    """truncate_dim when it is loaded, and for one call."""
    kind = KINDS["sentence"]
    model = load(kind, folders["sentence"], model_kwargs={"quantization_config": CONFIG})
    expected = kind.outputs(model)
    model.save_pretrained(str(tmp_path / "out"))
    assert np.array_equal(kind.outputs(load(kind, tmp_path / "out", truncate_dim=5)), expected[:, :5])
    assert np.array_equal(kind.outputs(model, truncate_dim=7), expected[:, :7])


@pytest.mark.slow
def test_pools_of_processes(packed):
    kind, _, model = packed
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = kind.outputs(model, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.allclose(found, kind.outputs(model), atol=1e-6)
