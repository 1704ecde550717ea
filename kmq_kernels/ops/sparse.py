"""sparse_linear and sparse_embedding: the few values of a weight that are kept exactly, and their gradients."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import expect_float, expect_same_device
from ._define import define, kmq

# sparse_linear and sparse_embedding: the few values of a weight that are kept exactly, and their gradients


define("sparse_linear(Tensor input, Tensor index, Tensor values, int rows) -> Tensor")
define("sparse_linear_input_grad(Tensor grad_output, Tensor index, Tensor values, int cols) -> Tensor")
define("sparse_linear_grad(Tensor grad_output, Tensor input, Tensor index) -> Tensor")
define("sparse_embedding(Tensor ids, Tensor index, Tensor values, int cols, int padding_idx) -> Tensor")
define("sparse_embedding_grad(Tensor grad_output, Tensor ids, Tensor index, int padding_idx) -> Tensor")


def _check_sparse(index: Tensor, values: Tensor) -> None:
    if index.dtype != torch.int32 or index.dim() != 1:
        raise TypeError(f"index: expected int32 (n,), got {index.dtype} {tuple(index.shape)}")
    expect_float("values", values)
    expect_same_device("values", values, index)
    if values.shape != index.shape:
        raise ValueError(f"values: expected shape {tuple(index.shape)} like index, got {tuple(values.shape)}")


@torch.library.register_fake("kmq::sparse_linear")
def _(input: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    _check_sparse(index, values)
    return input.new_empty(*input.shape[:-1], rows)


@torch.library.register_fake("kmq::sparse_linear_input_grad")
def _(grad_output: Tensor, index: Tensor, values: Tensor, cols: int) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:-1], cols)


@torch.library.register_fake("kmq::sparse_linear_grad")
def _(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    dtype = reference.wide(torch.promote_types(grad_output.dtype, input.dtype))
    return input.new_empty(index.shape, dtype=dtype)


def _save_sparse_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, index, values, _ = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, index.data, values)
    ctx.cols = input.shape[-1]


def _grad_sparse_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, index, values = ctx.saved_tensors
    grad_input = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_input = kmq.sparse_linear_input_grad(grad, index, values, ctx.cols)
    if ctx.needs_input_grad[2]:
        grad_values = kmq.sparse_linear_grad(grad, input, index).to(values.dtype)
    return grad_input, None, grad_values, None


torch.library.register_autograd("kmq::sparse_linear", _grad_sparse_linear, setup_context=_save_sparse_linear)


# The gradients are bilinear, and their own gradients are these ops again.


def _save_sparse_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, index, values, _ = inputs
    ctx.save_for_backward(grad_output, index.data, values)


def _grad_sparse_input_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, index, values = ctx.saved_tensors
    first = third = None
    if ctx.needs_input_grad[0]:
        first = kmq.sparse_linear(grad, index, values, grad_output.shape[-1])
    if ctx.needs_input_grad[2]:
        third = kmq.sparse_linear_grad(grad_output, grad, index).to(values.dtype)
    return first, None, third, None


torch.library.register_autograd("kmq::sparse_linear_input_grad", _grad_sparse_input_grad, setup_context=_save_sparse_input_grad)


def _save_sparse_linear_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, index = inputs
    ctx.save_for_backward(grad_output, input, index.data)


def _grad_sparse_linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, input, index = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = kmq.sparse_linear(input, index, grad, grad_output.shape[-1]).to(grad_output.dtype)
    if ctx.needs_input_grad[1]:
        second = kmq.sparse_linear_input_grad(grad_output, index, grad, input.shape[-1]).to(input.dtype)
    return first, second, None


torch.library.register_autograd("kmq::sparse_linear_grad", _grad_sparse_linear_grad, setup_context=_save_sparse_linear_grad)


def sparse_linear(input: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    """input @ sparse.T for the weight (rows, cols) that is `values` at the flat positions `index` and zero elsewhere.

    input: (..., cols) floating point; index: (n,) int32, ascending, each below rows * cols; values: (n,) floating point.
    Returns (..., rows) in the dtype of input; differentiable in input and values. The same on every run.
    Raises TypeError or ValueError where these do not fit.
    """
    expect_float("input", input)
    _check_sparse(index, values)
    expect_same_device("input", input, index)
    return kmq.sparse_linear(input, index, values, rows)


@torch.library.register_fake("kmq::sparse_embedding")
def _(ids: Tensor, index: Tensor, values: Tensor, cols: int, padding_idx: int) -> Tensor:
    _check_sparse(index, values)
    return values.new_empty(*ids.shape, cols)


@torch.library.register_fake("kmq::sparse_embedding_grad")
def _(grad_output: Tensor, ids: Tensor, index: Tensor, padding_idx: int) -> Tensor:
    return grad_output.new_empty(index.shape, dtype=reference.wide(grad_output.dtype))


def _save_sparse_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, index, values, _, padding_idx = inputs
    ctx.save_for_backward(ids, index.data)
    ctx.dtype, ctx.padding_idx = values.dtype, padding_idx


def _grad_sparse_embedding(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_values = kmq.sparse_embedding_grad(grad, *ctx.saved_tensors, ctx.padding_idx)
    return None, None, grad_values.to(ctx.dtype), None, None


torch.library.register_autograd("kmq::sparse_embedding", _grad_sparse_embedding, setup_context=_save_sparse_embedding)


def _save_sparse_embedding_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, ids, index, padding_idx = inputs
    ctx.save_for_backward(ids, index.data)
    ctx.dtype, ctx.cols, ctx.padding_idx = grad_output.dtype, grad_output.shape[-1], padding_idx


def _grad_sparse_embedding_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, index = ctx.saved_tensors
    out = kmq.sparse_embedding(ids, index, grad, ctx.cols, ctx.padding_idx).to(ctx.dtype)
    return out.masked_fill((ids == ctx.padding_idx)[..., None], 0.0), None, None, None


torch.library.register_autograd(
    "kmq::sparse_embedding_grad", _grad_sparse_embedding_grad, setup_context=_save_sparse_embedding_grad
)


def sparse_embedding(ids: Tensor, index: Tensor, values: Tensor, cols: int, *, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` of the weight (rows, cols) that is `values` at the flat positions `index` and zero elsewhere.

    ids: any shape, int64 or int32, each in [0, rows); index, values: see sparse_linear; padding_idx: the row that takes no part
    in the gradient. Returns (*ids.shape, cols) in the dtype of values, differentiable in values.
    Raises TypeError or ValueError where these do not fit.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    _check_sparse(index, values)
    expect_same_device("ids", ids, index)
    return kmq.sparse_embedding(ids, index, values, cols, -1 if padding_idx is None else padding_idx)
