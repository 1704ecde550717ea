"""kmq quantize: the same bytes as in memory, for any ranks, after any interruption; strangers' files are refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, family_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertModel

import kmq_kernels as kmq
from kmq_kernels.checkpoint import quantize_checkpoint
from kmq_kernels.checkpoint_plan import make_plan


def quantize(source, out, *, model_class=None, shard_bytes=256_000_000, on_progress=None, **options):
    plan = make_plan(Path(source), kmq.KMQConfig(**options), model_class=model_class, shard_bytes=shard_bytes)
    return quantize_checkpoint(plan, Path(out), on_progress=on_progress)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def in_memory(auto, source, out, **options):
    model = auto.from_pretrained(source)
    kmq.quantize_(model, kmq.KMQConfig(**options))
    model.save_pretrained(out)


def assert_same_model(one, other):
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def bert(tmp_path):
    """A small BERT classifier folder, with a file beside the weights."""
    family_model("bert").save_pretrained(tmp_path / "source")
    (tmp_path / "source/vocab.txt").write_text("[PAD]\n")
    return tmp_path / "source"


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """An encoder of 20 MB in 5 files, and the options that quantize it into about a dozen."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(4)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 64}
    config = BertConfig(num_hidden_layers=6, num_attention_heads=4, **sizes)
    BertModel(config).save_pretrained(folder, max_shard_size="5MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, {"bits": 4, "shard_bytes": 250_000}


# The same bytes as quantize_ and save_pretrained


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_as_in_memory(family, tmp_path):
    family_model(family).save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForSequenceClassification, tmp_path / "dense", tmp_path / "one", bits=3)
    quantize(tmp_path / "dense", tmp_path / "two", bits=3)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "deberta-v2", "mpnet", "distilbert"])
def test_same_bytes_for_tied_heads(family, tmp_path, ids):
    family_model(family, "MaskedLM").save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForMaskedLM, tmp_path / "dense", tmp_path / "one", bits=4)
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")(ids).logits
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "two")(ids).logits, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "scheme": "linear"},
        {"bits": 4, "granularity": "row"},
        {"bits": 3, "granularity": "group", "group_rows": 5},
        {"preset": "paper", "bits": 4},
        {"bits": 4, "skip": [r"encoder\.layer\.1"], "module_bits": {"query": 2, "classifier": 8}},
    ],
)
def test_same_bytes_for_every_option(options, bert, tmp_path):
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", **options)
    quantize(bert, tmp_path / "two", **options)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("named", [True, False])
def test_same_bytes_for_other_dtypes(dtype, named, bert, tmp_path):
    """The dtype is config.json's; where it names none, that of the tensors."""
    AutoModelForSequenceClassification.from_pretrained(bert).to(dtype).save_pretrained(bert)
    if not named:
        config = json.loads((bert / "config.json").read_text())
        del config["dtype"]
        (bert / "config.json").write_text(json.dumps(config))
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", bits=4)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_a_dtype_that_the_tensors_do_not_have(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", bits=4)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("head", ["base of a classifier", "classifier of a base"])
def test_base_and_headed_checkpoints(head, bert, tmp_path):
    """The prefix of the base model is added or taken away, and an encoder that claims a head is an encoder."""
    if head == "base of a classifier":
        in_memory(AutoModel, bert, tmp_path / "one", bits=4)
        quantize(bert, tmp_path / "two", bits=4, model_class="BertModel")
    else:
        config = json.loads((bert / "config.json").read_text())
        AutoModel.from_pretrained(bert).save_pretrained(bert)
        (bert / "config.json").write_text(json.dumps(config))
        in_memory(AutoModel, bert, tmp_path / "one", bits=4)
        quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_legacy_names(bert, tmp_path, ids):
    quantize(bert, tmp_path / "one", bits=4)

    def change(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    rewrite(bert, change)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_are_stored_twice(same, tmp_path):
    """Equal ones are tied, as config.json says; different ones are not, as in from_pretrained."""
    family_model("bert", "MaskedLM").save_pretrained(tmp_path / "dense")

    def change(tensors):
        weight = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = weight.clone() if same else weight + 1

    rewrite(tmp_path / "dense", change)
    in_memory(AutoModelForMaskedLM, tmp_path / "dense", tmp_path / "one", bits=4)
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_only_the_tied_head_is_stored(tmp_path):
    family_model("bert", "MaskedLM").save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "one", bits=4)
    head, embedding = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    rewrite(tmp_path / "dense", lambda tensors: tensors.update({head: tensors.pop(embedding)}))
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_many_files_hold_the_same_tensors(sharded, tmp_path):
    source, options = sharded
    in_memory(AutoModel, source, tmp_path / "one", bits=4)
    quantize(source, tmp_path / "two", **options)
    files = sorted(tmp_path.glob("two/*.safetensors"))
    assert len(files) > 8
    assert max(file.stat().st_size for file in files[1:]) < 300_000
    expected = load_file(tmp_path / "one/model.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    ids = torch.arange(12)[None]
    for load in (kmq.load, AutoModel.from_pretrained):
        assert torch.equal(load(tmp_path / "two")(ids).pooler_output, kmq.load(tmp_path / "one")(ids).pooler_output)


def test_shards_are_filled_in_the_order_of_layers(sharded):
    source, options = sharded
    plan = make_plan(source, kmq.KMQConfig(), shard_bytes=options["shard_bytes"])
    layers = [int(unit.name.split(".")[2]) for unit in plan.units if unit.name.startswith("encoder.layer")]
    assert layers == sorted(layers)
    for unit in plan.units:
        assert len({shard.name for shard in plan.shards for other in shard.units if other is unit}) == 1
