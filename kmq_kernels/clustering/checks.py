"""Checks of what is to be clustered, and whether a compiled engine takes it."""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .points import Array, Options
from .results import Algorithm, Init


def check_options(algorithm: str, init: str, max_iter: int, tol: float, seed: int) -> Options:
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm: expected one of {', '.join(get_args(Algorithm))}, got {algorithm!r}")
    if init not in get_args(Init):
        raise ValueError(f"init: expected one of {', '.join(get_args(Init))}, got {init!r}")
    if max_iter < 1:
        raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol: expected a number that is not negative, got {tol}")
    return Options(algorithm, init, int(max_iter), float(tol), int(seed))


def is_numbers(values: Any) -> bool:
    """Whether `values` is a list of numbers: one problem, where a list of anything else has one for each entry."""
    return isinstance(values, (list, tuple)) and bool(values) and all(isinstance(value, (int, float)) for value in values)


def as_tensor(name: str, values: Any) -> Tensor:
    """`values` as they are, or a NumPy array or a list of numbers as a tensor."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f" and values.dtype.itemsize in (2, 4, 8):
        return torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")).copy())
    if is_numbers(values):
        return torch.tensor(values, dtype=torch.get_default_dtype())
    if isinstance(values, Tensor):
        return values
    given = f"a NumPy array of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
    raise TypeError(f"{name}: expected a floating-point tensor, a NumPy array or a list of numbers, got {given}")


def check_values(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        given = f"one of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {given}")
    if values.numel() == 0:
        raise ValueError(f"{name}: expected at least one value, got an empty tensor of shape {tuple(values.shape)}")


def check_weight(name: str, values: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"sample_weight of {name}: expected a floating-point tensor, got {weight.dtype}")
    if weight.shape != values.shape or weight.device != values.device:
        raise ValueError(
            f"sample_weight of {name}: expected shape {tuple(values.shape)} on {values.device},"
            f" got {tuple(weight.shape)} on {weight.device}"
        )


def by_engine(tensors: Sequence[Tensor], weights: Sequence[Tensor | None]) -> dict[torch.device | None, list[int]]:
    """Which tensors the compiled engine of a device takes, and under None those that none takes.

    There is an engine for the CPU and one for CUDA, for at most 32 bits. What stands beside a tensor has no say.
    """
    engines: dict[torch.device | None, list[int]] = {}
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        wide = torch.float64 in (tensor.dtype, None if weight is None else weight.dtype)
        kind = tensor.device.type
        compiled = not wide and kind in ("cpu", "cuda") and ops.has_kernel("kmeans", kind.upper())
        engines.setdefault(tensor.device if compiled else None, []).append(i)
    return engines


def refuse_values(name: str, problem: Array, weight: Array | None) -> None:
    """One problem is finite and its weights can be weights."""
    if not np.isfinite(problem).all():
        raise ValueError(f"{name}: NaN or Inf among the values; clustering needs finite values")
    if weight is None:
        return
    if not np.isfinite(weight).all():
        raise ValueError(f"sample_weight of {name}: NaN or Inf among the weights")
    if (weight < 0).any():
        raise ValueError(f"sample_weight of {name}: negative weights; use squares or absolute values")
    if not (weight > 0).any():
        raise ValueError(f"sample_weight of {name}: all weights are zero; leave it out to weigh all values alike")


def spread_weights(tensors: list[Tensor], sample_weight: Tensor | Sequence[Tensor | None] | None) -> list[Tensor | None]:
    if sample_weight is None:
        return [None] * len(tensors)
    weights: list[Tensor | None] = [sample_weight] if isinstance(sample_weight, Tensor) else list(sample_weight)
    if len(weights) != len(tensors):
        raise ValueError(f"sample_weight: expected one for each of the {len(tensors)} tensors, got {len(weights)}")
    return weights
