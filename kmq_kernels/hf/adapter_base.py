"""Whether an adapter of PEFT was trained on another model than the packed one that it is loaded on.

An adapter knows its base by name only. Where that is at hand, in a folder or in the hub's cache, its weights are compared with
the decoded ones: those of the base itself, at whatever bits, fine-tuned or not, correlate, those of another model do not. Else
the names are compared, as far as both are ids on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError, StoredTensor, stored_tensors
from ..layers import STORED, CodebookLinear
from .card import base_of, hub_id

LAYERS = 8  # so many are compared
SIMILAR = 0.5  # correlation of weights: about 0.75 and more with what 1 bit leaves of them, 0 with those of another model


def another_base(model: nn.Module, name: str | None, revision: str | None = None) -> str | None:
    """A sentence where an adapter that was trained on the base `name` does not belong to a model with codebook layers; None
    where it does, and where nobody can tell.

    name, revision: as they stand in the adapter's configuration.
    """
    packed = {
        key.replace(".base_layer", ""): module for key, module in model.named_modules() if isinstance(module, CodebookLinear)
    }
    own = str(getattr(model, "name_or_path", "") or "")
    if not packed or not name or name == own:
        return None
    here = f"the packed model {own}" if own else "the packed model"
    told = f"adapter: it was trained on {name}, and {here}"
    found = _correlation(packed, _folder(name, revision))
    if found is not None and found > SIMILAR:
        return None
    if found is not None:
        return f"{told} has other weights (correlation {found:.2f}); it changes them in a way it never learned"
    theirs, ours = hub_id(name), base_of(Path(own)) if (Path(own) / "config.json").is_file() else hub_id(own)
    if theirs is None or ours is None or theirs == ours:
        return None
    return f"{told} was made from {ours}; where these are other weights it changes them in a way it never learned"


def _folder(name: str, revision: str | None) -> Path | None:
    """Where a base is on this machine, without a question to the hub."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if hub_id(name) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def _correlation(packed: dict[str, Any], folder: Path | None) -> float | None:
    """The highest correlation of the weights of a few layers with those that a folder has for them; None where it has none."""
    try:
        stored = {} if folder is None else stored_tensors(folder)
    except (CheckpointError, OSError):
        return None
    highest, count = -math.inf, 0
    for name, module in packed.items():
        for stem in _stems(name, stored):
            weight = _weight(stem, module, stored)
            if weight is None:
                continue
            pair = torch.stack([weight.flatten().double(), module.weight.detach().cpu().flatten().double()])
            highest = max(highest, float(torch.corrcoef(pair)[0, 1].nan_to_num(1.0)))  # NaN: one is constant, which tells nothing
            count += 1
            break
        if count == LAYERS:
            break
    return highest if count else None


def _stems(name: str, stored: dict[str, StoredTensor]) -> Iterator[str]:
    """The names under which a checkpoint may have a layer: with the prefix of a task's model or without."""
    for key in stored:
        stem, _, part = key.rpartition(".")
        if part in ("weight", "codebook") and (stem == name or stem.endswith(f".{name}") or name.endswith(f".{stem}")):
            yield stem


def _weight(stem: str, module: Any, stored: dict[str, StoredTensor]) -> Tensor | None:
    """The weight of a layer in a checkpoint, packed or not, in the shape of `module.weight`; None where it has another."""
    parts = {part: _read(stored[f"{stem}.{part}"]) for part in ("weight", *STORED) if f"{stem}.{part}" in stored}
    if (weight := parts.get("weight")) is None:
        codebook, indices = parts.get("codebook"), parts.get("packed")
        if codebook is None or indices is None or indices.shape[0] != module.rows:
            return None
        values = parts.get("outlier_values")
        layer = CodebookLinear(
            module.cols,
            module.rows,
            codebook.shape[1].bit_length() - 1,
            bias=False,
            group_rows=-(-module.rows // codebook.shape[0]),
            row_scale="row_scale" in parts,
            outliers=0 if values is None else len(values),
        )
        try:
            layer.load_state_dict(parts)
        except RuntimeError:  # other shapes
            return None
        weight = module._shaped(layer.decoded())
    return weight.detach() if weight.shape == module.weight.shape else None


def _read(tensor: StoredTensor) -> Tensor:
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as file:
        found: Tensor = file.get_tensor(tensor.name)
    return found
