"""The classification layers of a model: by what only the task's class has beside the base model, and by name."""

from __future__ import annotations

from torch import nn

from .config import name_matches

# Where the base model is not a module of its own (T5ForQuestionAnswering), or the layer is inside of it, names tell.
HEADS = (
    "classifier",  # BERT, ALBERT, DistilBERT, DeBERTa; with its dense and out_proj in RoBERTa, ELECTRA, MPNet
    "classification_head",  # BART, T5
    "score",
    "qa_outputs",
    "qa_classifier",  # BigBird
    "sop_classifier",  # ALBERT
    r"cls\.seq_relationship",  # BERT
    r"(?:cls\.)?predictions\.decoder",  # BERT, ALBERT
    r"lm_head\.decoder",  # RoBERTa, MPNet
    "vocab_projector",  # DistilBERT
    "generator_lm_head",  # ELECTRA
    r"discriminator_predictions\.dense_prediction",  # ELECTRA
    "lm_head",
    "logits_proj",  # XLNet
    r"decoder\.final_layer",  # Perceiver
)

# Beside the base model, too, but ordinary layers: they map features to features and come with the pretrained weights, or are as
# large as a layer of the model.
ORDINARY = (
    "pooler",  # DeBERTa
    "pre_classifier",  # DistilBERT
    r"(?:cls\.)?predictions\.(?:transform|dense)",  # BERT, ALBERT
    "vocab_transform",  # DistilBERT
    r"generator_predictions\.dense",  # ELECTRA
    r"discriminator_predictions\.dense",  # ELECTRA
)


def classification_layers(model: nn.Module) -> set[str]:
    """Names of all modules that are, or are inside of, a classification layer of a transformers model anywhere in `model`."""
    found = {name for name, _ in model.named_modules(remove_duplicate=False) if _matches(HEADS, name)}
    models = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_model(module)}
    for at, task in models.items():
        base = getattr(task, task.base_model_prefix, None)  # type: ignore[arg-type]  # mypy takes it for a module
        if not isinstance(base, nn.Module) or base is task:
            continue
        for name, child in task.named_children():
            # What holds another transformers model is no head: a second tower, the decoder of a pair.
            if child is base or any(_is_model(module) for module in child.modules()):
                continue
            for inner, _ in child.named_modules(prefix=f"{at}.{name}" if at else name, remove_duplicate=False):
                if not _matches(ORDINARY, inner):
                    found.add(inner)
    return found


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(name_matches(pattern, name) for pattern in patterns)


def _is_model(module: nn.Module) -> bool:
    """Whether it is a model of transformers, which is not imported for that."""
    return isinstance(getattr(type(module), "base_model_prefix", None), str) and hasattr(module, "config")
