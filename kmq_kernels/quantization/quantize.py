"""quantize_ and dequantize_: a model's embeddings and linear layers to codebook modules, in place, and back."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from ..layers import CodebookModule
from ._progress import weight_bar
from .budget import with_allocated_bits
from .config import KMQConfig
from .encoding import encode_weights
from .plan import plan
from .swap import mark_quantized, swap_empty


def quantize_(
    model: nn.Module,
    config: KMQConfig,
    *,
    sample_weight: dict[str, Tensor] | None = None,
    eigenvalues: dict[str, float] | None = None,
    progress: bool | None = None,
) -> KMQConfig:
    """Clusters every embedding and linear weight except the classification layer, and swaps in codebook modules, in place.

    model: any torch module; a transformers model can be saved with `save_pretrained` afterwards. config: see KMQConfig.
    sample_weight: importance of each weight, {module name: (rows, cols) not negative}, default all equal; allocation and
    weighting "fisher" need it, see `sensitivity.importance`. eigenvalues: largest one of the Hessian of each weight,
    {module name: value}, for allocation "hessian". progress: a progress bar; None shows one where the work is long.
    Returns the config with `skip` resolved to the layers that were left and, where there was a budget, `module_bits` to the
    bits chosen. A weight that several modules share is clustered once and stays shared. Raises ValueError naming the parameter
    for NaN, Inf or an empty weight, where the model is quantized already, where the config needs figures that were not given,
    and BudgetError for a budget that cannot be met, with the smallest possible; the model is then as it was.
    """
    if any(isinstance(module, CodebookModule) for module in model.modules()):
        raise ValueError("model: it is quantized already; use dequantize_ first")
    chosen = plan(model, config)
    if not chosen.bits:
        raise ValueError("model: it has no embedding or linear layer to quantize")
    unknown = (set(sample_weight or {}) | set(eigenvalues or {})) - set(chosen.bits)
    if unknown:
        what = "sample_weight" if unknown & set(sample_weight or {}) else "eigenvalues"
        raise ValueError(f"{what}: {sorted(unknown)[0]} is not a weight that is quantized")
    if config.needs_fisher and sample_weight is None:
        raise ValueError("sample_weight: allocation and weighting 'fisher' need the Fisher diagonal, got none")
    if config.has_budget:
        config = with_allocated_bits(model, config, chosen, sample_weight or {}, eigenvalues, progress)
        chosen = plan(model, config)
    names = list(chosen.bits)
    weights = [cast(Tensor, model.get_submodule(name).weight).detach() for name in names]
    with weight_bar("clustering", weights, progress) as bar:
        encoded = encode_weights(
            weights,
            [chosen.bits[name] for name in names],
            config,
            importance=None if sample_weight is None else [sample_weight.get(name) for name in names],
            names=[f"{name}.weight" for name in names],
            on_done=lambda i: bar.update(weights[i].numel()) and None,
        )
    modules = swap_empty(model, config)
    with torch.no_grad():
        for name, result in zip(names, encoded, strict=True):
            for part, parameter in modules[name].stored().items():
                parameter.copy_(getattr(result, part))
    resolved = dataclasses.replace(config, skip=chosen.left)
    if hasattr(model, "hf_quantizer") or hasattr(model, "save_pretrained"):
        mark_quantized(model, resolved)
    return resolved
