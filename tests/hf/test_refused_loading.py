"""The table of docs/refused_loading.md: each row done to a packed folder, and the sentence that it says."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import quantize, rewrite
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels.files import CheckpointError


def edit(folder, name="config.json", **fields):
    content = json.loads((folder / name).read_text())
    content |= {key: value(content[key]) if callable(value) else value for key, value in fields.items()}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def wrong_index(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def lost_norm(folder):
    rewrite(folder, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.weight"))


def more(folder):
    rewrite(folder, lambda tensors: tensors.update({"bert.extra.weight": torch.zeros(3)}))


def widened(folder):
    edit(folder, intermediate_size=64)


def other_type(folder):
    rewrite(folder, lambda t: t.update({"bert.pooler.dense.packed": t["bert.pooler.dense.packed"].to(torch.int16)}))


def own_code(folder):
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})


def other_bits(folder):
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    model.load_state_dict(kmq.load(folder).state_dict())


def sizes(folder):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    load(folder, vocab_size=130, ignore_mismatched_sizes=True)


# The start of a row in the table -> what is done to the folder, and how it is loaded then.
ROWS = {
    "A folder that is not there": (None, lambda folder: kmq.load(folder / "nowhere")),
    "Weights that are pickles only": (pickled, kmq.load),
    "A file that was cut short": (cut, kmq.load),
    "An index that names": (wrong_index, kmq.load),
    "A tensor that is lost": (lost_norm, kmq.load),
    "A tensor that the model has no place for": (more, kmq.load),
    "Another shape": (widened, kmq.load),
    "Another type": (other_type, kmq.load),
    "Packed weights without": (lambda folder: edit(folder, quantization_config=None), kmq.load),
    "A `quantization_config` with": (lambda folder: edit(folder, quantization_config=lambda q: q | {"skip": 5}), kmq.load),
    "An architecture that is no model": (lambda folder: edit(folder, architectures=["AutoTokenizer"]), kmq.load),
    "A config.json that asks": (lambda folder: edit(folder, vocab_size=2**40), kmq.load),
    "Code that": (own_code, kmq.load),
    "`verify=True`": (lambda folder: (folder / "kmq_manifest.json").unlink(), lambda folder: kmq.load(folder, verify=True)),
    '`variant="..."`': (pickled, lambda folder: kmq.load(folder, variant="fp16")),
    "Other sizes": (None, sizes),
    "`load_state_dict`": (None, other_bits),
}


@pytest.fixture(scope="module")
def table():
    """{row: the sentence of its second column}."""
    lines = (Path(__file__).parents[2] / "docs/refused_loading.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    return {what: says for what, says, _ in rows}


@pytest.fixture
def folder(tmp_path):
    family_model("bert").save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed", bits=4)
    return tmp_path / "packed"


@pytest.mark.parametrize("row", ROWS)
def test_is_refused_in_the_words_of_the_table(row, table, folder):
    change, load = ROWS[row]
    (says,) = [says for what, says in table.items() if what.startswith(row)]
    if change is not None:
        change(folder)
    with pytest.raises((CheckpointError, RuntimeError), match=says) as caught:
        load(folder)
    if isinstance(caught.value, CheckpointError):
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def test_every_row_is_done(table):
    assert len(table) == len(ROWS)


@pytest.mark.parametrize("change", [lost_norm, widened, other_type])
def test_plain_from_pretrained_refuses_them_too(change, folder):
    change(folder)
    with pytest.raises(CheckpointError):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_options_of_from_pretrained_are_as_ever(folder, ids):
    load, expected = transformers.AutoModelForSequenceClassification.from_pretrained, kmq.load(folder)
    indices = expected.bert.pooler.dense.packed
    for options in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "sdpa"}):
        assert torch.equal(load(folder, **options)(ids).logits, expected(ids).logits), options
    half = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.bert.pooler.dense.packed, indices)
    torch.testing.assert_close(half(ids).logits.float(), expected(ids).logits, atol=0.02, rtol=0.02)
    again = load(folder, quantization_config=kmq.KMQConfig(bits=2))  # the stored one counts
    assert again.bert.pooler.dense.bits == 4
    assert torch.equal(again(ids).logits, expected(ids).logits)


def test_a_packed_base_model_inside_another_is_refused(folder, tmp_path):
    """Its config.json is that of the outer model, which was never quantized."""
    outer = family_model("bert")
    outer.bert = transformers.AutoModel.from_pretrained(folder)
    outer.save_pretrained(tmp_path / "outer")
    with pytest.raises(CheckpointError, match=r"is a packed weight, and config\.json has no quantization_config"):
        kmq.load(tmp_path / "outer")
    head = transformers.AutoModelForSequenceClassification.from_pretrained(folder)  # instead
    assert type(head.bert.pooler.dense) is kmq.CodebookLinear
