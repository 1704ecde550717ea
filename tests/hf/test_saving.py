"""What save_pretrained writes of a packed model that was changed, or given other values, since it was quantized."""

import copy

import pytest
import torch
import transformers
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule


def packed_bert():
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    return model


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_a_state_dict_that_is_given_is_what_is_saved(shard, tmp_path):
    """An average of weights, say; transformers would save the model's own values."""
    model = packed_bert()
    given = {name: 2 * t if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given, max_shard_size=shard)
    found = kmq.load(tmp_path).state_dict()
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert not torch.equal(found["classifier.weight"], model.classifier.weight)


def test_a_configuration_that_was_exchanged_still_says_quantized(tmp_path, ids):
    model = packed_bert()
    model.config = copy.deepcopy(family_model("bert").config)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_layers_that_were_replaced_or_dropped_are_saved_as_they_are(tmp_path, ids):
    model = packed_bert()
    model.bert.pooler.dense = torch.nn.Linear(32, 32)
    kmq.dequantize_(model.bert.encoder.layer[1])
    model.bert.encoder.layer = model.bert.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    again = kmq.load(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert isinstance(again.bert.embeddings.word_embeddings, CodebookModule)
    assert not any(isinstance(module, CodebookModule) for module in again.bert.encoder.modules())


def test_rows_of_a_loaded_embedding_are_not_made_anew(tmp_path):
    """Chinese-CLIP zeroes the row of its padding through a view of the weight, whenever something else is initialized."""
    text = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config={**vision, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.ChineseCLIPModel(config).eval()
    with pytest.warns(UserWarning, match="of the matrix weights stay"):
        kmq.quantize_(model, kmq.KMQConfig(bits=3))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
