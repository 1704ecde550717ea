"""Which tensor of a file fills which of a model: transformers' own renamings, prefixes and ties, without reading a weight."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..files import StoredTensor
from ..layers import STORED
from ..quantization import KMQConfig, plan


class Matched(NamedTuple):
    """What a checkpoint holds for a model.

    named: the stored tensor for each name of the model. joined: for names whose tensor transformers makes while loading, out of
    a part of a stored one or of several: the stored ones and the converter. left_out: stored names that the model has not.
    """

    named: dict[str, list[StoredTensor]]
    joined: dict[str, tuple[list[StoredTensor], Any]]
    left_out: list[str]


def match(model: Any, stored: dict[str, StoredTensor]) -> Matched:
    """Matches a checkpoint in floating point with a model (on the meta device), as from_pretrained does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = model.state_dict()
    found = Matched({}, {}, [])
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    for key, tensor in sorted(stored.items()):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        if name not in names:
            if not any(entry.search(key) for entry in ignored) and not key.endswith("embeddings.position_ids"):
                found.left_out.append(key)
        elif pattern is None:
            found.named.setdefault(name, []).append(tensor)
        else:
            first, *_ = patterns = by_pattern[pattern].target_patterns
            for target in (name.replace(first, other) for other in patterns):
                found.joined.setdefault(target, ([], by_pattern[pattern]))[0].append(tensor)
    return found


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


def own_names(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of a packed checkpoint by the names of a model of any class that can read it, and whether this takes renamings.

    A packed checkpoint has the names of the modules of the model that was saved. Another class has them below a prefix more or
    less, or under those that transformers' renamings lead to. What the model does not have is left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    names = dict.fromkeys([*model.state_dict(), *(f"{n}.{part}" for n in layer_names(model) for part in STORED)], True)
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    plain = {key: rename_source_key(key, [], [], model.base_model_prefix, names)[0] for key in stored}
    renamed = {key: rename_source_key(key, renamings, [], model.base_model_prefix, names)[0] for key in stored}
    needed = any(plain[key] not in names and renamed[key] in names for key in stored)
    found = {}
    for key, tensor in stored.items():
        name = renamed[key] if needed and renamed[key] in names else plain[key]
        if name in names:
            found[name] = tensor
    return found, needed


def layer_names(model: Any) -> list[str]:
    """Names of all layers that can be quantized."""
    return [name for weight in plan(model, KMQConfig()).weights for name in weight.modules]
