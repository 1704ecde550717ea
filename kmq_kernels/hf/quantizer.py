"""KMQQuantizer, the hooks of from_pretrained, in transformers' registry: importing this module puts it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..files import CheckpointError, read_header
from ..layers import CodebookModule
from ..quantization import QUANT_METHOD, KMQConfig, dequantize_, quantize_, swap_empty

register_quantization_config(QUANT_METHOD)(KMQConfig)


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


def _check_tensors(modules: dict[str, CodebookModule], files: list[Path], prefix: str) -> None:
    """Every stored part of a quantized weight is in the checkpoint, in the right shape: none would be left random."""
    if any(file.suffix != ".safetensors" for file in files):
        raise CheckpointError(f"{files[0]}: a quantized checkpoint is read from safetensors only")
    shapes = {name: tensor.shape for file in files for name, tensor in read_header(file).items()}
    expected: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, module in modules.items():  # tied modules: one name in the file is enough
        for parameter, tensor in module.stored().items():
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
