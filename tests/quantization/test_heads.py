"""Classification layers of the families: left in any case, found from the model. What depends on the number of labels is one."""

import collections
import contextlib

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import kmq_kernels as kmq
from kmq_kernels.quantization import classification_layers, plan

TASKS = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")

# What makes a configuration small, by the names that the families have for it.
SMALL = {
    "hidden_size": 16, "d_model": 16, "emb_dim": 16, "n_embd": 16, "dim": 16, "embed_dim": 16, "embedding_size": 16,
    "num_hidden_layers": 1, "num_layers": 1, "n_layer": 1, "n_layers": 1, "encoder_layers": 1, "decoder_layers": 1,
    "num_decoder_layers": 1, "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "intermediate_size": 16, "d_inner": 16, "hidden_dim": 16, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "d_ff": 16, "d_kv": 8,
}  # fmt: skip


def _names(task):
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")


def _model(model_type, class_name, labels, small):
    """A model on the meta device: only names, types and shapes count."""
    config = transformers.AutoConfig.for_model(model_type)
    if small:
        for name, value in SMALL.items():
            if isinstance(getattr(config, name, None), int):
                with contextlib.suppress(NotImplementedError):  # a property
                    setattr(config, name, value)
    config.num_labels = labels
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def _check(model_type, class_name, small):
    """Returns the names of the layers whose shape follows the number of labels; asserts that none of them is quantized."""
    one, other = (_model(model_type, class_name, labels, small) for labels in (7, 11))
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    # LayoutLMv3 has another head for more than ten labels.
    moved = {name.rpartition(".")[0] for name, parameter in one.named_parameters() if shapes.get(name) != parameter.shape}
    # One output a choice, start and end of an answer: whatever the number of labels.
    fixed = 1 if "MultipleChoice" in class_name else 2 if "QuestionAnswering" in class_name else 0
    beside = [(name, m) for name, m in one.named_modules() if not name.startswith(f"{one.base_model_prefix}.")]
    moved |= {name for name, m in beside if isinstance(m, torch.nn.Linear) and m.out_features == fixed}
    quantized = {name for weight in plan(one, kmq.KMQConfig()).quantized for name in weight.modules}
    assert not moved & quantized, (class_name, moved & quantized)
    return moved


NAMED = [
    ("xlnet", "XLNetForSequenceClassification"),
    ("xlnet", "XLNetForTokenClassification"),
    ("xlm", "XLMForSequenceClassification"),
    ("xlm", "XLMForQuestionAnsweringSimple"),
    ("flaubert", "FlaubertForSequenceClassification"),
    ("funnel", "FunnelForTokenClassification"),
    ("bart", "BartForSequenceClassification"),
    ("t5", "T5ForSequenceClassification"),
    ("t5", "T5ForQuestionAnswering"),
    ("bert", "BertForMultipleChoice"),
    ("big_bird", "BigBirdForQuestionAnswering"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("modernbert", "ModernBertForSequenceClassification"),
    ("perceiver", "PerceiverForSequenceClassification"),
    ("layoutlmv3", "LayoutLMv3ForTokenClassification"),
]


@pytest.mark.parametrize(("model_type", "class_name"), NAMED)
def test_a_classification_layer_is_left(model_type, class_name):
    assert _check(model_type, class_name, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_of_every_architecture_that_transformers_builds(task):
    found = collections.Counter()
    for model_type, names in _names(task).items():
        for class_name in [names] if isinstance(names, str) else names:
            try:
                _model(model_type, class_name, 7, True)
                small = True
            except Exception:
                small = False  # sizes that do not go together: as it comes
                try:
                    _model(model_type, class_name, 7, False)
                except Exception as error:
                    found["not built"] += 1
                    print(f"{class_name}: {type(error).__name__}")
                    continue
            found["with a layer that follows the labels" if _check(model_type, class_name, small) else "without"] += 1
    print(task, dict(found))
    assert found["with a layer that follows the labels"] > 0.8 * found.total()


def test_poolers_and_transforms_are_ordinary_layers():
    for model_type, class_name, ordinary in [
        ("deberta-v2", "DebertaV2ForSequenceClassification", "pooler.dense"),
        ("distilbert", "DistilBertForSequenceClassification", "pre_classifier"),
        ("bert", "BertForMaskedLM", "cls.predictions.transform.dense"),
        ("distilbert", "DistilBertForMaskedLM", "vocab_transform"),
        ("electra", "ElectraForMaskedLM", "generator_predictions.dense"),
    ]:
        model = _model(model_type, class_name, 7, True)
        assert ordinary in {weight.name for weight in plan(model, kmq.KMQConfig()).quantized}, class_name


def test_of_a_model_inside_of_others():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = _model("xlnet", "XLNetForSequenceClassification", 7, True)
            self.head = torch.nn.Linear(4, 4)  # of no transformers model: an ordinary layer

    found = classification_layers(Both())
    assert {"first.logits_proj", "first.sequence_summary.summary"} <= found
    assert "head" not in found
    assert not any(name.startswith("first.transformer") for name in found)


def test_the_second_model_of_a_pair_is_no_head():
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    with torch.device("meta"):
        found = classification_layers(transformers.EncoderDecoderModel(pair))
    assert not any(".encoder.layer" in name for name in found)
    assert "decoder.cls.predictions.decoder" in found
