"""The bits of every module, found so that the model meets a budget."""

from __future__ import annotations

import dataclasses
import re
from typing import cast

from torch import Tensor, nn

from . import allocation
from ._progress import weight_bar
from .config import KMQConfig
from .encoding import encoded_bytes
from .plan import Plan, plan


def _exactly(name: str, model: nn.Module) -> str:
    """A pattern for `module_bits` that matches this module only, in the model and in its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    optional = f"(?:{re.escape(prefix)}\\.)?" if prefix else ""
    return f"^{optional}{re.escape(name.removeprefix(f'{prefix}.'))}$"


def check_budget(model: nn.Module, config: KMQConfig) -> None:
    """Raises BudgetError, with the smallest possible, where the model cannot meet the config's budget; looks at shapes only."""
    if config.has_budget:
        _budget(model, config, plan(model, config))


def _budget(model: nn.Module, config: KMQConfig, chosen: Plan) -> tuple[list[str], list[list[int]], int]:
    """The weights that may get any bits, what each costs at 1 to 8 bits, and what all of them may cost together."""
    fixed = {name for name, members in chosen.members.items() if any(config.bits_for(m)[1] for m in members)}
    free = [name for name in chosen.bits if name not in fixed]
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in chosen.bits}

    def cost(name: str, bits: int) -> int:
        rows, cols = weights[name].shape
        return encoded_bytes(rows, cols, bits, config, weights[name].element_size())

    quantized = {id(weight) for weight in weights.values()}
    others = [p for p in model.parameters() if id(p) not in quantized]
    taken = sum(p.numel() * p.element_size() for p in others) + sum(cost(name, chosen.bits[name]) for name in fixed)
    if config.size is not None:
        taken += _header_bound(model, chosen, config)
        budget = config.size
    elif config.bits_per_weight is not None:
        budget = int(config.bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)
    else:
        budget = taken + sum(cost(name, config.bits) for name in free)
    costs = [[cost(name, bits) for bits in allocation.BITS] for name in free]
    least = taken + sum(row[0] for row in costs)
    if budget < least:
        raise _too_small(config, least, model)
    return free, costs, budget - taken


def with_allocated_bits(
    model: nn.Module,
    config: KMQConfig,
    chosen: Plan,
    importance: dict[str, Tensor],
    eigenvalues: dict[str, float] | None,
    progress: bool | None,
) -> KMQConfig:
    """The config with the bits of every module that had none of its own, so that the model meets the budget."""
    free, costs, budget = _budget(model, config, chosen)
    if not free:
        return config
    least = allocation.fewest_bits(costs, budget)
    costs = [row[least - 1 :] for row in costs]
    if config.allocation == "uniform":
        choice = [max(c for c in range(len(costs[0])) if sum(row[c] for row in costs) <= budget)] * len(free)
    elif config.allocation == "hessian":
        missing = [name for name in free if name not in (eigenvalues or {})]
        if eigenvalues is None or missing:
            raise ValueError(f"eigenvalues: allocation 'hessian' needs one for every module, none for {missing[0]}")
        choice = allocation.by_eigenvalue(costs, [eigenvalues[name] for name in free], budget)
    else:
        weights = [cast(Tensor, model.get_submodule(name).weight).detach() for name in free]
        with weight_bar("distortion at 1 to 8 bits", weights, progress) as bar:
            curves = allocation.distortion_curves(
                weights,
                config,
                importance=[importance.get(name) for name in free] if config.allocation == "fisher" else None,
                names=[f"{name}.weight" for name in free],
                on_done=lambda i: bar.update(weights[i].numel()) and None,
            )
        choice = allocation.least_error(costs, curves[:, least - 1 :].tolist(), budget)
    found = {_exactly(name, model): least + c for name, c in zip(free, choice, strict=True)}
    return dataclasses.replace(config, module_bits={**(config.module_bits or {}), **found})


def _too_small(config: KMQConfig, least: int, model: nn.Module) -> allocation.BudgetError:
    if config.size is not None:
        return allocation.BudgetError(f"size: the smallest possible for this model is {least} bytes, got {config.size}")
    smallest = 8 * least / sum(p.numel() for p in model.parameters())
    return allocation.BudgetError(
        f"bits_per_weight: the smallest possible for this model is {smallest:.4f}, got {config.bits_per_weight}"
    )


def _header_bound(model: nn.Module, chosen: Plan, config: KMQConfig) -> int:
    """Bytes that the header of the safetensors file can take at most."""
    digits = len(str(sum(p.numel() * p.element_size() for p in model.parameters())))
    fixed = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * digits
    stored = 2 + config.row_scale + 2 * (config.outlier_fraction > 0)
    total = 128  # length field, metadata, padding
    for name, parameter in model.named_parameters():
        parts = stored if name.removesuffix(".weight") in chosen.bits else 1
        total += parts * (len(name) + len("outlier_values") + fixed + len(str(list(parameter.shape))))
    return total
