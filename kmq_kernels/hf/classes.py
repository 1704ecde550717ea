"""The class that a model folder names, and a model of it on the meta device: nothing is read but config.json."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files import CheckpointError, StoredTensor, one_line, read_json

# Fields of config.json that say how often modules repeat, and those that say how large something is.
_REPEATED = re.compile(r"layers?$|hidden_groups?$|group_num$|blocks?$")
_EXPERTS = re.compile(r"experts?$")  # repeated, too, but one tensor can hold all of a layer, or a small model have none
_MOST_EXPERTS = 4096  # that are built without a tensor to show for them
_SIZES = re.compile(r"size|dim|hidden|position|embeddings|vocab|labels")


def config_content(folder: Path) -> dict[str, Any]:
    """The content of config.json; raises CheckpointError where it is no table."""
    content = read_json(folder / "config.json")
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not the configuration of a model")
    return content


def check_sizes(folder: Path, content: Any, stored: dict[str, StoredTensor], depth: int = 0) -> None:
    """A config.json that asks for far more than the checkpoint holds is refused before anything is built from it."""
    if not isinstance(content, dict) or depth > 4:
        return
    weights = sum(8 * t.nbytes if t.name.endswith(".packed") else math.prod(t.shape) for t in stored.values())
    for name, value in content.items():
        check_sizes(folder, value, stored, depth + 1)
        if type(value) is not int:
            continue
        if _REPEATED.search(name) and value > max(len(stored), 64):
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value}, the checkpoint has {len(stored)} tensors")
        if _EXPERTS.search(name) and value > max(len(stored), _MOST_EXPERTS):
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value}, expected at most {_MOST_EXPERTS}")
        if _SIZES.search(name) and value > max(weights, 1 << 20):
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {value}, the checkpoint has {weights} weights")


def model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it; raises CheckpointError with a sentence where it cannot."""
    content = config_content(folder)
    own_code = isinstance(content.get("auto_map"), dict) and "AutoConfig" in content["auto_map"]
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a stranger's config.json can fail anywhere in there
        if own_code and not trust_remote_code and not _known(content.get("model_type")):
            sentence = "it brings code of its own, which is not run; where you trust it, pass trust_remote_code=True"
            raise CheckpointError(f"{folder}: {sentence}") from None
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it ({one_line(error)})") from None


def _known(model_type: Any) -> bool:
    return isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING


def find_class(name: Any, config: Any, folder: Path) -> Any:
    """The model class of that name, of transformers or registered with its Auto classes, for a model with this configuration.

    Raises CheckpointError where there is none.
    """
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    for known in (found, *_registered(name)):
        if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
            continue
        if known is transformers.PreTrainedModel:
            continue
        expected = known.config_class
        if expected is not None and not isinstance(config, expected) and auto_class(known, config) is None:
            sentence = f"config.json names the class {name}, which has no model_type {config.model_type!r}"
            raise CheckpointError(f"{folder}: {sentence}")
        return known
    raise CheckpointError(f"{folder}: transformers has no model class {name}")


def _auto_classes() -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = [auto for auto in vars(modeling_auto).values() if isinstance(auto, type)]
    return [auto for auto in found if getattr(auto, "_model_mapping", None) is not None]


def _each(known: Any) -> list[Any]:
    return list(known) if isinstance(known, (tuple, list)) else [known]


def _registered(name: Any) -> list[Any]:
    """Classes of that name that somebody has registered with the Auto classes."""
    extra = [known for auto in _auto_classes() for known in getattr(auto._model_mapping, "_extra_content", {}).values()]
    return [one for known in extra for one in _each(known) if one.__name__ == name]


def auto_class(model_class: Any, config: Any) -> Any:
    """The Auto class that has this model class for a configuration, as for families with classes of others; None without one."""
    for auto in _auto_classes():
        if any(known is model_class for known in _each(auto._model_mapping.get(type(config), None))):
            return auto
    return None


def base_classes(config: Any) -> list[Any]:
    """The class, or classes, of the base model for a configuration."""
    return [known for known in _each(transformers.AutoModel._model_mapping.get(type(config), None)) if known is not None]


def on_meta(model_class: Any, config: Any, dtype: torch.dtype, folder: Path) -> Any:
    """A model of a class on the meta device; raises CheckpointError where the configuration does not describe one."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:
        described = f"config.json does not describe a {model_class.__name__} ({one_line(error)})"
        raise CheckpointError(f"{folder}: {described}") from None
    finally:
        torch.set_default_dtype(default)


def model_dtype(folder: Path, stored: dict[str, StoredTensor]) -> torch.dtype:
    """As from_pretrained decides: config.json, else the first floating-point tensor."""
    content = config_content(folder)
    named = content.get("dtype") or content.get("torch_dtype")
    if named is not None:
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"{folder / 'config.json'}: dtype {named!r} is not one a model can have")
        return dtype
    floating = (t.torch_dtype for t in stored.values() if t.torch_dtype.is_floating_point and t.torch_dtype.itemsize > 1)
    return next(floating, torch.float32)
