"""Plain layers and codebook modules put in each other's place, with what was tied kept tied."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn

from ..layers import (
    INDICES,
    CodebookConv1D,
    CodebookEmbedding,
    CodebookLinear,
    CodebookModule,
    CodebookPointwise,
)
from .computed import computing_hooks, hook_tensors, resolved
from .config import KMQConfig
from .marking import retie, unmark
from .plan import plan
from .weights import ATTRIBUTES, Kind, Weight, kind_of, plain_class

# What a module keeps its hooks in. The quantized layer has the very same dictionaries, so that handles still remove them.
_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def _empty_like(module: nn.Module, weight: Weight, config: KMQConfig) -> CodebookModule:
    """The codebook module for a layer, with all that the layer has beside its weight."""
    rows, cols = weight.tensor.shape
    options: dict[str, Any] = {
        "group_rows": config.rows_per_codebook(rows),
        "grad_reduction": config.grad_reduction,
        "row_scale": config.row_scale,
        "outliers": config.outlier_count(rows * cols),
        "device": weight.source.device,
        "dtype": weight.source.dtype,
    }
    kind = cast(Kind, kind_of(module))
    new: CodebookModule
    if isinstance(module, nn.Embedding):
        options |= {"padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
        new = CodebookEmbedding(rows, cols, weight.bits or 0, **options)
    else:
        new = cast("type[CodebookLinear]", kind.packed)(cols, rows, weight.bits or 0, bias=False, **options)
        bias = resolved(module, "bias")
        new.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    trains = any(parameter.requires_grad for parameter in weight.originals)
    for name, parameter in new.named_parameters():
        if name != "bias":
            parameter.requires_grad_(trains)
            vars(parameter).update(vars(weight.originals[0]))  # flags that somebody's optimizer reads
    shell = _shell(module)
    vars(new).update({name: value for name, value in vars(shell).items() if name in _HOOKS or name not in vars(new)})
    vars(new)["replaces"] = shell  # not as a child: it has no tensors
    return new.train(module.training)


def _shell(module: nn.Module) -> nn.Module:
    """A copy of a layer without its tensors and without what computes them."""
    shell = object.__new__(plain_class(module))
    vars(shell).update({name: value for name, value in vars(module).items() if name not in hook_tensors(module)})
    if computing := computing_hooks(module):
        hooks = module._forward_pre_hooks.items()
        vars(shell)["_forward_pre_hooks"] = OrderedDict((key, hook) for key, hook in hooks if hook not in computing)
    state_hooks: dict[str, Any] = {name: OrderedDict() for name in vars(module) if "state_dict" in name}
    vars(shell).update(state_hooks, _parameters={}, _buffers={}, _modules={}, _non_persistent_buffers_set=set())
    return shell


def _replace(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def swap(model: nn.Module, weights: list[Weight], config: KMQConfig) -> dict[str, CodebookModule]:
    """Puts codebook modules in place of the layers that have these weights; returns them by name.

    They hold what the weights were encoded as, or nothing yet (zeros, or on the meta device) where they were not.
    """
    new: dict[str, nn.Module] = {}
    for weight in weights:
        made: dict[int, CodebookModule] = {}  # a module that stands at several places stays one module
        for name, old in weight.modules.items():
            if id(old) not in made:
                made[id(old)] = _empty_like(old, weight, config)
            new[name] = made[id(old)]
        first, *others = made.values()
        if weight.encoded is not None and weight.encoded.bias is not None:
            cast(Any, first).bias.data.copy_(weight.encoded.bias)  # only layers with a bias get one
        for part, parameter in first.stored().items():
            if weight.encoded is not None:
                with torch.no_grad():
                    parameter.copy_(getattr(weight.encoded, part))
            for other in others:
                setattr(other, part, parameter)
    _replace(model, new)
    retie(model, new)
    return cast("dict[str, CodebookModule]", new)


def swap_empty(model: nn.Module, config: KMQConfig) -> dict[str, CodebookModule]:
    """Puts empty codebook modules (zeros, or meta) in place of the layers that `plan` names; returns them by name."""
    return swap(model, plan(model, config).quantized, config)


def part_indices(modules: dict[str, CodebookModule], held: set[str]) -> list[list[CodebookModule]]:
    """Leaves the indices of tied layers to one of them, one whose name is in `held`; returns the groups, that one first.

    transformers ties parameters while it loads, and would take the indices of the others for missing. `join_indices` follows.
    """
    groups: dict[int, dict[int, tuple[str, CodebookModule]]] = {}
    for name, module in modules.items():
        groups.setdefault(id(module.packed), {})[id(module)] = (name, module)
    tied = []
    for group in groups.values():
        members = sorted(group.values(), key=lambda entry: entry[0] not in held)
        tied.append([module for _, module in members])
        for module in tied[-1][1:]:
            module._buffers.update(dict.fromkeys(INDICES))
    return [group for group in tied if len(group) > 1]


def join_indices(groups: list[list[CodebookModule]]) -> None:
    """Gives the indices of the first of each group to the others."""
    for first, *others in groups:
        for name in INDICES:
            for module in others:
                module._buffers[name] = first._buffers[name]


def dequantize_(model: nn.Module) -> nn.Module:
    """Swaps plain linear and embedding layers with the decoded weights back in, in place; returns the model.

    The weights keep their 2**bits distinct values. Layers that shared codebook and indices share their weight again; each has the
    class, the options, the hooks and the attributes of the one that was quantized. Raises ValueError where `model` is itself a
    layer.
    """
    if isinstance(model, CodebookModule):
        raise ValueError(f"model: a {type(model).__name__} by itself cannot be replaced in place; put it in a module")
    new: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CodebookModule):
            continue
        if id(module) not in made:
            if id(module.packed) not in weights:
                with torch.no_grad():
                    value = module.weight.clone(memory_format=torch.contiguous_format)
                weights[id(module.packed)] = nn.Parameter(value, requires_grad=module.codebook.requires_grad)
                vars(weights[id(module.packed)]).update(vars(module.codebook))
            made[id(module)] = _plain(module, weights[id(module.packed)]).train(module.training)
        new[name] = made[id(module)]
    _replace(model, new)
    retie(model, new)
    if new:
        unmark(model)
    return model


_SIZES = {"in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq"}


def _plain(module: CodebookModule, weight: nn.Parameter) -> nn.Module:
    """The layer that `module` took the place of, or would have, with all that was put on it since."""
    plain: nn.Module
    if module.replaces is not None:
        plain = object.__new__(type(module.replaces))
        vars(plain).update(vars(module.replaces), _parameters={}, _buffers={}, _modules={})
        inner = set(vars(nn.Module())) - set(_HOOKS)
        for name, value in vars(module).items():
            if name not in inner and (name in vars(plain) or name not in ATTRIBUTES | _SIZES):
                vars(plain)[name] = value
    elif isinstance(module, CodebookEmbedding):
        options: dict[str, Any] = {"padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
        plain = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta", **options)
    else:
        plain = _plain_linear(cast(CodebookLinear, module))
    plain.register_parameter("weight", weight)
    if isinstance(module, CodebookLinear):
        plain.register_parameter("bias", module.bias)
    return plain


def _plain_linear(module: CodebookLinear) -> nn.Module:
    has_bias = module.bias is not None
    if isinstance(module, CodebookPointwise):
        return nn.Conv1d(module.in_features, module.out_features, 1, bias=has_bias, device="meta")
    if isinstance(module, CodebookConv1D):
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(module.out_features, module.in_features)
    return nn.Linear(module.in_features, module.out_features, bias=has_bias, device="meta")
