"""The card: metadata that huggingface_hub reads, sizes, quality, the source's card below; who writes it and who is left alone."""

import copy
import pickle

import pytest
import torch
from conftest import family_model
from huggingface_hub import ModelCard

import kmq_kernels as kmq
from kmq_kernels.hf import Facts, Quality, card, hub_id

FACTS = Facts({3: 20, 4: 2}, "kmeans", 1000, 4000, 420, "kmq run")
SOURCE = (
    "---\nlicense: mit\npipeline_tag: fill-mask\nlanguage:\n- de\ntags:\n- old\nmodel-index:\n- name: x\n---\n"
    "# My model\n\nIt is good.\n"
)


def test_metadata_and_text():
    quality = Quality("PolyAI/banking77", "Banking77", "text-classification", {"accuracy": 0.91234567}, {"accuracy": 0.9})
    read = ModelCard(card(FACTS, base_model="someone/tiny", source_card=SOURCE, quality=quality))
    data = read.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny", "quantized")
    assert (data["library_name"], data["license"], data["language"]) == ("kmq_kernels", "mit", ["de"])
    assert data["tags"] == ["kmq", "quantized", "3-bit", "4-bit"]
    assert (data["datasets"], data["metrics"]) == (["PolyAI/banking77"], ["accuracy"])
    assert data["pipeline_tag"] == "text-classification"
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Banking77", "accuracy", 0.91235)
    assert 'kmq.load("path/to/this/folder")' in read.text
    assert "| accuracy, Banking77 | 0.9000 | 0.9123 |" in read.text
    assert "| bytes of all tensors | 4,000 | 420 |" in read.text
    assert "Weights: 20 of 3 bits, 2 of 4 bits." in read.text
    assert read.text.rstrip().endswith("## The model it was made from\n\n# My model\n\nIt is good.")
    # A card of ours as the source: its own source stays, nothing is nested.
    again = ModelCard(card(FACTS, source_card=str(read)))
    assert again.text.count("## The model it was made from") == 1
    assert again.data.base_model == "someone/tiny"
    assert "Quality: not measured." in again.text
    assert again.data.eval_results is None
    assert ModelCard(card(FACTS, source_card=SOURCE)).data.pipeline_tag == "fill-mask"


@pytest.mark.parametrize("text", [SOURCE.replace("\n", "\r\n"), "\ufeff" + SOURCE], ids=["crlf", "bom"])
def test_line_ends_and_marks_of_the_source(text):
    read = ModelCard(card(FACTS, source_card=text))
    assert (read.data.license, read.data.language) == ("mit", ["de"])
    assert read.text.rstrip().endswith("## The model it was made from\n\n# My model\n\nIt is good.")


@pytest.mark.parametrize(("given", "kept"), [("no", ["no"]), ("[no, en]", ["no", "en"])])
def test_norwegian_is_no_truth_value(given, kept):
    written = card(FACTS, source_card=f"---\nlanguage: {given}\n---\n# Modell\n")
    assert ModelCard(written).data.language == kept


def test_what_lies_in_the_folder_and_the_configuration_as_a_dictionary(tmp_path, run_python):
    """A side file that is no dictionary, a card beyond ASCII where that is the locale's encoding."""
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    model.config.quantization_config = model.config.quantization_config.to_dict()
    (tmp_path / "config_sentence_transformers.json").write_text("[]")
    model.save_pretrained(tmp_path)
    kmq.load(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "kmq_kernels"
    code = f"""
from pathlib import Path
from kmq_kernels.hf.card import card, Facts, write_card
text = card(Facts({{2: 1}}, "kmeans", 1, 4, 1, "kmq run"), source_card="# Mod\\u00e8le")
print(str(write_card(Path({str(tmp_path)!r}), text)).lower())
"""
    assert run_python(code, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert "Mod\u00e8le" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ["", "no metadata", "---\n: [\n---\ntext", "---\n- a list\n---\ntext", "---\nonly a line"])
def test_any_source_card(source):
    read = ModelCard(card(FACTS, source_card=source))
    assert read.data.library_name == "kmq_kernels"
    assert source.splitlines()[-1:] == read.text.splitlines()[-1:] or not source
    assert "base_model" not in read.data.to_dict()


def test_ids_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--some-one--a-model--b" / "snapshots" / "abc"
    assert hub_id("some-one/a-model") == "some-one/a-model"
    assert hub_id(str(snapshot)) == "some-one/a-model--b"
    (tmp_path / "one").mkdir()
    assert [hub_id(name) for name in (str(tmp_path / "one"), "bert", "./here", "")] == [None] * 4


def test_save_pretrained_writes_it(tmp_path):
    model = family_model("bert")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/README.md").write_text(SOURCE)
    packed = type(model).from_pretrained(tmp_path / "dense", quantization_config=kmq.KMQConfig(bits=3))
    packed.save_pretrained(tmp_path / "one")
    read = ModelCard.load(tmp_path / "one/README.md")
    assert read.data.license == "mit"
    assert "made by `save_pretrained`" in read.text
    for again in (kmq.load(tmp_path / "one"), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        with torch.no_grad():
            again.classifier.bias.fill_(5)
        again.save_pretrained(tmp_path / "two")
        assert (kmq.load(tmp_path / "two").classifier.bias == 5).all()  # the copy is saved, not what it was copied from
        assert (tmp_path / "two/README.md").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    packed.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    kmq.dequantize_(packed)
    packed.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/README.md").exists()
