"""What a folder is loaded as, by kmq.load and by the Auto classes, and models that were saved from inside of something else."""

import json

import pytest
import torch
import transformers
from checkpoints import quantize
from conftest import family_model
from torch import nn

import kmq_kernels as kmq


def without_architectures(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_folder_is_loaded_as_what_it_holds(packed, tmp_path):
    def saved(head):
        model = family_model("bert", head) if head else family_model("bert").bert
        model.save_pretrained(tmp_path / f"{head}-plain")
        if packed:
            quantize(tmp_path / f"{head}-plain", tmp_path / f"{head}", bits=4)
        return tmp_path / (str(head) if packed else f"{head}-plain")

    for head in ("SequenceClassification", "MaskedLM", "TokenClassification", None):
        folder = saved(head)
        name = f"BertFor{head}" if head else "BertModel"
        assert type(kmq.load(folder)).__name__ == name
        assert type(transformers.AutoModel.from_pretrained(folder)).__name__ == "BertModel"
        auto = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert isinstance(auto.bert.pooler.dense, kmq.CodebookLinear) == (packed and head in ("SequenceClassification", None))
        assert isinstance(auto.bert.encoder.layer[0].output.dense, kmq.CodebookLinear) == packed
    without_architectures(folder)
    assert type(kmq.load(folder)).__name__ == "BertModel"


WRAPPED = {
    "own": lambda model: type("Own", (nn.Module,), {})(),
    "Sequential": nn.Sequential,
    "ModuleDict": lambda model: nn.ModuleDict({"encoder": model}),
    "ModuleList": lambda model: nn.ModuleList([nn.ModuleList([model])]),
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_model_inside_of_something_else_is_saved_as_quantized(how, tmp_path, ids):
    model = family_model("bert")
    wrapper = WRAPPED[how](model)
    if how == "own":
        wrapper.inner = model
    kmq.quantize_(wrapper, kmq.KMQConfig(bits=3, skip=["pooler"]))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(again.bert.pooler.dense) is nn.Linear
    assert type(again.bert.encoder.layer[0].output.dense) is kmq.CodebookLinear
