"""Decoding the weight of the next layer on a side stream while the current layer multiplies: for inputs of many rows on CUDA.

Such a product is bound by the tensor cores and a decode by memory, so that the two can overlap. Weights are decoded into two
buffers in turn:

    main stream   decode 0 | fork | multiply 0 | join, fork | multiply 1 | join, fork | multiply 2
    side stream                     decode 1                  decode 2                  decode 3

A fork comes behind the product that read the buffer which is written next. No event outlives a pass.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import CodebookLinear


class DecodeAhead:
    """Runs the CodebookLinear layers of a model on CUDA with weights decoded one layer ahead, inside a `with` block:

        ahead = DecodeAhead(model, torch.float16)
        with ahead, torch.no_grad():
            model(input)

    model: its layers are expected to run in the order of `model.modules()`; in another order results are the same, and fewer
    weights are decoded ahead. dtype: fp16, bf16 or fp32, that of the layers' inputs; by default that of the first codebook. The
    object holds memory for two copies of the largest weight in `dtype` as long as it lives. The block leaves to the op: layers
    whose input has few rows (where the fused kernel is faster) or another dtype, and all while gradients are recorded; under
    torch.compile all layers. Outputs are the same with and without the block.

    A block, or a pass over all layers inside of one, can be captured in a CUDA graph. The graph then uses the object's buffers:
    keep the object. One pass at a time; between passes, but not in the middle of one, codebooks may change.

    Raises ValueError for layers that are not on one CUDA device, or have fp64 codebooks; RuntimeError for nested blocks.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, CodebookLinear)]
        devices = {layer.packed.device for layer in self.layers}
        if len(devices) != 1:
            raise ValueError(f"model: expected CodebookLinear layers on one device, got devices {sorted(map(str, devices))}")
        self.device = devices.pop()
        self.dtype = dtype or self.layers[0].codebook.dtype
        if torch.float64 in (self.dtype, *(layer.codebook.dtype for layer in self.layers)):
            raise ValueError("dtype: expected fp16, bf16 or fp32 for input and codebooks, got fp64")
        self._side = self._new_stream()
        largest = max(layer.rows * layer.cols for layer in self.layers)
        self._buffers = torch.empty(2, -(-largest // 128) * 128, dtype=self.dtype, device=self.device)
        self._pending: int | None = None  # the layer that the side stream decodes, into buffer _pending % 2

    def __enter__(self) -> DecodeAhead:
        if any(layer.ahead is not None for layer in self.layers):
            raise RuntimeError("DecodeAhead: layers of this model are in such a block already")
        for layer in self.layers:
            layer.ahead = self
        return self

    def __exit__(self, *_: Any) -> None:
        self._join()
        for layer in self.layers:
            layer.ahead = None

    def linear(self, layer: CodebookLinear, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """input @ decoded weight.T + bias for one of the layers, or None where the op had better do it."""
        expected = self._pending
        self._join()  # also where the decoded weight turns out not to be wanted: a capture must end with no stream apart
        if not self._takes(input):
            return None
        if expected is not None and self.layers[expected] is layer:
            current = expected
        else:
            current = self.layers.index(layer)
            self._decode(current)
        if current + 1 < len(self.layers):
            self._fork()
            with self._on_side():
                self._decode(current + 1)
            self._pending = current + 1
        return self._multiply(current, input, bias)

    def _takes(self, input: Tensor) -> bool:
        if torch.is_grad_enabled() or input.dtype != self.dtype or input.device != self.device:
            return False
        kernels = importlib.import_module("kmq_kernels.triton_kernels.codebook_linear")
        rows = math.prod(input.shape[:-1])
        return rows > 0 and kernels.plan_for(rows, self.dtype, kernels.capability(self.device)) is None

    def _weight(self, i: int) -> Tensor:
        layer = self.layers[i]
        return self._buffers[i % 2, : layer.rows * layer.cols].view(layer.rows, layer.cols)

    def _decode(self, i: int) -> None:
        layer, kernels = self.layers[i], importlib.import_module("kmq_kernels.triton_kernels.dequantize")
        kernels.decode_rows(None, layer.packed, layer.codebook, layer.cols, layer.group_rows, self.dtype, out=self._weight(i))

    def _multiply(self, i: int, input: Tensor, bias: Tensor | None) -> Tensor:
        x = input.reshape(-1, input.shape[-1]).contiguous()
        with torch.autocast(self.device.type, enabled=False):
            out = F.linear(x, self._weight(i), None if bias is None else bias.to(self.dtype))
        return out.view(*input.shape[:-1], out.shape[1])

    # All that touches streams.

    def _new_stream(self) -> Any:
        if self.device.type != "cuda":
            raise ValueError(f"model: expected CodebookLinear layers on a CUDA device, got {self.device}")
        return torch.cuda.Stream(self.device)

    def _on_side(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self._side)

    def _fork(self) -> None:
        """The side stream waits for all that is on the main stream so far."""
        main = torch.cuda.current_stream(self.device)
        self._side.wait_stream(main)
        for stream in (main, self._side):  # the buffers are given back behind what these streams do with them
            self._buffers.record_stream(stream)

    def _join(self) -> None:
        """The main stream waits for the decode that is under way, if any."""
        if self._pending is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            self._pending = None
