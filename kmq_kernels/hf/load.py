"""load: a model folder, quantized or not, checked before anything is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers

from ..files import MANIFEST, CheckpointError, StoredTensor, one_line, stored_tensors, verify_files, weight_files
from ..quantization import QUANT_METHOD, KMQConfig
from .classes import auto_class, base_classes, check_sizes, config_content, find_class, model_config, model_dtype, on_meta
from .contents import inspect, stored_dtype
from .names import kept_names, match


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder; raises CheckpointError where one is missing or damaged or the index is wrong."""
    stored_tensors(path)
    return weight_files(path)


def load(path: str | Path, *, verify: bool = False, **kwargs: Any) -> Any:
    """Loads a model folder, quantized or not, with the class its config.json names; kwargs go to from_pretrained.

    Importing this package is what lets transformers read packed checkpoints; loading through here makes sure it was imported,
    and checks that the folder is complete before anything is built: every tensor that the class needs is there, in the shape
    and kind that config.json asks for. A folder in floating point that holds nothing but the base model of that class is loaded
    as the base model. verify: compare every file with the checksums in the folder's manifest first (`kmq quantize` writes one).
    trust_remote_code: run the code that a folder brings, as in from_pretrained. Raises CheckpointError with a sentence otherwise.
    """
    folder = Path(path)
    stored = stored_tensors(folder)
    if verify:
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder}: it has no {MANIFEST}, so there are no checksums to verify")
        verify_files(folder)
    trusted = kwargs.get("trust_remote_code") is True
    config = model_config(folder, trust_remote_code=trusted)
    model_class = _fitting_class(folder, config, stored, trusted)
    if not isinstance(config, getattr(model_class, "config_class", None) or object):  # it would read config.json as another
        model_class = auto_class(model_class, config)
    with_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:
        if kwargs:  # it can be theirs
            raise
        name = model_class.__name__
        raise CheckpointError(f"{folder}: {name} cannot be loaded from it ({one_line(error)})") from error
    if info["missing_keys"] and not set(kwargs) - {"trust_remote_code"}:
        raise CheckpointError(f"{folder}: {sorted(info['missing_keys'])[0]} is missing from the checkpoint")
    return (model, info) if with_info else model


def _fitting_class(folder: Path, config: Any, stored: dict[str, StoredTensor], trusted: bool) -> Any:
    """The class to load a folder with; raises CheckpointError where the folder does not hold all that it needs."""
    content = config_content(folder)
    check_sizes(folder, content, stored)
    quantization = _quantization(folder, content, stored)
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{folder / 'config.json'}: architectures: expected a list of names, got {names!r}")
    if trusted and names and (own := _own_code(content, names[0])):
        return own
    dtype = model_dtype(folder, stored)
    candidates = [find_class(names[0], config, folder)] if names else base_classes(config)
    if not candidates:
        raise CheckpointError(f"{folder}: config.json names no architecture, and transformers has no base model for it")
    if isinstance(quantization, KMQConfig):
        contents = inspect(on_meta(candidates[0], config, dtype, folder), stored, quantization, stored_dtype(folder))
        if contents.faults:
            raise CheckpointError(f"{folder}: {contents.faults[0]}")
        return candidates[0]
    if quantization is not None:  # another package's: what its file has to hold is for its own hooks to say
        return candidates[0]
    sentences = []
    for known in dict.fromkeys([*candidates, *base_classes(config)]):
        sentence = absent(on_meta(known, config, dtype, folder), stored)
        if sentence is None:
            return known
        sentences.append(f"{folder}: {known.__name__} needs {sentence}")
    raise CheckpointError(sentences[0])


def _quantization(folder: Path, content: dict[str, Any], stored: dict[str, StoredTensor]) -> Any:
    """How a folder says it is quantized: our configuration, that of another package as it stands, or None."""
    stated = content.get("quantization_config")
    packed = next((n for n in stored if n.endswith(".packed") and f"{n.removesuffix('packed')}codebook" in stored), None)
    if stated is not None and not isinstance(stated, dict):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config: expected a table, got {stated!r}")
    if stated is None or stated.get("quant_method") != QUANT_METHOD:
        if packed is not None:
            raise CheckpointError(
                f"{folder}: {packed} is a packed weight, and config.json has no quantization_config of {QUANT_METHOD}"
            )
        return stated
    try:
        return KMQConfig.from_dict(stated)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config: {one_line(error)}") from None


def _own_code(content: dict[str, Any], name: str) -> Any:
    """The Auto class through which a folder's own code has the class `name`."""
    entries = content.get("auto_map")
    for auto, reference in entries.items() if isinstance(entries, dict) else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name and isinstance(auto, str):
            return getattr(transformers, auto, None)
    return None


def absent(model: Any, stored: dict[str, StoredTensor]) -> str | None:
    """What of a model (on the meta device) a checkpoint in floating point does not hold, in words; None where it holds all."""
    found = match(model, stored)
    kept = kept_names(model)
    there = {kept[name] for name in (*found.named, *found.joined) if name in kept}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    lost = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if kept[name] not in there and not any(pattern.search(name) for pattern in ignored)
    ]
    if not lost:
        return None
    count = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{lost[0]}{count}, which the checkpoint does not hold"
