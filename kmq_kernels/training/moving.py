"""Stage 3 with assignments that move: latent weights beside the codebooks of a model, for as long as it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..layers import CodebookModule, settle, start_moving, stop_moving
from ..quantization import KMQConfig, kind_of
from .settings import Assignments, PipelineError

FEW_BITS = 2  # up to here fixed indices are what limits a model
MOVING_STEPS = 300
WITHIN = 0.7  # of a cell: where latent weights begin whose indices were not chosen by distance


def default_assignments(config: KMQConfig) -> Assignments:
    """What stage 3 does where nothing is said: assignments move at 1 and 2 bits, but in a published system."""
    return "moving" if config.preset is None and config.bits <= FEW_BITS and not config.has_budget else "fixed"


def check_assignments(assignments: Assignments, config: KMQConfig) -> None:
    """Raises PipelineError for moving assignments with the preset that is the source's method as written."""
    if assignments == "moving" and config.preset == "paper":
        raise PipelineError("assignments: preset 'paper' keeps its indices fixed in stage 3, got 'moving'")


def matching_weights(model: nn.Module, source: Any) -> dict[str, torch.Tensor]:
    """The weights of `source`, the model in floating point that `model` was made from, as matrices (rows, cols), by the names of
    the codebook modules of `model`. Raises PipelineError where `source` is another model."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, CodebookModule):
            continue
        try:
            layer = source.get_submodule(name)
        except AttributeError:
            raise PipelineError(f"teacher: it has no layer {name}; expected the model that this one was made from") from None
        kind = kind_of(layer)
        if kind is None:
            raise PipelineError(f"teacher: expected a model in floating point, got a {type(layer).__name__} as {name}")
        found[name] = kind.matrix(layer.weight.detach())
        if found[name].shape != (module.rows, module.cols):
            given, expected = tuple(found[name].shape), (module.rows, module.cols)
            raise PipelineError(f"teacher: {name} is {given}, that of the model {expected}; they do not belong together")
    return found


@contextlib.contextmanager
def moving(model: nn.Module, source: Any = None) -> Iterator[list[nn.Parameter]]:
    """While it is open the codebook modules of `model` have latent weights, which it gives; those of `source` (the model in
    floating point that it was made from) where there is one, else the decoded ones. Of objective "output" the decoded weights
    stay at first, for that knew more than distances of weights. `Settle` keeps the indices up to date."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, CodebookModule)}
    if not modules:
        raise PipelineError("assignments: expected a quantized model for 'moving', got one without codebooks")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    share = None
    if isinstance(config, KMQConfig):
        check_assignments("moving", config)
        share = WITHIN if config.objective == "output" else None
    try:
        latents = start_moving(modules, {} if source is None else matching_weights(model, source), share)
        if not latents:
            raise PipelineError("assignments: 'moving' needs codebooks that train, here all are frozen")
        yield latents
    finally:
        stop_moving(modules.values())


class Settle(TrainerCallback):
    """After every step of the optimizer the indices are those of the nearest centroids."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, CodebookModule)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settle(self._modules)
