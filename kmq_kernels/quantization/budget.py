"""The bits of every module, found so that the model meets a budget."""

from __future__ import annotations

import dataclasses
import re
import warnings

from torch import Tensor, nn

from . import allocation
from ._progress import weight_bar
from .config import KMQConfig
from .encoding import encoded_bytes
from .plan import plan
from .weights import Weight, as_matrix


def _exactly(name: str, model: nn.Module) -> str:
    """A pattern for `module_bits` that matches this module only, in the model and in its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    optional = f"(?:{re.escape(prefix)}\\.)?" if prefix else ""
    return f"^{optional}{re.escape(name.removeprefix(f'{prefix}.'))}$"


def check_budget(model: nn.Module, config: KMQConfig) -> None:
    """Raises BudgetError, with the smallest possible, where the model cannot meet the config's budget; looks at shapes only."""
    if config.has_budget:
        _budget(model, config, plan(model, config).quantized)


def _budget(model: nn.Module, config: KMQConfig, weights: list[Weight]) -> tuple[list[Weight], list[list[int]], int]:
    """The weights that may get any bits, what each costs at 1 to 8 bits, and what all of them may cost together."""
    free = [weight for weight in weights if not weight.given]

    def cost(weight: Weight, bits: int) -> int:
        rows, cols = weight.tensor.shape
        return encoded_bytes(rows, cols, bits, config, weight.source.element_size())

    quantized = {id(original) for weight in weights for original in weight.originals}
    others = [p for p in model.parameters() if id(p) not in quantized]
    taken = sum(p.numel() * p.element_size() for p in others)
    taken += sum(cost(weight, weight.bits or 0) for weight in weights if weight.given)
    if config.size is not None:
        taken += _header_bound(model, weights, config)
        budget = config.size
    elif config.bits_per_weight is not None:
        budget = int(config.bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)
    else:
        budget = taken + sum(cost(weight, config.bits) for weight in free)
    costs = [[cost(weight, bits) for bits in allocation.BITS] for weight in free]
    least = taken + sum(row[0] for row in costs)
    if budget < least:
        raise _too_small(config, least, model)
    return free, costs, budget - taken


def allocate_bits(
    model: nn.Module,
    config: KMQConfig,
    weights: list[Weight],
    importance: dict[str, Tensor],
    eigenvalues: dict[str, float] | None,
    progress: bool | None,
) -> KMQConfig:
    """Gives every weight that had no bits of its own those with which the model meets the budget; the config that says so."""
    free, costs, budget = _budget(model, config, weights)
    if not free:
        return config
    least = allocation.fewest_bits(costs, budget)
    costs = [row[least - 1 :] for row in costs]
    if config.allocation == "uniform":
        choice = [max(c for c in range(len(costs[0])) if sum(row[c] for row in costs) <= budget)] * len(free)
    elif config.allocation == "hessian":
        missing = [weight.name for weight in free if weight.name not in (eigenvalues or {})]
        if eigenvalues is None or missing:
            raise ValueError(f"eigenvalues: allocation 'hessian' needs one for every module, none for {missing[0]}")
        choice = allocation.by_eigenvalue(costs, [eigenvalues[weight.name] for weight in free], budget)
    else:
        with weight_bar("distortion at 1 to 8 bits", [weight.tensor for weight in free], progress) as bar:
            curves = allocation.distortion_curves(
                [weight.tensor.contiguous() for weight in free],
                config,
                importance=[as_matrix(weight, importance) for weight in free] if config.allocation == "fisher" else None,
                names=[weight.parameter for weight in free],
                on_done=lambda i: bar.update(free[i].tensor.numel()) and None,
            )
        choice = allocation.least_error(costs, curves[:, least - 1 :].tolist(), budget)
    for weight, c in zip(free, choice, strict=True):
        weight.bits = least + c
    if config.allocation == "uniform":
        config = dataclasses.replace(config, bits=least + choice[0])  # what the layers have
        _say_what_is_left(model, config, budget - sum(row[choice[0]] for row in costs))
    found = {_exactly(weight.name, model): least + c for weight, c in zip(free, choice, strict=True)}
    return dataclasses.replace(config, module_bits={**(config.module_bits or {}), **found})


def _say_what_is_left(model: nn.Module, config: KMQConfig, unused: int) -> None:
    """Warns where bits that are the same for all weights leave a quarter of a budget or more."""
    whole = config.size or int((config.bits_per_weight or 0) * sum(p.numel() for p in model.parameters()) / 8)
    if config.bits < 8 and unused > whole / 4 > 0:
        argument = "size" if config.size else "bits_per_weight"
        left = f"{unused / 1e6:.2f} of {whole / 1e6:.2f} MB" if whole >= 1e6 else f"{unused:,} of {whole:,} bytes"
        sentence = f"{argument}: {config.bits} bits for all weights leave {left} unused; allocation 'distortion'"
        warnings.warn(f"{sentence} (--allocation distortion) spends them where they help", stacklevel=4)


def _too_small(config: KMQConfig, least: int, model: nn.Module) -> allocation.BudgetError:
    if config.size is not None:
        return allocation.BudgetError(f"size: the smallest possible for this model is {least} bytes, got {config.size}")
    smallest = 8 * least / sum(p.numel() for p in model.parameters())
    return allocation.BudgetError(
        f"bits_per_weight: the smallest possible for this model is {smallest:.4f}, got {config.bits_per_weight}"
    )


def _header_bound(model: nn.Module, weights: list[Weight], config: KMQConfig) -> int:
    """Bytes that the header of the safetensors file can take at most."""
    digits = len(str(sum(p.numel() * p.element_size() for p in model.parameters())))
    fixed = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * digits
    stored = 2 + config.row_scale + 2 * (config.outlier_fraction > 0)
    total = 128  # length field, metadata, padding
    names = {weight.parameter for weight in weights}
    for name, parameter in model.named_parameters():
        parts = stored if name in names else 1
        total += parts * (len(name) + len("outlier_values") + fixed + len(str(list(parameter.shape))))
    return total
