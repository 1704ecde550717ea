"""Layers that others know by another way than the model's modules, where a codebook would not be found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

ELSEWHERE = "of a module that sentence-transformers reads by itself"
HELD = "held, or its weight, by a list, a dict or an attribute, too, which would go on with it"

_OF_EVERY_MODULE = set(vars(nn.Module()))
# They hold what they were built on; quantize_ says what they do with it.
REDUCERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def read_elsewhere(model: nn.Module) -> set[str]:
    """Names of the layers in modules of sentence-transformers that are no transformers model, such as Dense.

    Each module of a SentenceTransformer is saved in a folder of its own. That of a transformers model is read with
    from_pretrained, which knows codebooks; the others are read into plain layers.
    """
    found: set[str] = set()
    if "sentence_transformers" not in sys.modules:
        return found
    library = sys.modules.get("transformers.modeling_utils")
    inside: dict[str, bool] = {}
    for name, module in model.named_modules():
        above = inside.get(name.rpartition(".")[0], False) if name else False
        if library is not None and isinstance(module, library.PreTrainedModel):
            inside[name] = False
        elif f"{type(module).__module__}.".startswith("sentence_transformers."):
            inside[name] = True
        else:
            inside[name] = above
        if inside[name]:
            found.add(name)
    return found


def held_elsewhere(model: nn.Module) -> set[str]:
    """Names of the modules that some module of the model reaches other than as its child: itself, its forward or its weight."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for one in (module, module._parameters.get("weight")):
            if one is not None and name:
                names.setdefault(id(one), []).append(name)
    found: set[str] = set()
    for module in model.modules():
        if type(module).__name__ in REDUCERS:
            continue
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                for one in _reached(value):
                    found.update(names.get(id(one), ()))
    return found


def _reached(value: Any, depth: int = 0) -> Iterator[Any]:
    """The modules and parameters in a value: itself, the owner of a method, members of lists and dicts."""
    owner = getattr(value, "__self__", value)
    if isinstance(owner, (nn.Module, nn.Parameter)):
        yield owner
    elif isinstance(value, (list, tuple, set, dict)) and depth < 3:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _reached(one, depth + 1)
