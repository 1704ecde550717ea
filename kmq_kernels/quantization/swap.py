"""Plain layers and codebook modules put in each other's place, with what was tied kept tied."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers import CodebookEmbedding, CodebookLinear, CodebookModule
from .config import KMQConfig
from .marking import retie, unmark
from .plan import Weight, plan


def _empty_like(module: nn.Module, bits: int, config: KMQConfig) -> CodebookModule:
    weight = cast(Tensor, module.weight)
    options: dict[str, Any] = {
        "group_rows": config.rows_per_codebook(weight.shape[0]),
        "grad_reduction": config.grad_reduction,
        "row_scale": config.row_scale,
        "outliers": config.outlier_count(weight.numel()),
        "device": weight.device,
        "dtype": weight.dtype,
    }
    new: CodebookModule
    if isinstance(module, nn.Embedding):
        new = CodebookEmbedding(module.num_embeddings, module.embedding_dim, bits, padding_idx=module.padding_idx, **options)
    else:
        linear = cast(nn.Linear, module)
        new = CodebookLinear(linear.in_features, linear.out_features, bits, bias=linear.bias is not None, **options)
        new.bias = linear.bias
    return new.train(module.training)


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
                made[id(old)] = _empty_like(old, weight.bits or 0, config)
            new[name] = made[id(old)]
        first, *others = made.values()
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


def dequantize_(model: nn.Module) -> nn.Module:
    """Swaps plain linear and embedding layers with the decoded weights back in, in place; returns the model.

    The weights keep their 2**bits distinct values. Layers that shared codebook and indices share their weight again.
    """
    new: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CodebookModule):
            continue
        if id(module) not in made:
            with torch.no_grad():
                weight = weights.setdefault(id(module.packed), nn.Parameter(module.weight.detach().clone()))
            made[id(module)] = _plain(module, weight).train(module.training)
        new[name] = made[id(module)]
    _replace(model, new)
    retie(model, new)
    if new:
        unmark(model)
    return model


def _plain(module: CodebookModule, weight: nn.Parameter) -> nn.Module:
    plain: nn.Module
    if isinstance(module, CodebookEmbedding):
        plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
    else:
        linear = cast(CodebookLinear, module)
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        plain.bias = linear.bias  # type: ignore[assignment]  # None is allowed, torch's annotation says otherwise
    plain.weight = weight  # type: ignore[assignment]  # nn.Module's attributes are Tensor or Module to mypy
    return plain
