"""CodebookLinear and CodebookEmbedding: layers whose weight is a trainable codebook and packed indices into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops, packing


class CodebookModule(nn.Module):
    """A weight (rows, cols) kept as `codebook` (G, K), trainable, and `packed` (rows, row_bytes) uint8, fixed.

    Row r uses codebook r // group_rows. With grad_reduction "mean" the gradient of a centroid is divided by the number of its
    members; with "sum" it is the chain rule's.
    """

    codebook: nn.Parameter
    packed: nn.Parameter

    def __init__(self, rows: int, cols: int, bits: int, group_rows: int, grad_reduction: str, device: Any, dtype: Any) -> None:
        super().__init__()
        self.rows, self.cols, self.bits, self.group_rows, self.grad_reduction = rows, cols, bits, group_rows, grad_reduction
        # The codebook comes first: callers take the dtype of a module from its first parameter.
        self.codebook = nn.Parameter(torch.zeros(-(-rows // group_rows), 2**bits, device=device, dtype=dtype))
        empty = torch.zeros(rows, packing.row_bytes(cols, bits), device=device, dtype=torch.uint8)
        # A parameter, not a buffer: transformers ties parameters only, and DDP broadcasts buffers at every forward.
        self.packed = nn.Parameter(empty, requires_grad=False)
        self._inverse_counts: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight (rows, cols) decoded, differentiable in the codebook; costs a decode at every access."""
        if self.codebook.is_meta or self.packed.is_meta:  # from_pretrained looks at it before all is loaded
            return torch.empty(self.rows, self.cols, device="meta", dtype=self.codebook.dtype)
        return ops.dequantize(self.packed, self.trained_codebook(), self.cols, group_rows=self.group_rows)

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
        return f"bits={self.bits}, codebooks={self.codebook.shape[0]}"


class CodebookLinear(CodebookModule):
    """y = x @ weight.T + bias with a codebook weight (out_features, in_features); see `codebook_linear` for dtypes.

    in_features, out_features, bias: as in torch.nn.Linear. bits: 1 to 8. group_rows: output rows that share a codebook,
    None for one codebook. grad_reduction: "sum" or "mean". Under autocast the input is cast as for torch.nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        *,
        bias: bool = True,
        group_rows: int | None = None,
        grad_reduction: str = "sum",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_rows or max(out_features, 1), grad_reduction, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        return ops.codebook_linear(input, self.packed, self.trained_codebook(), self.bias, group_rows=self.group_rows)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self._extra()}"


class CodebookEmbedding(CodebookModule):
    """Rows of a codebook weight (num_embeddings, embedding_dim); only the rows asked for are decoded.

    num_embeddings, embedding_dim, padding_idx: as in torch.nn.Embedding. bits, group_rows, grad_reduction: as in
    CodebookLinear. The output has the codebook's dtype.
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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group_rows or max(num_embeddings, 1), grad_reduction, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return ops.codebook_embedding(
            ids, self.packed, self.trained_codebook(), self.cols, group_rows=self.group_rows, padding_idx=self.padding_idx
        )

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, {self._extra()}"
