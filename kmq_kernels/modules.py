"""CodebookLinear and CodebookEmbedding: layers whose weight is a trainable codebook and packed indices into it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, packing

STORED = ("codebook", "packed", "row_scale", "outlier_index", "outlier_values")


class CodebookModule(nn.Module):
    """A weight (rows, cols) kept as `codebook` (G, K), trainable, and `packed` (rows, row_bytes) uint8, fixed.

    Row r uses codebook r // group_rows. With grad_reduction "mean" the gradient of a centroid is divided by the number of its
    members; with "sum" it is the chain rule's. Where asked for, `row_scale` (rows,) multiplies the decoded rows, and
    `outlier_values` (n,) stand at the ascending flat positions `outlier_index` (n,) int32 instead of what is decoded there.
    Both train like a bias: a factor, or a value that stands for one weight, needs no other treatment than that weight had.
    """

    codebook: nn.Parameter
    packed: nn.Parameter
    row_scale: nn.Parameter | None
    outlier_index: nn.Parameter | None
    outlier_values: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        cols: int,
        bits: int,
        group_rows: int,
        grad_reduction: str,
        device: Any,
        dtype: Any,
        row_scale: bool,
        outliers: int,
    ) -> None:
        super().__init__()
        if outliers and rows * cols > 2**31 - 1:
            raise ValueError(f"outliers: their positions are int32, got a weight of {rows} x {cols}")
        self.rows, self.cols, self.bits, self.group_rows, self.grad_reduction = rows, cols, bits, group_rows, grad_reduction
        # The codebook comes first: callers take the dtype of a module from its first parameter.
        self.codebook = nn.Parameter(torch.zeros(-(-rows // group_rows), 2**bits, device=device, dtype=dtype))
        empty = torch.zeros(rows, packing.row_bytes(cols, bits), device=device, dtype=torch.uint8)
        # A parameter, not a buffer: transformers ties parameters only, and DDP broadcasts buffers at every forward.
        self.packed = nn.Parameter(empty, requires_grad=False)
        self.row_scale = nn.Parameter(torch.ones(rows, device=device, dtype=dtype)) if row_scale else None
        self.outlier_index = self.outlier_values = None
        if outliers:
            index = torch.zeros(outliers, device=device, dtype=torch.int32)
            self.outlier_index = nn.Parameter(index, requires_grad=False)
            self.outlier_values = nn.Parameter(torch.zeros(outliers, device=device, dtype=dtype))
        self._inverse_counts: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight (rows, cols) decoded, differentiable in the codebook; costs a decode at every access."""
        if any(part.is_meta for part in self.stored().values()):  # from_pretrained looks at it before all is loaded
            return torch.empty(self.rows, self.cols, device="meta", dtype=self.codebook.dtype)
        weight = ops.dequantize(self.packed, self.trained_codebook(), self.cols, group_rows=self.group_rows)
        if self.row_scale is not None:
            weight = weight * self.row_scale[:, None]
        if self.outlier_values is not None and self.outlier_index is not None:
            flat = weight.reshape(-1).index_put((self.outlier_index.long(),), self.outlier_values)
            weight = flat.view(self.rows, self.cols)
        return weight

    def _added(self, codebook: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is added to the decoded weight, sparse: outlier_index and (n,) differences; None without outliers.

        A codebook has no zero to leave out, so a place with an exact value decodes to its nearest centroid, too. The
        difference takes this back, and with it the gradient that the centroid got from there.
        """
        if self.outlier_values is None or self.outlier_index is None:
            return None
        index = self.outlier_index.long()
        row, col = index.div(self.cols, rounding_mode="floor"), index % self.cols
        centroid = packing.take(self.packed, self.bits, row, col)
        decoded = codebook[row.div(self.group_rows, rounding_mode="floor"), centroid]
        if self.row_scale is not None:
            decoded = decoded * self.row_scale[row]
        return self.outlier_index, self.outlier_values - decoded

    def stored(self) -> dict[str, nn.Parameter]:
        """The parameters that make up the weight, by name: what a checkpoint holds of it, and what tied modules share."""
        return {name: getattr(self, name) for name in STORED if getattr(self, name) is not None}

    def trained_codebook(self) -> Tensor:
        """The codebook, with its gradient divided by the cluster sizes where grad_reduction is "mean"."""
        if self.grad_reduction == "sum" or not (self.codebook.requires_grad and torch.is_grad_enabled()):
            return self.codebook
        if self._inverse_counts is None or self._inverse_counts.device != self.codebook.device:
            ones = torch.ones(self.rows, self.cols, device=self.codebook.device)
            groups, centroids = self.codebook.shape
            counts = ops.codebook_grad(ones, self.packed, centroids, num_codebooks=groups, group_rows=self.group_rows)
            self._inverse_counts = counts.clamp_min(1).reciprocal()
        fixed = self.codebook.detach()
        return fixed + (self.codebook - fixed) * self._inverse_counts.to(self.codebook.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._inverse_counts = None  # the cluster sizes belong to the packed indices
        super()._load_from_state_dict(*args, **kwargs)

    def _extra(self) -> str:
        scale = "" if self.row_scale is None else ", row_scale=True"
        outliers = "" if self.outlier_values is None else f", outliers={len(self.outlier_values)}"
        return f"bits={self.bits}, codebooks={self.codebook.shape[0]}{scale}{outliers}"


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
        group_rows = group_rows or max(out_features, 1)
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


class CodebookEmbedding(CodebookModule):
    """Rows of a codebook weight (num_embeddings, embedding_dim); only the rows asked for are decoded.

    num_embeddings, embedding_dim, padding_idx: as in torch.nn.Embedding. bits, group_rows, grad_reduction, row_scale,
    outliers: as in CodebookLinear. The output has the codebook's dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 4,
        *,
        padding_idx: int | None = None,
        group_rows: int | None = None,
        grad_reduction: str = "sum",
        row_scale: bool = False,
        outliers: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        group_rows = group_rows or max(num_embeddings, 1)
        super().__init__(num_embeddings, embedding_dim, bits, group_rows, grad_reduction, device, dtype, row_scale, outliers)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        codebook = self.trained_codebook()
        out = ops.codebook_embedding(
            ids, self.packed, codebook, self.cols, group_rows=self.group_rows, padding_idx=self.padding_idx
        )
        if self.row_scale is not None:
            out = out * F.embedding(ids, self.row_scale[:, None], self.padding_idx)
        if (added := self._added(codebook)) is not None:
            out = out + ops.sparse_embedding(ids, *added, self.cols, padding_idx=self.padding_idx)
        return out

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, {self._extra()}"
