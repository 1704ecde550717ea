"""codebook_grad: the scatter-add of a weight gradient into its codebook."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import even_group_rows, expect_dim, expect_float, expect_groups, expect_packed, expect_same_device
from ._define import define, kmq

# codebook_grad


define("codebook_grad(Tensor grad, Tensor packed, int num_codebooks, int num_centroids, int group_rows) -> Tensor")


def _check_codebook_grad(grad: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> None:
    expect_float("grad", grad)
    expect_dim("grad", grad, 2, "(rows, cols)")
    expect_packed(packed, grad.shape[1], num_centroids)
    expect_same_device("grad", grad, packed)
    expect_groups(packed, num_codebooks, group_rows)
    if grad.shape[0] != packed.shape[0]:
        raise ValueError(f"grad: expected {packed.shape[0]} rows like packed, got {grad.shape[0]}")


@torch.library.register_fake("kmq::codebook_grad")
def _(grad: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> Tensor:
    _check_codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)
    return grad.new_empty(num_codebooks, num_centroids, dtype=reference.wide(grad.dtype))


def _save_codebook_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, packed, _, _, group_rows = inputs
    ctx.save_for_backward(packed.data)
    ctx.dtype, ctx.cols, ctx.group_rows = grad.dtype, grad.shape[1], group_rows


def _grad_codebook_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """It is linear: its gradient is the weight that the codebook `grad` gives."""
    (packed,) = ctx.saved_tensors
    return kmq.dequantize(packed, grad, ctx.cols, ctx.group_rows).to(ctx.dtype), None, None, None, None


torch.library.register_autograd("kmq::codebook_grad", _grad_codebook_grad, setup_context=_save_codebook_grad)


def codebook_grad(
    grad: Tensor, packed: Tensor, num_centroids: int, *, num_codebooks: int = 1, group_rows: int | None = None
) -> Tensor:
    """Scatter-adds a weight gradient into its codebook: out[g, k] = sum of grad over the weights that use centroid k.

    grad: (rows, cols) floating point; packed: (rows, row_bytes) uint8; num_centroids: K = 2**bits; num_codebooks: G;
    group_rows: rows that share a codebook, default ceil(rows / G). Returns (G, K), fp32 (fp64 for an fp64 gradient);
    a centroid without members gets 0. Bitwise the same on every run. Raises TypeError or ValueError where these do not fit.
    """
    group_rows = even_group_rows(packed, num_codebooks, group_rows)
    _check_codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)
    return kmq.codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)
