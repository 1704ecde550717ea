"""codebook_linear and its two gradients."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import FLOATS, even_group_rows, expect_codebook, expect_float, expect_groups, expect_packed, expect_same_device
from ._define import define, kmq

# codebook_linear and its two gradients


define("codebook_linear(Tensor input, Tensor packed, Tensor codebook, Tensor? bias, int group_rows) -> Tensor")
define("codebook_linear_input_grad(Tensor grad_output, Tensor packed, Tensor codebook, int cols, int group_rows) -> Tensor")
define(
    "codebook_linear_grad(Tensor grad_output, Tensor input, Tensor packed,"
    " int num_codebooks, int num_centroids, int group_rows) -> Tensor"
)


def _check_codebook_linear(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> None:
    expect_float("input", input)
    if input.dim() < 1:
        raise ValueError(f"input: expected shape (..., IN), got {tuple(input.shape)}")
    expect_same_device("input", input, packed)
    expect_codebook(packed, codebook, input.shape[-1], group_rows)
    if bias is not None:
        expect_float("bias", bias)
        if bias.shape != packed.shape[:1]:
            raise ValueError(f"bias: expected shape ({packed.shape[0]},), got {tuple(bias.shape)}")


@torch.library.register_fake("kmq::codebook_linear")
def _(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> Tensor:
    _check_codebook_linear(input, packed, codebook, bias, group_rows)
    return input.new_empty(*input.shape[:-1], packed.shape[0])


@torch.library.register_fake("kmq::codebook_linear_input_grad")
def _(grad_output: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    expect_codebook(packed, codebook, cols, group_rows)
    return grad_output.new_empty(*grad_output.shape[:-1], cols)


@torch.library.register_fake("kmq::codebook_linear_grad")
def _(grad_output: Tensor, input: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> Tensor:
    expect_packed(packed, input.shape[-1], num_centroids)
    expect_groups(packed, num_codebooks, group_rows)
    dtype = reference.wide(torch.promote_types(grad_output.dtype, input.dtype))
    return input.new_empty(num_codebooks, num_centroids, dtype=dtype)


def _save_codebook_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed, codebook, bias, group_rows = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, packed.data, codebook)
    ctx.cols, ctx.group_rows = input.shape[-1], group_rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grad_codebook_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, packed, codebook = ctx.saved_tensors
    grad_input = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = kmq.codebook_linear_input_grad(grad, packed, codebook, ctx.cols, ctx.group_rows)
    if ctx.needs_input_grad[2]:
        grad_codebook = kmq.codebook_linear_grad(grad, input, packed, *codebook.shape, ctx.group_rows).to(codebook.dtype)
    if ctx.needs_input_grad[3]:
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0, dtype=reference.wide(grad.dtype)).to(ctx.bias_dtype)
    return grad_input, None, grad_codebook, grad_bias, None


torch.library.register_autograd("kmq::codebook_linear", _grad_codebook_linear, setup_context=_save_codebook_linear)


# The gradients are bilinear, and their own gradients are the same three ops again.


def _save_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, packed, codebook, _, group_rows = inputs
    ctx.save_for_backward(grad_output if ctx.needs_input_grad[2] else None, packed.data, codebook)
    ctx.group_rows = group_rows


def _grad_input_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, packed, codebook = ctx.saved_tensors
    first = third = None
    if ctx.needs_input_grad[0]:
        first = kmq.codebook_linear(grad, packed, codebook, None, ctx.group_rows)
    if ctx.needs_input_grad[2]:
        third = kmq.codebook_linear_grad(grad_output, grad, packed, *codebook.shape, ctx.group_rows).to(codebook.dtype)
    return first, None, third, None, None


torch.library.register_autograd("kmq::codebook_linear_input_grad", _grad_input_grad, setup_context=_save_input_grad)


def _save_codebook_linear_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, packed, _, _, group_rows = inputs
    ctx.save_for_backward(grad_output, input, packed.data)
    ctx.group_rows = group_rows


def _grad_codebook_linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_output, input, packed = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = kmq.codebook_linear(input, packed, grad, None, ctx.group_rows).to(grad_output.dtype)
    if ctx.needs_input_grad[1]:
        second = kmq.codebook_linear_input_grad(grad_output, packed, grad, input.shape[-1], ctx.group_rows).to(input.dtype)
    return first, second, None, None, None, None


torch.library.register_autograd("kmq::codebook_linear_grad", _grad_codebook_linear_grad, setup_context=_save_codebook_linear_grad)
_codebook_linear = kmq.codebook_linear.default


def codebook_linear(
    input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None = None, *, group_rows: int | None = None
) -> Tensor:
    """input @ dequantize(packed, codebook).T + bias; differentiable in input, codebook and bias.

    input: (..., IN) floating point; packed: (OUT, row_bytes) uint8; codebook: (G, K) floating point, K = 2**bits;
    bias: (OUT,) or None; group_rows: rows that share a codebook, default ceil(OUT / G).
    Returns (..., OUT) in the dtype of input, accumulated in fp32 (fp64 for fp64 input). On CUDA a codebook wider than the input
    is rounded to the input's dtype first, as torch.autocast rounds a weight, and fp32 follows torch's setting for TF32.
    Raises TypeError or ValueError where these do not fit.
    """
    group_rows = even_group_rows(packed, codebook.shape[0], group_rows)
    _check_codebook_linear(input, packed, codebook, bias, group_rows)
    return kmq.codebook_linear(input, packed, codebook, bias, group_rows)


def codebook_linear_of_layer(
    input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, cols: int, group_rows: int
) -> Tensor:
    """As `codebook_linear` with the parameters of one layer, which fit each other and `cols`: only `input` is checked.

    A layer of few columns computes in 10 us and less, of which all checks together took a quarter.
    """
    if input.dtype not in FLOATS or input.dim() < 1 or input.shape[-1] != cols or input.device != packed.device:
        _check_codebook_linear(input, packed, codebook, bias, group_rows)
        raise ValueError(f"input: expected {cols} columns, got {input.shape[-1]}")
    return _codebook_linear(input, packed, codebook, bias, group_rows)
