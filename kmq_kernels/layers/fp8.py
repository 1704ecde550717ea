"""Packed linear layers on the 8-bit tensor cores of a CUDA device: `optimize_(model, compute="fp8")`."""

from __future__ import annotations

import importlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .codebook import CodebookModule
from .encoder_weights import Watched
from .linear import CodebookLinear

_tables: weakref.WeakKeyDictionary[CodebookModule, tuple[Watched, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _kernels() -> Any:
    return importlib.import_module("kmq_kernels.triton_kernels.fp8_linear")


def rounded_codebook(layer: CodebookModule) -> tuple[Tensor, Tensor]:
    """The codebook in E4M3 and its scale, kept until a parameter of the layer changes."""
    kept = _tables.get(layer)
    if kept is None or not kept[0].same():
        with _lock, torch.no_grad():
            watched = Watched([layer])  # before it is read: a change meanwhile is seen next time
            kept = _tables[layer] = (watched, _kernels().round_codebook(layer.codebook.detach()))
    return kept[1]


def _has_tensor_cores(input: Tensor) -> bool:
    return input.device.type == "cuda"


class Fp8CodebookLinear(CodebookLinear):
    """A CodebookLinear whose product is of E4M3 where nothing is differentiated: on CUDA, in evaluation, no gradients."""

    def _product(self, input: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or input.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            or not _has_tensor_cores(input)
            or input.device != self.packed.device
            or input.shape[-1] != self.cols
        ):
            return super()._product(input, codebook, bias)
        table, scale = rounded_codebook(self)
        return _kernels().fp8_linear(input, self.packed, table, scale, bias, self.bits, self.group_rows)


def compute_in_fp8(root: nn.Module) -> None:
    """Makes the packed linear layers of a model compute in E4M3.

    Raises ValueError where they are not on a CUDA device of compute capability 8.9 or newer.
    """
    layers = [module for module in root.modules() if type(module) is CodebookLinear]
    for device in {layer.packed.device for layer in layers}:
        if device.type != "cuda":
            raise ValueError(f'compute: "fp8" runs on CUDA devices, and a packed layer of the model is on {device}')
        _kernels().expect_fp8(device)
    for layer in layers:
        layer.__class__ = Fp8CodebookLinear


def compute_as_before(root: nn.Module) -> None:
    """Undoes `compute_in_fp8`."""
    for module in root.modules():
        if type(module) is Fp8CodebookLinear:
            module.__class__ = CodebookLinear  # type: ignore[assignment]  # whose subclass it is
