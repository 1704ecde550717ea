"""pack, unpack and dequantize: between assignments, packed indices and weights."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import packing
from ._checks import even_group_rows, expect_bits, expect_codebook
from ._define import define, kmq

# pack, unpack


define("pack(Tensor assignments, int bits) -> Tensor")


def _check_pack(assignments: Tensor, bits: int) -> None:
    expect_bits(bits)
    if assignments.dtype != torch.uint8 or assignments.dim() < 1:
        raise TypeError(f"assignments: expected uint8 (..., cols), got {assignments.dtype} {tuple(assignments.shape)}")


@torch.library.register_fake("kmq::pack")
def _(assignments: Tensor, bits: int) -> Tensor:
    _check_pack(assignments, bits)
    return assignments.new_empty((*assignments.shape[:-1], packing.row_bytes(assignments.shape[-1], bits)))


def _codes(name: str, codes: Any) -> Tensor:
    """`codes` as they are, or a NumPy array as a tensor."""
    if isinstance(codes, np.ndarray):
        return torch.from_numpy(codes.copy())
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name}: expected a tensor or NumPy array of uint8, got {type(codes).__name__}")
    return codes


def pack(assignments: Tensor, bits: int) -> Tensor:
    """Bit-packs the last dimension of `assignments`; the layout is drawn in packing.py.

    assignments: (..., cols) uint8, each below 2**bits; bits: 1 to 8.
    Returns packed (..., ceil(cols / 128) * 16 * bits) uint8. Raises TypeError for another dtype and ValueError for bits
    outside 1 to 8 or an assignment that does not fit.
    """
    assignments = _codes("assignments", assignments)
    _check_pack(assignments, bits)
    if assignments.numel() and bits < 8 and int(assignments.max()) >= 2**bits:
        raise ValueError(f"assignments: expected values below {2**bits} for {bits} bits, got {int(assignments.max())}")
    return kmq.pack(assignments, bits)


define("unpack(Tensor packed, int bits, int numel) -> Tensor")


def _check_unpack(packed: Tensor, bits: int, numel: int) -> None:
    expect_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() < 1:
        raise TypeError(f"packed: expected uint8 (..., row_bytes), got {packed.dtype} {tuple(packed.shape)}")
    expected = packing.row_bytes(numel, bits)
    if numel < 0 or packed.shape[-1] != expected:
        raise ValueError(f"packed: expected {expected} bytes a row for {numel} indices of {bits} bits, got {packed.shape[-1]}")


@torch.library.register_fake("kmq::unpack")
def _(packed: Tensor, bits: int, numel: int) -> Tensor:
    _check_unpack(packed, bits, numel)
    return packed.new_empty((*packed.shape[:-1], numel))


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack`: packed (..., row_bytes) uint8 -> assignments (..., numel) uint8.

    numel: indices in the last dimension (of one row). Raises TypeError for another dtype and ValueError where the number of
    bytes in a row does not fit `bits` and `numel`.
    """
    packed = _codes("packed", packed)
    _check_unpack(packed, bits, numel)
    return kmq.unpack(packed, bits, numel)


# dequantize


define("dequantize(Tensor packed, Tensor codebook, int cols, int group_rows) -> Tensor")


@torch.library.register_fake("kmq::dequantize")
def _(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    expect_codebook(packed, codebook, cols, group_rows)
    return codebook.new_empty(packed.shape[0], cols)


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, codebook, _, group_rows = inputs
    ctx.save_for_backward(packed.data)
    ctx.codebook_shape, ctx.codebook_dtype, ctx.group_rows = codebook.shape, codebook.dtype, group_rows


def _grad_dequantize(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    grad_codebook = kmq.codebook_grad(grad, packed, *ctx.codebook_shape, ctx.group_rows)
    return None, grad_codebook.to(ctx.codebook_dtype), None, None


torch.library.register_autograd("kmq::dequantize", _grad_dequantize, setup_context=_save_dequantize)


def dequantize(packed: Tensor, codebook: Tensor, cols: int, *, group_rows: int | None = None) -> Tensor:
    """The weight (rows, cols) that packed indices and codebook stand for, in the codebook's dtype; differentiable in codebook.

    packed: (rows, row_bytes) uint8; codebook: (G, K) floating point, K = 2**bits; cols: columns of the weight;
    group_rows: rows that share a codebook, default ceil(rows / G). Raises TypeError or ValueError where these do not fit.
    """
    group_rows = even_group_rows(packed, codebook.shape[0], group_rows)
    expect_codebook(packed, codebook, cols, group_rows)
    return kmq.dequantize(packed, codebook, cols, group_rows)
