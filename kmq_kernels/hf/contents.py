"""What a packed checkpoint holds, layer by layer, beside what a model is made of. The file decides which layers are packed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import CheckpointError, StoredTensor
from ..layers import STORED, CodebookLinear
from ..quantization import KMQConfig, plan
from .classes import config_content, find_class, on_meta
from .names import kept_names

_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Contents:
    """What was found for a model; each of the lists holds sentences.

    packed: bits of the layers that the file holds as codebook and indices, by name. untied: names of tensors that the
    configuration ties to others, but that have values of their own. missing: what a model needs and the file lacks. damaged:
    layers whose stored parts do not belong together. wrong: other tensors of another shape or type. extra: what the model has
    no place for.
    """

    packed: dict[str, int] = dataclasses.field(default_factory=dict)
    untied: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    extra: list[str] = dataclasses.field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """All that makes the file another than the model wrote."""
        return [*self.damaged, *self.missing, *self.wrong, *self.extra]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that config.json names, None where it names none."""
    content = config_content(folder)
    named = content.get("dtype") or content.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def inspect(model: Any, stored: dict[str, StoredTensor], config: KMQConfig, dtype: torch.dtype | None) -> Contents:
    """Compares a model in floating point (on the meta device) with the tensors of a packed checkpoint, by its names.

    dtype: what config.json says the floating-point tensors have.
    """
    found = Contents()
    tensors = model.state_dict(keep_vars=True)
    weights = plan(model, config).weights
    bits_of = {f"{name}.weight": weight.bits for weight in weights for name in weight.modules}
    sizes = {f"{name}.weight": (weight.rows, weight.cols) for weight in weights for name in weight.modules}
    groups: dict[str, list[str]] = {}
    for name, kept in kept_names(model).items():
        groups.setdefault(kept, []).append(name)
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    used = set()
    for kept, names in groups.items():
        there = 0
        for name in (kept, *(other for other in names if other != kept)):
            layer = name.removesuffix(".weight")
            parts = {p: stored[f"{layer}.{p}"] for p in STORED if f"{layer}.{p}" in stored} if name in bits_of else {}
            if name not in stored and not parts:
                continue
            there += 1
            if there > 1:
                found.untied.append(name)
            if name in stored:
                used.add(name)
                _check_plain(found, stored[name], name, tensors[name], dtype)
            if parts:
                used.update(f"{layer}.{part}" for part in parts)
                bits = bits_of[name] or config.bits
                found.packed[layer] = _check_packed(found, layer, parts, sizes[name], bits, config, dtype)
        if not there and not any(pattern.search(n) for pattern in ignored for n in names) and kept not in unsaved:
            layer = kept.removesuffix(".weight")
            lost = f"{layer}.codebook" if any(bits_of.get(name) for name in names) else kept
            found.missing.append(f"{lost} is missing from the checkpoint")
    for name in stored:
        if name not in used and not _is_ignored(model, name):
            found.extra.append(f"{name} is in the checkpoint, and {type(model).__name__} has no place for it")
    return found


def _is_ignored(model: Any, name: str) -> bool:
    patterns = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []),
        r"(^|\.)position_ids$",
        r"rotary_emb\.inv_freq",
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def _floating(found: list[str], tensor: StoredTensor, name: str, dtype: torch.dtype | None) -> None:
    given = tensor.torch_dtype
    if not given.is_floating_point or given.itemsize < 2:
        found.append(f"{name} has the dtype {tensor.dtype}, expected F64, F32, F16 or BF16")
    elif given in _HALVES and dtype in _HALVES and given is not dtype:  # one read as the other is another number
        found.append(f"{name} has the dtype {tensor.dtype}, and config.json says {str(dtype).removeprefix('torch.')}")


def _check_plain(found: Contents, tensor: StoredTensor, name: str, own: torch.Tensor, dtype: torch.dtype | None) -> None:
    if tensor.shape != tuple(own.shape):
        found.wrong.append(f"{name} has shape {tensor.shape}, the configuration asks for {tuple(own.shape)}")
    if own.dtype.is_floating_point:
        _floating(found.wrong, tensor, name, dtype)
    elif tensor.torch_dtype is not own.dtype:
        found.wrong.append(f"{name} has the dtype {tensor.dtype}, expected {str(own.dtype).removeprefix('torch.')}")


def _check_packed(
    found: Contents,
    layer: str,
    parts: dict[str, StoredTensor],
    shape: tuple[int, int],
    bits: int,
    config: KMQConfig,
    dtype: torch.dtype | None,
) -> int:
    """Bits of a layer whose parts belong together: as the configuration says, or as the codebook does."""
    for part, tensor in parts.items():
        whole = {"packed": "U8", "outlier_index": "I32"}.get(part)
        if whole is None:
            _floating(found.damaged, tensor, f"{layer}.{part}", dtype)
        elif tensor.dtype != whole:
            found.damaged.append(f"{layer}.{part} has the dtype {tensor.dtype}, expected {whole}")
    size = parts["codebook"].shape[-1:] if "codebook" in parts else ()
    by_size = {2**b: b for b in range(1, 9)}.get(size[0] if size else 0)
    sentences: list[str] = []
    for tried in (bits, by_size):
        if tried is None:
            continue
        faults = _faults(layer, parts, shape, tried, config)
        if not faults:
            return tried
        sentences = sentences or faults
    found.damaged += sentences
    return bits


def _faults(layer: str, parts: dict[str, StoredTensor], shape: tuple[int, int], bits: int, config: KMQConfig) -> list[str]:
    rows, cols = shape
    options: dict[str, Any] = {"row_scale": config.row_scale, "outliers": config.outlier_count(rows * cols), "device": "meta"}
    expected = CodebookLinear(cols, rows, bits, bias=False, group_rows=config.rows_per_codebook(rows), **options).stored()
    faults = [f"{layer}.{part} is missing from the checkpoint" for part in expected if part not in parts]
    for part, tensor in parts.items():
        if part not in expected:
            faults.append(f"{layer}.{part} is in the checkpoint, and the configuration does not ask for it")
        elif tensor.shape != tuple(expected[part].shape):
            asked = tuple(expected[part].shape)
            faults.append(f"{layer}.{part} has shape {tensor.shape}, the configuration asks for {asked}")
    return faults


def writer(folder: Path, reader: Any) -> Any | None:
    """The model on the meta device that a folder says it was saved from, in floating point; None where its class is not known.

    reader: the model that is being loaded; a class with its name is its class.
    """
    import transformers

    content = {key: value for key, value in config_content(folder).items() if key != "quantization_config"}
    kind = content.get("model_type")
    if isinstance(kind, str) and kind == reader.config.model_type:
        config_class = type(reader.config)
    elif isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
        config_class = transformers.CONFIG_MAPPING[kind]
    else:
        return None
    names = content.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    config = config_class.from_dict(content)
    if name == type(reader).__name__:
        return on_meta(type(reader), config, torch.float32, folder)
    try:
        known = find_class(name, config, folder)
    except CheckpointError:
        return None
    return on_meta(known, config, torch.float32, folder)


def untie(model: Any, names: list[str]) -> None:
    """Gives tensors that the configuration ties to others a place of their own, as from_pretrained does for such a checkpoint."""
    for name in names:
        getattr(model, "all_tied_weights_keys", {}).pop(name, None)
        parent, _, parameter = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, parameter, nn.Parameter(torch.empty_like(getattr(module, parameter))))
