"""The model that a checkpoint is read into, on the meta device: which class, which stored tensor fills which of its own.

Names, ties, classes and renamings are those of transformers, as from_pretrained uses them; no weight is read but to compare
tied ones that are stored twice. Importing this module takes 150 MB and a second: plan.py has a process for it.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..files import CheckpointError, StoredTensor, one_line, open_regular, read_json
from ..quantization import KMQConfig

_CHUNK = 8 << 20


def _model_config(source: Path) -> Any:
    content = read_json(source / "config.json")
    if not isinstance(content, dict):
        raise CheckpointError(f"{source / 'config.json'}: not the configuration of a model")
    if content.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: it is quantized already; start from the model in floating point")
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's config.json can fail anywhere in there
        raise CheckpointError(f"{source / 'config.json'}: transformers cannot read it ({one_line(error)})") from None


def model_dtype(source: Path, stored: dict[str, StoredTensor]) -> torch.dtype:
    """As from_pretrained decides: config.json, else the first floating-point tensor."""
    content = read_json(source / "config.json")
    named = None
    if isinstance(content, dict):
        named = content.get("dtype") or content.get("torch_dtype")
    if named is not None:
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"{source / 'config.json'}: dtype {named!r} is not one a model can have")
        return dtype
    floating = (t.torch_dtype for t in stored.values() if t.torch_dtype.is_floating_point and t.torch_dtype.itemsize > 1)
    return next(floating, torch.float32)


# Fields of config.json that say how often modules repeat, and those that say how large something is.
_REPEATED = re.compile(r"layers?$|_groups?(_num)?$|blocks?$|experts?$")
_SIZES = re.compile(r"size|dim|hidden|position|embeddings|vocab|labels")


def _check_config(source: Path, content: Any, stored: dict[str, StoredTensor], depth: int = 0) -> None:
    """A config.json that asks for far more than the checkpoint holds is refused before anything is built from it."""
    if not isinstance(content, dict) or depth > 4:
        return
    weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    for name, value in content.items():
        _check_config(source, value, stored, depth + 1)
        if type(value) is not int:
            continue
        if _REPEATED.search(name) and value > max(len(stored), 64):
            raise CheckpointError(f"{source / 'config.json'}: {name} is {value}, the checkpoint has {len(stored)} tensors")
        if _SIZES.search(name) and value > max(weights, 1 << 20):
            raise CheckpointError(f"{source / 'config.json'}: {name} is {value}, the checkpoint has {weights} weights")


def _classes(config: Any, model_class: str | None, source: Path) -> list[Any]:
    names = [model_class] if model_class else list(config.architectures or [])[:1]
    found = []
    for name in names:
        known = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
            raise CheckpointError(f"{source}: transformers has no model class {name}")
        found.append(known)
    if model_class is None:
        base = transformers.AutoModel._model_mapping.get(type(config), None)
        for known in base if isinstance(base, (tuple, list)) else [base]:
            if known is not None and known not in found:
                found.append(known)
    if not found:
        raise CheckpointError(f"{source}: config.json names no architecture, and transformers has no base model for it")
    return found


def _on_meta(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(default)


def build_model(
    source: Path, stored: dict[str, StoredTensor], model_class: str | None, dtype: torch.dtype
) -> tuple[Any, dict[str, StoredTensor], list[str]]:
    """The model on the meta device, the stored tensor of each of its tensors (by the name that is kept), and what is left out.

    The first class that the checkpoint fills is taken: a folder whose config.json names a masked language model, but which
    holds only the encoder, is an encoder.
    """
    _check_config(source, read_json(source / "config.json"), stored)
    missing: list[str] = []
    for known in _classes(config := _model_config(source), model_class, source):
        try:
            model = _on_meta(known, config, dtype)
        except Exception as error:
            raise CheckpointError(f"{source}: config.json does not describe a {known.__name__} ({one_line(error)})") from None
        named, left_out = _match(model, stored)
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


def _match(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensor for each name of the model, by transformers' own renaming, and the names that no tensor of it has."""
    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    names = model.state_dict()
    found: dict[str, StoredTensor] = {}
    left_out = []
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    for key, tensor in sorted(stored.items()):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        if name not in names:
            if not any(entry.search(key) for entry in ignored) and not key.endswith("embeddings.position_ids"):
                left_out.append(key)
            continue
        if pattern is not None:
            raise CheckpointError(
                f"{tensor.file}: transformers joins or splits {key} while loading {type(model).__name__}; save the model again"
                " with save_pretrained(save_original_format=False) first"
            )
        if name in found:
            raise CheckpointError(f"{tensor.file}: {found[name].name} and {key} are both {name} of {type(model).__name__}")
        found[name] = tensor
    return found, left_out


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


def kept_names(model: Any) -> dict[str, str]:
    """For each tensor of the model, the name under which save_pretrained keeps it: of tied tensors, one that is not a target."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    for target, source in tied.items():
        if target not in tensors or source not in tensors:
            continue
        into, group = groups[id(tensors[source])], groups[id(tensors[target])]
        if into is not group:
            into.extend(group)
            for name in group:
                groups[id(tensors[name])] = into
    kept = {}
    for group in groups.values():
        free = [name for name in sorted(group) if name not in tied]
        name = free[0] if free else sorted(group)[-1]
        kept.update(dict.fromkeys(group, name))
    return kept


def config_json(model: Any, resolved: KMQConfig, dtype: torch.dtype) -> str:
    """config.json as save_pretrained would write it after quantize_."""
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = resolved
    return config.to_json_string()
