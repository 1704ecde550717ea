"""codebook_embedding and its gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import even_group_rows, expect_codebook, expect_groups, expect_packed, expect_same_device
from ._define import define, kmq

# codebook_embedding and its gradient


define("codebook_embedding(Tensor ids, Tensor packed, Tensor codebook, int cols, int group_rows, int padding_idx) -> Tensor")
define(
    "codebook_embedding_grad(Tensor grad_output, Tensor ids, Tensor packed,"
    " int num_codebooks, int num_centroids, int group_rows, int padding_idx) -> Tensor"
)


def _check_codebook_embedding(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    expect_same_device("ids", ids, packed)
    expect_codebook(packed, codebook, cols, group_rows)


@torch.library.register_fake("kmq::codebook_embedding")
def _(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, padding_idx: int) -> Tensor:
    _check_codebook_embedding(ids, packed, codebook, cols, group_rows)
    return codebook.new_empty(*ids.shape, cols)


@torch.library.register_fake("kmq::codebook_embedding_grad")
def _(
    grad_output: Tensor, ids: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int, padding_idx: int
) -> Tensor:
    expect_packed(packed, grad_output.shape[-1], num_centroids)
    expect_groups(packed, num_codebooks, group_rows)
    return grad_output.new_empty(num_codebooks, num_centroids, dtype=reference.wide(grad_output.dtype))


def _save_codebook_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, packed, codebook, _, group_rows, padding_idx = inputs
    ctx.save_for_backward(ids, packed.data)
    ctx.codebook_shape, ctx.codebook_dtype = codebook.shape, codebook.dtype
    ctx.group_rows, ctx.padding_idx = group_rows, padding_idx


def _grad_codebook_embedding(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, packed = ctx.saved_tensors
    out = kmq.codebook_embedding_grad(grad, ids, packed, *ctx.codebook_shape, ctx.group_rows, ctx.padding_idx)
    return None, None, out.to(ctx.codebook_dtype), None, None, None


torch.library.register_autograd("kmq::codebook_embedding", _grad_codebook_embedding, setup_context=_save_codebook_embedding)


def _save_codebook_embedding_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, ids, packed, _, _, group_rows, padding_idx = inputs
    ctx.save_for_backward(ids, packed.data)
    ctx.dtype, ctx.cols, ctx.group_rows, ctx.padding_idx = grad_output.dtype, grad_output.shape[-1], group_rows, padding_idx


def _grad_codebook_embedding_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """It is linear in grad_output: its gradient is the embedding of the codebook `grad`, nothing at the padding."""
    ids, packed = ctx.saved_tensors
    out = kmq.codebook_embedding(ids, packed, grad, ctx.cols, ctx.group_rows, ctx.padding_idx).to(ctx.dtype)
    return out.masked_fill((ids == ctx.padding_idx)[..., None], 0.0), None, None, None, None, None, None


torch.library.register_autograd(
    "kmq::codebook_embedding_grad", _grad_codebook_embedding_grad, setup_context=_save_codebook_embedding_grad
)


def padding_row(padding_idx: int | None, rows: int) -> int | None:
    """`padding_idx` as torch.nn.Embedding takes it, negative from the end, as a row; raises ValueError outside the rows."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx: expected one of the {rows} rows, got {padding_idx}")
    return padding_idx % rows


def codebook_embedding_of_layer(
    ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, padding_idx: int | None
) -> Tensor:
    """As `codebook_embedding` with the parameters of one layer, which fit each other and `cols`: only `ids` is checked."""
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != packed.device:
        _check_codebook_embedding(ids, packed, codebook, cols, group_rows)
    return kmq.codebook_embedding(ids, packed, codebook, cols, group_rows, -1 if padding_idx is None else padding_idx)


def codebook_embedding(
    ids: Tensor,
    packed: Tensor,
    codebook: Tensor,
    cols: int,
    *,
    group_rows: int | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows `ids` of dequantize(packed, codebook), without decoding the others; differentiable in codebook.

    ids: any shape, int64 or int32, each in [0, rows); packed: (rows, row_bytes) uint8; codebook: (G, K) floating point;
    cols: columns of the weight; group_rows: rows that share a codebook, default ceil(rows / G); padding_idx: the row that
    takes no part in the gradient, negative counts from the end. Returns (*ids.shape, cols) in the codebook's dtype.
    Raises IndexError for an id out of range (on CUDA an assertion stops the kernel, as for torch.nn.functional.embedding, and the
    error comes with the next synchronization), TypeError or ValueError where the rest does not fit.
    """
    group_rows = even_group_rows(packed, codebook.shape[0], group_rows)
    _check_codebook_embedding(ids, packed, codebook, cols, group_rows)
    padding = padding_row(padding_idx, packed.shape[0])
    return kmq.codebook_embedding(ids, packed, codebook, cols, group_rows, -1 if padding is None else padding)
