"""KMQQuantizer, the hooks of from_pretrained, in transformers' registry: importing this module puts it there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..files import CheckpointError, StoredTensor, read_header
from ..layers import CodebookModule
from ..quantization import (
    QUANT_METHOD,
    KMQConfig,
    dequantize_,
    described,
    join_indices,
    mark_quantized,
    part_indices,
    plan,
    quantize_,
    swap,
    swap_empty,
)
from .contents import Contents, inspect, stored_dtype, untie, writer
from .names import own_names
from .save import save_card

for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    mapping.pop(QUANT_METHOD, None)  # of this module before it was reloaded
register_quantization_config(QUANT_METHOD)(KMQConfig)


@register_quantizer(QUANT_METHOD)
class KMQQuantizer(HfQuantizer):
    """Hooks of from_pretrained: swap modules before a packed checkpoint is loaded, cluster after a plain one is."""

    quantization_config: KMQConfig
    _tied: list[list[CodebookModule]]  # while a checkpoint is loaded: see `part_indices`
    _renamings = False  # whether the names of the checkpoint lead to those of the model by transformers' renamings only

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            if self.quantization_config.objective == "output":
                raise ValueError(
                    "objective: 'output' needs texts, which from_pretrained has none of; load the model and use quantize_ with"
                    " calibration"
                )
            return model
        if files := kwargs.get("checkpoint_files"):
            self._fit(model, [Path(file) for file in files])
        else:  # a state dict was given: there is no folder to look into
            self._tied = part_indices(swap_empty(model, self.quantization_config), set())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            join_indices(self._tied)
            self._tied = []
            mark_quantized(model, self.quantization_config)
        else:
            self.quantization_config = quantize_(model, self.quantization_config)
        return model

    def _fit(self, model: Any, files: list[Path]) -> None:
        """Puts codebook modules where the file has codebooks; what only this class has, beside that of the file, stays new."""
        if any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(f"{files[0]}: a quantized checkpoint is read from safetensors only")
        stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
        config, folder = self.quantization_config, files[0].parent
        contents = inspect(model, stored, config, stored_dtype(folder))
        if contents.faults:
            contents, self._renamings = _of_another(model, stored, config, folder, contents)
        untie(model, contents.untied)
        weights = plan(model, config).weights
        as_planned = True
        for weight in weights:
            bits = next((contents.packed[name] for name in weight.modules if name in contents.packed), None)
            as_planned = as_planned and bits == weight.bits
            weight.bits = bits
        modules = swap(model, [weight for weight in weights if weight.bits is not None], config)
        self._tied = part_indices(modules, set(contents.packed))
        if not as_planned:
            left = [name for weight in weights if weight.bits is None for name in weight.modules]
            self.quantization_config = described(model, modules, left, config)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """What save_pretrained asks for before it writes: the state dict that it was given and would put this in the place of, or
        None for the model's own. The card and what sentence-transformers has to know go into its folder now.

        A configuration that took the place of the model's says again that the model is quantized. transformers hands on neither
        the folder nor the state dict, so they are read from the frame of the caller. A method of the model's own instead would
        keep the model in a cycle, and its memory until the next collection.
        """
        packed = any(isinstance(module, CodebookModule) for module in model.modules())
        if packed and getattr(model.config, "quantization_config", None) is None:
            model.config.quantization_config = self.quantization_config
        caller = sys._getframe(1)
        given = caller.f_locals if caller.f_code.co_name == "save_pretrained" else {}
        folder, writes = given.get("save_directory"), given.get("save_on_this_rank", False)
        if packed and folder is not None and writes and not getattr(model, "_hf_peft_config_loaded", False):
            save_card(model, Path(folder))
        return given.get("state_dict"), {}

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """A packed checkpoint is not joined or split while it is loaded, and has the names of its own modules."""
        from transformers.core_model_loading import WeightRenaming

        if not self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, *args)
        return [entry for entry in weight_conversions if self._renamings and isinstance(entry, WeightRenaming)]

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


def _of_another(
    model: Any, stored: dict[str, StoredTensor], config: KMQConfig, folder: Path, contents: Contents
) -> tuple[Contents, bool]:
    """What a checkpoint that another class wrote (or this one, configured otherwise) holds for a model.

    That class has to have all of it, in full: else the checkpoint is damaged. So whatever is then missing for this model is new.
    """
    author = writer(folder, model)
    if author is not None:
        contents = inspect(author, stored, config, stored_dtype(folder))
        if contents.faults:
            raise CheckpointError(f"{folder}: {contents.faults[0]}")
    found, renamings = own_names(model, stored)
    contents = inspect(model, found, config, stored_dtype(folder))
    prefix = f"{model.base_model_prefix}."
    inner = hasattr(model, model.base_model_prefix)
    unknown = [s for s in contents.missing if author is None and (s.startswith(prefix) or not inner)]
    if faults := [*contents.damaged, *unknown]:
        raise CheckpointError(f"{folder}: {faults[0]}")
    return contents, renamings
