"""What transformers has to know of a quantized model: which parameters are tied, and a configuration that says what was done.

Every transformers model counts, at any depth: the one inside a wrapper, or the two inside an encoder-decoder.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..layers import INDICES, STORED, CodebookModule
from .config import QUANT_METHOD, KMQConfig, name_matches
from .heads import classification_layers


def _inside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every transformers model in a module, itself included, the outer ones first."""
    library = sys.modules.get("transformers.modeling_utils")  # not imported: then there is none
    for name, module in model.named_modules():
        if library is not None and isinstance(module, library.PreTrainedModel):
            yield name, module


def retie(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """transformers ties parameters by name: X.weight becomes X.codebook, X.packed, ... for a codebook module X, or back.

    new: the modules that were put into the model, by name.
    """
    for prefix, part in _inside(model):
        below = {name.removeprefix(f"{prefix}."): m for name, m in new.items() if not prefix or name.startswith(f"{prefix}.")}
        ties = _renamed(getattr(part, "all_tied_weights_keys", None), below)
        if ties is not None:  # transformers ties parameters by this list; by the other one it also leaves out what is tied
            part.all_tied_weights_keys = {k: v for k, v in ties.items() if k.rpartition(".")[2] not in INDICES}
        patterns = _renamed(getattr(part, "_tied_weights_keys", None), below)
        if patterns is None:
            continue
        # A pattern for all that lies in a module can name its weights: then it misses the parts that took their place.
        missed = {k: v for k, v in (ties or {}).items() if k.rpartition(".")[2] in STORED and not _matched(k, patterns)}
        part._tied_weights_keys = {**patterns, **missed}


def _matched(name: str, patterns: dict[str, str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _renamed(ties: Any, new: dict[str, nn.Module]) -> dict[str, str] | None:
    """Ties of target (a name or a regular expression) to source, in the names that the parameters of `new` have."""
    if not isinstance(ties, dict):
        return None
    renamed = {}
    for target, source in ties.items():
        owner, _, parameter = target.rpartition(".")
        modules = _called(owner, new) if parameter in ("weight", *STORED) else []
        if not modules:
            renamed[target] = source
        for module in modules:
            for part in module.stored() if isinstance(module, CodebookModule) else ("weight",):
                renamed[f"{owner}.{part}"] = f"{source.rpartition('.')[0]}.{part}"
    return renamed


def _called(owner: str, new: dict[str, nn.Module]) -> list[nn.Module]:
    if owner in new:
        return [new[owner]]
    try:
        pattern = re.compile(rf"(?:^|\.)(?:{owner.removeprefix('^')})$")
    except re.error:  # the dot was inside an expression
        return []
    return [module for name, module in new.items() if pattern.search(name)]


def mark_quantized(model: nn.Module, config: KMQConfig) -> None:
    """What from_pretrained would set, so that save_pretrained and Trainer treat each transformers model inside as quantized.

    config: with `skip` resolved to the names, in `model`, of all that was left.
    """
    described: set[int] = set()
    for name, part in _inside(model):
        modules = {n: module for n, module in part.named_modules() if isinstance(module, CodebookModule)}
        if not modules:
            continue
        own = _below(part, name, modules, config) if name else config
        if id(part.config) not in described:  # an inner model often has the configuration of the outer one
            part.config.quantization_config = own
            described.add(id(part.config))
        from transformers.quantizers import AutoHfQuantizer

        part.hf_quantizer = AutoHfQuantizer.from_config(own, pre_quantized=True)
        part.is_quantized = True
        part.quantization_method = QUANT_METHOD
        for _, inner in _inside(part):  # some forwards ask for it, and call layers instead of reading their weights
            inner.config._is_quantized = True
        # What transformers would turn back while saving: names of families that had others once. A codebook cannot be joined
        # or split as its weight was, so everything is saved under the names that the modules have.
        part._weight_conversions = []


def _below(part: nn.Module, prefix: str, modules: dict[str, CodebookModule], config: KMQConfig) -> KMQConfig:
    """The configuration of a model at `prefix`: names without that prefix, and bits that need no pattern of the outer model."""
    left = [name.removeprefix(f"{prefix}.") for name in config.skip or [] if name.startswith(f"{prefix}.")]
    return described(part, modules, left, config)


def described(model: nn.Module, modules: dict[str, CodebookModule], left: list[str], config: KMQConfig) -> KMQConfig:
    """The configuration of `model` under which exactly `modules`, and not `left`, are quantized, each with the bits it has."""
    heads = classification_layers(model)

    def by_itself(name: str, module: CodebookModule) -> bool:
        return module.bits == config.bits and name not in heads and not any(name_matches(pattern, name) for pattern in left)

    bits = {f"^{re.escape(name)}$": module.bits for name, module in modules.items() if not by_itself(name, module)}
    return dataclasses.replace(config, skip=left, module_bits=bits or None, bits_per_weight=None, size=None)


def unmark(model: nn.Module) -> None:
    """Takes back what `mark_quantized` set."""
    for _, part in _inside(model):
        if getattr(part.config, "quantization_config", None) is not None:
            del part.config.quantization_config
        if getattr(part, "hf_quantizer", None) is not None:
            part.hf_quantizer = None
        part.is_quantized = False
        vars(part.config).pop("_is_quantized", None)
        if part.__dict__.get("_weight_conversions") == []:
            del part._weight_conversions
