"""quantize_: a model's embeddings and linear layers to codebook modules, in place.

The way of a weight: `plan` makes a record of it (plan.py), a budget sets its bits (budget.py), encoding finds what stands for it
(encoding.py, or objective.py where that is to keep the outputs), and the swap puts codebook modules that hold this in the place
of its layers (swap.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..layers import CodebookModule
from ._progress import weight_bar
from .budget import allocate_bits
from .config import KMQConfig
from .encoding import EncodedWeight, encode_weights
from .marking import mark_quantized
from .objective import encode_for_outputs
from .plan import plan, remarks, warn
from .swap import swap
from .weights import Weight, as_matrix


def quantize_(
    model: nn.Module,
    config: KMQConfig | dict[str, Any],
    *,
    sample_weight: dict[str, Tensor] | None = None,
    eigenvalues: dict[str, float] | None = None,
    calibration: Iterable[dict[str, Any]] | None = None,
    progress: bool | None = None,
) -> KMQConfig:
    """Clusters every embedding and linear weight except the classification layer, and swaps in codebook modules, in place.

    model: any torch module; a transformers model can be saved with `save_pretrained` afterwards. config: see KMQConfig; a
    dict of its fields will do. sample_weight: importance of each weight, {module name: a tensor like it, not negative},
    default equal; allocation and weighting "fisher" need it, see `sensitivity.importance`. eigenvalues: largest one of the
    Hessian of each weight, {module name: value}, for allocation "hessian". calibration: for objective "output" batches of
    unlabelled texts, dictionaries of the model's arguments (a few hundred texts; every fifth batch, eight at most, is held
    out to judge by). progress: a progress bar; None shows one where the work is long. Returns the config with `skip` resolved
    to the layers that were left and, where there was a budget, `module_bits` to the bits chosen. A weight that several
    modules share is clustered once and stays shared. Hooks, attributes, options and whether a weight trains are carried over;
    a layer where that cannot be done stays as it is, and a warning names it. Warnings also say which patterns match nothing,
    and how much stays in floating point where it is more than 5 %.
    Raises ValueError naming the parameter for NaN, Inf or an empty weight, where the model is quantized already, is one layer
    or is on the meta device, where the config needs figures or batches that were not given, where a batch gives NaN or Inf in
    the inputs of a layer, and BudgetError for a budget that cannot be met, with the smallest possible; the model is then as
    it was.
    """
    if any(isinstance(module, CodebookModule) for module in model.modules()):
        raise ValueError("model: it is quantized already; use dequantize_ first")
    config = KMQConfig.of(config)
    found = plan(model, config)
    chosen = found.quantized
    if not chosen:
        why = "".join(f"; {sentence}" for sentence in remarks(model, found))
        raise ValueError(f"model: it has no embedding or linear layer to quantize{why}")
    if on_meta := [weight.parameter for weight in chosen if weight.source.is_meta]:
        raise ValueError(f"model: {on_meta[0]} is on the meta device; load its values before it is quantized")
    for what, given in (("sample_weight", sample_weight), ("eigenvalues", eigenvalues)):
        if unknown := sorted(set(given or {}) - {weight.name for weight in chosen}):
            raise ValueError(f"{what}: {unknown[0]} is not a weight that is quantized")
    if config.needs_fisher and sample_weight is None:
        raise ValueError("sample_weight: allocation and weighting 'fisher' need the Fisher diagonal, got none")
    if config.objective == "output" and calibration is None:
        raise ValueError("calibration: objective 'output' needs batches of unlabelled texts, got none")
    if config.objective != "output" and calibration is not None:
        raise ValueError("calibration: only objective 'output' takes batches of texts, got objective 'weights'")
    if config.has_budget:
        config = allocate_bits(model, config, chosen, sample_weight or {}, eigenvalues, progress)
    importance = None if sample_weight is None else [as_matrix(weight, sample_weight) for weight in chosen]
    if calibration is not None:
        encoded = encode_for_outputs(model, chosen, config, calibration, importance=importance, progress=progress)
    else:
        encoded = _encode(chosen, config, importance, progress)
    for weight, result in zip(chosen, encoded, strict=True):
        weight.encoded = result
    warn(model, found)
    swap(model, chosen, config)
    resolved = dataclasses.replace(config, skip=found.left)
    mark_quantized(model, resolved)
    return resolved


def _encode(
    chosen: list[Weight], config: KMQConfig, importance: list[Tensor | None] | None, progress: bool | None
) -> list[EncodedWeight]:
    with weight_bar("clustering", [weight.tensor for weight in chosen], progress) as bar:
        return encode_weights(
            [weight.tensor.contiguous() for weight in chosen],
            [weight.bits or 0 for weight in chosen],
            config,
            importance=importance,
            names=[weight.parameter for weight in chosen],
            on_done=lambda i: bar.update(chosen[i].tensor.numel()) and None,
        )
