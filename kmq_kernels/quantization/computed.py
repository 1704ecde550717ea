"""Weights that are computed from other tensors at each forward: parametrizations, weight and spectral norm, pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_Hook = (WeightNorm, SpectralNorm, BasePruningMethod)


def _name(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def _tensors(hook: Any) -> tuple[str, ...]:
    """What the hook keeps on the layer beside the tensor it computes."""
    parts = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig", "_u", "_v")}.get(type(hook), ("_orig", "_mask"))
    return (_name(hook), *(_name(hook) + part for part in parts))


def computing_hooks(module: nn.Module) -> list[Any]:
    """The hooks of torch's older weight_norm, spectral_norm and pruning on a layer."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook)]


def hook_tensors(module: nn.Module) -> set[str]:
    """Names of what such hooks compute and of what they compute it from."""
    return {name for hook in computing_hooks(module) for name in _tensors(hook)}


def computed_by(module: nn.Module) -> str:
    """What computes tensors of a layer at each forward, "" where all are parameters."""
    found = [type(hook).__name__ for hook in computing_hooks(module)]
    if parametrize.is_parametrized(module):
        lists = module.parametrizations.values()  # type: ignore[union-attr,operator]  # a ModuleDict
        found += [type(one).__name__.lstrip("_") for parametrizations in lists for one in parametrizations]
    return ", ".join(found)


@torch.no_grad()
def resolved(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The tensor `name` of a layer as it is in eval mode; nothing of the layer changes."""
    if parametrize.is_parametrized(module, name):
        list_: Any = module.parametrizations[name]  # type: ignore[index]
        modes = {one: one.training for one in list_.modules()}
        list_.eval()
        try:
            return list_().detach()
        finally:
            for one, mode in modes.items():
                one.training = mode
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Hook) and _name(hook) == name:
            if isinstance(hook, SpectralNorm):
                return hook.compute_weight(module, do_power_iteration=False).detach()
            made = hook.compute_weight(module) if isinstance(hook, WeightNorm) else hook.apply_mask(module)
            return made.detach()
    return getattr(module, name)
