"""int8_codebook and int8_linear: the linear layer in integer arithmetic, for inference."""

import torch
from torch import Tensor

from .. import reference
from ._checks import even_group_rows, expect_codebook, expect_dim, expect_float, expect_groups, expect_packed, expect_same_device
from ._define import define, kmq

ACTIVATIONS = reference.ACTIVATIONS
INT8_COLS = reference.INT8_COLS

define("int8_codebook(Tensor packed, Tensor codebook, int cols, int group_rows) -> (Tensor, Tensor, Tensor)")
define(
    "int8_linear(Tensor input, Tensor packed, Tensor table, Tensor factor, Tensor row_sum, Tensor? bias, int group_rows,"
    " Tensor? outlier_index, Tensor? outlier_delta, str activation) -> Tensor"
)


def _expect_cols(cols: int) -> None:
    if cols > INT8_COLS:
        raise ValueError(f"cols: integer sums take up to {INT8_COLS} columns, got {cols}")


def _check_int8_linear(
    input: Tensor,
    packed: Tensor,
    table: Tensor,
    factor: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    group_rows: int,
    outlier_index: Tensor | None,
    outlier_delta: Tensor | None,
    activation: str,
) -> None:
    expect_float("input", input)
    if input.dtype == torch.float64:
        raise TypeError("input: expected fp32, bf16 or fp16 for integer arithmetic, got torch.float64")
    if input.dim() < 1:
        raise ValueError(f"input: expected shape (..., IN), got {tuple(input.shape)}")
    expect_same_device("input", input, packed)
    if table.dtype != torch.int8:
        raise TypeError(f"table: expected int8, got {table.dtype}")
    expect_dim("table", table, 2, "(G, K)")
    expect_packed(packed, input.shape[-1], table.shape[1])
    expect_groups(packed, table.shape[0], group_rows)
    _expect_cols(input.shape[-1])
    rows = packed.shape[0]
    for name, tensor in (("factor", factor), ("bias", bias)):
        if tensor is not None:
            expect_float(name, tensor)
            if tensor.shape != (rows,):
                raise ValueError(f"{name}: expected shape ({rows},), got {tuple(tensor.shape)}")
    if row_sum.dtype != torch.int32 or row_sum.shape != (rows,):
        raise ValueError(f"row_sum: expected int32 ({rows},), got {row_sum.dtype} {tuple(row_sum.shape)}")
    if (outlier_index is None) != (outlier_delta is None):
        raise ValueError("outlier_delta: expected both outlier_index and outlier_delta, or neither")
    if outlier_index is not None and outlier_delta is not None:
        if outlier_index.dtype != torch.int32 or outlier_index.dim() != 1:
            raise TypeError(f"outlier_index: expected int32 (n,), got {outlier_index.dtype} {tuple(outlier_index.shape)}")
        expect_float("outlier_delta", outlier_delta)
        if outlier_delta.shape != outlier_index.shape:
            raise ValueError(f"outlier_delta: expected shape {tuple(outlier_index.shape)}, got {tuple(outlier_delta.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


@torch.library.register_fake("kmq::int8_codebook")
def _(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    expect_codebook(packed, codebook, cols, group_rows)
    table = torch.empty_like(codebook, dtype=torch.int8)
    return (
        table,
        codebook.new_empty(codebook.shape[:1], dtype=torch.float32),
        packed.new_empty(packed.shape[:1], dtype=torch.int32),
    )


@torch.library.register_fake("kmq::int8_linear")
def _(
    input: Tensor,
    packed: Tensor,
    table: Tensor,
    factor: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    group_rows: int,
    outlier_index: Tensor | None,
    outlier_delta: Tensor | None,
    activation: str,
) -> Tensor:
    _check_int8_linear(input, packed, table, factor, row_sum, bias, group_rows, outlier_index, outlier_delta, activation)
    return input.new_empty(*input.shape[:-1], packed.shape[0])


def int8_codebook(packed: Tensor, codebook: Tensor, cols: int, *, group_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A codebook in integers, for `int8_linear`: codebook ~ scale[:, None] * table.

    packed: (OUT, row_bytes) uint8 of `cols` columns; codebook: (G, K) floating point; group_rows: rows that share a codebook,
    default ceil(OUT / G). Returns table (G, K) int8, of magnitudes up to 127; scale (G,) fp32, of those tried the one with the
    least sum over the weights of squared errors and a tenth of the square of a row's sum of them; and row_sum (OUT,) int32, the
    sum of each row of integers. Where entries that serve at most a 4096th of a codebook's weights, or one, are at least twice
    as large as all others, those more than 1.4 times as large are 0 in the table: such weights are to be given to `int8_linear`
    as outliers. A codebook that is not finite gets the scale NaN.
    Raises TypeError or ValueError where these do not fit, or for more than 32768 columns.
    """
    group_rows = even_group_rows(packed, codebook.shape[0], group_rows)
    expect_codebook(packed, codebook, cols, group_rows)
    _expect_cols(cols)
    return kmq.int8_codebook(packed, codebook, cols, group_rows)


def int8_linear(
    input: Tensor,
    packed: Tensor,
    table: Tensor,
    factor: Tensor,
    row_sum: Tensor,
    bias: Tensor | None = None,
    *,
    group_rows: int | None = None,
    outlier_index: Tensor | None = None,
    outlier_delta: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(input @ weight.T + bias) in integer arithmetic: the input is rounded row by row, the sums are exact.

    input: (..., IN) fp32, bf16 or fp16; each row is rounded to multiples of a step of its own, (max - min) / 255 with 0 between
    them, or that halved up to four times where few numbers lie beyond 256 of these steps (reference.int8_round has the rule).
    packed: (OUT, row_bytes) uint8; table, row_sum: of `int8_codebook`; factor: (OUT,) fp32, the scale of each row's table (times
    a factor of the row, where it has one); bias: (OUT,) or None; outlier_index (n,) int32, ascending, outlier_delta (n,): what is
    added to single weights, multiplied in fp32 with the input as it is; activation: none, gelu, gelu_tanh, relu or silu.
    Returns (..., OUT) in the dtype of input, not differentiable. A row of the input that is not finite gives NaN.
    Raises TypeError or ValueError where these do not fit.
    """
    group_rows = even_group_rows(packed, table.shape[0], group_rows)
    _check_int8_linear(input, packed, table, factor, row_sum, bias, group_rows, outlier_index, outlier_delta, activation)
    return kmq.int8_linear(input, packed, table, factor, row_sum, bias, group_rows, outlier_index, outlier_delta, activation)
