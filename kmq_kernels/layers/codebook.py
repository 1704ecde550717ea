"""What CodebookLinear and CodebookEmbedding share: a weight that is a trainable codebook and packed indices into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, packing

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
