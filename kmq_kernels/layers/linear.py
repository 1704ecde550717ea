"""CodebookLinear, and its forms for layers that compute the same and store their weight in another shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .codebook import CodebookModule
from .moving import straight_through


class CodebookLinear(CodebookModule):
    """y = x @ weight.T + bias with a codebook weight (out_features, in_features); see `codebook_linear` for dtypes.

    in_features, out_features, bias: as in torch.nn.Linear. bits: 1 to 8. group_rows: output rows that share a codebook,
    None for one codebook. grad_reduction: "sum" or "mean". row_scale: whether rows have a factor each; outliers: how many
    values are kept exactly. Under autocast the input is cast as for torch.nn.Linear.
    """

    ahead: Any = None  # the DecodeAhead whose block is open

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        *,
        bias: bool = True,
        group_rows: int | None = None,
        grad_reduction: str = "sum",
        row_scale: bool = False,
        outliers: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        group_rows = max(out_features, 1) if group_rows is None else group_rows
        super().__init__(out_features, in_features, bits, group_rows, grad_reduction, device, dtype, row_scale, outliers)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def _product(self, input: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
        if self.ahead is not None and not torch.compiler.is_compiling():
            out = self.ahead.linear(self, input, bias)
            if out is not None:
                return out
        return ops.codebook_linear_of_layer(input, self.packed, codebook, bias, self.cols, self.group_rows)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        if self.latent is not None and torch.is_grad_enabled():
            weight = straight_through(self.decoded(), self.latent).to(input.dtype)
            return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))
        codebook = self.trained_codebook()
        if self.row_scale is None and self.outlier_values is None:
            return self._product(input, codebook, self.bias)
        out = self._product(input, codebook, None)
        if self.row_scale is not None:
            out = out * self.row_scale.to(out.dtype)
        if (added := self._added(codebook)) is not None:
            out = out + ops.sparse_linear(input, *added, self.rows)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self._extra()}"


class CodebookConv1D(CodebookLinear):
    """The Conv1D of transformers (GPT-2): a linear layer whose weight is stored (in_features, out_features)."""

    @staticmethod
    def _shaped(weight: Tensor) -> Tensor:
        return weight.t()


class CodebookPointwise(CodebookLinear):
    """torch.nn.Conv1d of width 1, neither grouped nor strided nor padded: a linear layer over the channels of each position.

    input: (N, in_features, L) or (in_features, L); returns (N, out_features, L) or (out_features, L), contiguous.
    `weight` has the shape (out_features, in_features, 1).
    """

    @staticmethod
    def _shaped(weight: Tensor) -> Tensor:
        return weight[:, :, None]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected shape (N, C, L) or (C, L), got {tuple(input.shape)}")
        return super().forward(input.transpose(-1, -2)).transpose(-1, -2).contiguous()
