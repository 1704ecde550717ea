"""LoRA of PEFT on packed layers: importing this module puts the tuner that knows them into PEFT's table of tuners.

PEFT chooses the layer of an adapter by the class of the layer below it. `LoraModel` asks for no class of others but through a
private method of each configuration, so the entry for LoRA is a subclass here, which decides about codebook layers and leaves
every other layer to PEFT. The package has this module imported when PEFT's LoRA is.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn

from ..layers import CodebookConv1D, CodebookEmbedding, CodebookLinear, CodebookModule, CodebookPointwise
from .adapter_base import another_base

NO_MERGE = (
    "merge: a packed layer has no weight that an adapter could be added to; kmq_kernels.dequantize_(model) first, then merge,"
    " then quantize_ what came of it"
)
# How lora_A and lora_B can begin without a change of the weight below them.
_STARTS = ("gaussian", "orthogonal", "eva")


def _below(layer: Any) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


class _OnPacked:
    """What adapters of packed layers have in common. After dequantize_ they are PEFT's own, and merge."""

    get_base_layer: Any

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        if isinstance(module, CodebookEmbedding):
            return module.num_embeddings, module.embedding_dim
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if isinstance(self.get_base_layer(), CodebookModule) and isinstance(start, str) and start not in _STARTS:
            known = ", ".join(map(repr, _STARTS))
            raise ValueError(
                f"init_lora_weights: {start!r} begins with another weight of the layer below, which a packed layer does not have;"
                f" expected True, False, {known}"
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)  # type: ignore[misc]  # PEFT's, the other base of a subclass

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError on a packed layer."""
        if isinstance(self.get_base_layer(), CodebookModule):
            raise ValueError(NO_MERGE)
        super().merge(*args, **kwargs)  # type: ignore[misc]  # the same


class LoraCodebookLinear(_OnPacked, Linear):
    """The adapter of a CodebookLinear or CodebookConv1D: lora_B(lora_A(x)) beside it; DoRA, too."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants that leave the weight as it is."""
        variants = super().lora_variants
        return {names: variants[names] for names in ((), ("use_dora",), ("alora_invocation_tokens",)) if names in variants}


class LoraCodebookEmbedding(_OnPacked, Embedding):
    """The adapter of a CodebookEmbedding; DoRA, too."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants that leave the weight as it is."""
        variants = super().lora_variants
        return {names: variants[names] for names in ((), ("use_dora",)) if names in variants}


class PackedLoraModel(LoraModel):
    """LoraModel that also knows codebook layers."""

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        below = _below(target)
        if isinstance(below, CodebookPointwise):
            raise ValueError("target_modules: a packed Conv1d takes no adapter; skip the layer when you quantize")
        if not isinstance(below, CodebookModule):
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if isinstance(below, CodebookEmbedding):
            return LoraCodebookEmbedding(target, adapter_name, config=lora_config, **kwargs)
        lora_config.fan_in_fan_out = isinstance(below, CodebookConv1D)
        return LoraCodebookLinear(target, adapter_name, config=lora_config, **kwargs)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if sentence := another_base(model, peft_config.base_model_name_or_path, peft_config.revision):
            warnings.warn(sentence, stacklevel=2)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            from peft.tuners.tuners_utils import _maybe_include_all_linear_layers  # private: needed by who asks for this only

            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _packed_linear(peft_config, model)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, LoraLayer) and isinstance(_below(module), CodebookModule) for module in self.model.modules()):
            raise ValueError(NO_MERGE)


def _packed_linear(peft_config: LoraConfig, model: Any) -> set[str]:
    """Names of the packed linear layers but the last one of a task, as PEFT's "all-linear" takes plain ones."""
    heads = [model.get_output_embeddings()] if hasattr(model, "get_output_embeddings") else []
    if peft_config.task_type == "SEQ_CLS":
        heads += [getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)][:1]
    inside = {id(part) for module in model.modules() if isinstance(module, BaseTunerLayer) for part in module.modules()}
    left = inside | {id(head) for head in heads}
    return {name for name, m in model.named_modules() if isinstance(m, CodebookLinear) and id(m) not in left}


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = PackedLoraModel
