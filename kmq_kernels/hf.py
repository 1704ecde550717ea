"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; kmq.load checks first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from .config import QUANT_METHOD, KMQConfig
from .modules import CodebookModule
from .quantize import dequantize_, quantize_, swap_empty

register_quantization_config(QUANT_METHOD)(KMQConfig)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason in one sentence."""


@register_quantizer(QUANT_METHOD)
class KMQQuantizer(HfQuantizer):
    """Hooks of from_pretrained: swap modules before a packed checkpoint is loaded, cluster after a plain one is."""

    quantization_config: KMQConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            modules = swap_empty(model, self.quantization_config)
            if files := kwargs.get("checkpoint_files"):
                _check_tensors(modules, [Path(file) for file in files], model.base_model_prefix)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self.quantization_config = quantize_(model, self.quantization_config)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return dequantize_(model).to(dtype or model.dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        """A packed model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codebooks, biases and all that is not quantized train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks for this one, too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have fakes; a quantized module compiles without a graph break."""
        return True


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in safetensors files; a damaged file is named."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(_shapes_of(file))
    return shapes


def _shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error})") from None


def _check_tensors(modules: dict[str, CodebookModule], files: list[Path], prefix: str) -> None:
    """Every codebook and index tensor of the model is in the checkpoint, in the right shape: none would be left random."""
    if any(file.suffix != ".safetensors" for file in files):
        raise CheckpointError(f"{files[0]}: a quantized checkpoint is read from safetensors only")
    shapes = _shapes(files)
    expected: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, module in modules.items():  # tied modules: one name in the file is enough
        for parameter in ("codebook", "packed"):
            tensor = getattr(module, parameter)
            expected.setdefault(id(tensor), []).append((f"{name}.{parameter}", tuple(tensor.shape)))
    for names in expected.values():
        for name, shape in names:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            found = next((shapes[key] for key in candidates if key in shapes), None)
            if found is not None and found != shape:
                raise CheckpointError(f"{files[0].parent}: {name} has shape {found}, the configuration asks for {shape}")
            if found is not None:
                break
        else:
            raise CheckpointError(f"{files[0].parent}: {names[0][0]} is missing from the checkpoint")


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where it has one; raises CheckpointError where one is missing."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such model folder")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: the folder has no config.json")
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{path}: the folder has no weights (model.safetensors or model.safetensors.index.json)")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from None
    files = [path / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file in this folder")
        if not file.is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there")
    if unplaced := sorted(set(weight_map) - set(_shapes(files))):
        raise CheckpointError(f"{index}: names {unplaced[0]}, which none of its files holds")
    return files


def load(path: str | Path, **kwargs: Any) -> Any:
    """Loads a model folder, quantized or not, with the class its config.json names; kwargs go to from_pretrained.

    Importing this package is what lets transformers read packed checkpoints; loading through here makes sure it was imported,
    and checks that the files are complete before anything is built. Raises CheckpointError with a sentence otherwise.
    """
    path = Path(path)
    _shapes(checkpoint_files(path))
    config = transformers.AutoConfig.from_pretrained(path)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model_class is None:
        raise CheckpointError(f"{path}: transformers has no model class {names[0]}")
    return model_class.from_pretrained(path, **kwargs)
