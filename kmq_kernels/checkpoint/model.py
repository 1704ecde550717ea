"""The model that a checkpoint is read into, on the meta device: which class, which stored tensor fills which of its own.

Names, ties, classes and renamings are those of transformers, as from_pretrained uses them; no weight is read but to compare
tied ones that are stored twice. Building a model takes 150 MB and a second: plan.py has a process for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import CheckpointError, StoredTensor, open_regular
from ..hf import base_classes, check_sizes, config_content, find_class, kept_names, match, model_config, on_meta
from ..quantization import KMQConfig

_CHUNK = 8 << 20


def _classes(source: Path, config: Any, model_class: str | None) -> list[Any]:
    names = [model_class] if model_class else list(config.architectures or [])[:1]
    found = [find_class(name, config, source) for name in names]
    if model_class is None:
        found += [known for known in base_classes(config) if known not in found]
    if not found:
        raise CheckpointError(f"{source}: config.json names no architecture, and transformers has no base model for it")
    return found


def build_model(
    source: Path, stored: dict[str, StoredTensor], model_class: str | None, dtype: torch.dtype
) -> tuple[Any, dict[str, StoredTensor], list[str]]:
    """The model on the meta device, the stored tensor of each of its tensors (by the name that is kept), and what is left out.

    The first class that the checkpoint fills is taken: a folder whose config.json names a masked language model, but which
    holds only the encoder, is an encoder.
    """
    content = config_content(source)
    check_sizes(source, content, stored)
    if content.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: it is quantized already; start from the model in floating point")
    missing: list[str] = []
    config = model_config(source)
    for known in _classes(source, config, model_class):
        model = on_meta(known, config, dtype, source)
        named, left_out = _named(model, stored)
        _untie(model, named)
        kept = kept_names(model)
        sources: dict[str, StoredTensor] = {}
        for name, tensor in named.items():  # of tied tensors that are both there, the one that is kept counts
            if name == kept[name] or kept[name] not in named:
                sources.setdefault(kept[name], tensor)
        absent = [name for name, _ in model.named_parameters(remove_duplicate=False) if kept[name] not in sources]
        if not absent:
            return model, sources, left_out
        missing = missing or [known.__name__, *absent]
    count = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
    raise CheckpointError(
        f"{source}: {missing[0]} needs {missing[1]}{count}, which the checkpoint does not hold; --model-class names another class"
    )


def _named(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensor, or the part of one, for each name of the model, and the names that no tensor of it has."""
    found = match(model, stored)
    named: dict[str, StoredTensor] = {}
    for name, (first, *others) in found.named.items():
        if others:
            doubled = f"{first.name} and {others[0].name} are both {name} of {type(model).__name__}"
            raise CheckpointError(f"{others[0].file}: {doubled}")
        named[name] = first
    tensors = model.state_dict()
    pieces: dict[str, list[str]] = {}  # names that one stored tensor fills, in the order of its rows
    for name, (sources, converter) in found.joined.items():
        splits = [type(operation).__name__ for operation in converter.operations] in (["Chunk"], ["Split"])
        if len(sources) > 1 or not splits or converter.operations[0].dim != 0 or name not in tensors:
            raise CheckpointError(
                f"{sources[0].file}: transformers joins or splits {sources[0].name} while loading {type(model).__name__}; save"
                " the model again with save_pretrained(save_original_format=False) first"
            )
        pieces.setdefault(sources[0].name, []).append(name)
    for stored_name, names in pieces.items():
        named.update(_rows(stored[stored_name], {name: tensors[name].shape[0] for name in names}))
    return named, found.left_out


def _rows(tensor: StoredTensor, rows: dict[str, int]) -> dict[str, StoredTensor]:
    """A stored tensor as several, one after the other, with so many rows each: they lie in the file like that."""
    if not tensor.shape or tensor.shape[0] != sum(rows.values()):
        needed = " + ".join(map(str, rows.values()))
        raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {needed} rows")
    found = {}
    first = 0
    for name, count in rows.items():
        found[name] = tensor.rows(first, first + count)
        first += count
    return found


def _untie(model: Any, named: dict[str, StoredTensor]) -> None:
    """As from_pretrained: weights that config.json ties, but the checkpoint holds twice and differently, are not tied."""
    for target, other in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target in named and other in named and not _same_content(named[target], named[other]):
            model.all_tied_weights_keys.pop(target)
            parent, _, parameter = target.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, parameter, nn.Parameter(torch.empty_like(getattr(module, parameter))))


def _same_content(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_regular(one.file) as a, open_regular(other.file) as b:
        for at in range(0, one.nbytes, _CHUNK):
            count = min(_CHUNK, one.nbytes - at)
            if os.pread(a.fileno(), count, one.begin + at) != os.pread(b.fileno(), count, other.begin + at):
                return False
    return True


def config_json(model: Any, resolved: KMQConfig, dtype: torch.dtype) -> str:
    """config.json as save_pretrained would write it after quantize_."""
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = resolved
    return config.to_json_string()
