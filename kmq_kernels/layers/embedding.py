"""CodebookEmbedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .codebook import CodebookModule
from .moving import straight_through


class CodebookEmbedding(CodebookModule):
    """Rows of a codebook weight (num_embeddings, embedding_dim); only the rows asked for are decoded.

    num_embeddings, embedding_dim, padding_idx (negative counts from the end), scale_grad_by_freq: as in torch.nn.Embedding.
    bits, group_rows, grad_reduction, row_scale, outliers: as in CodebookLinear. The output has the codebook's dtype.
    Raises ValueError for a padding_idx outside the rows.
    """

    # For who asks as of a torch.nn.Embedding (PEFT does).
    max_norm: float | None = None
    norm_type: float = 2.0
    sparse: bool = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 4,
        *,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        group_rows: int | None = None,
        grad_reduction: str = "sum",
        row_scale: bool = False,
        outliers: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        group_rows = max(num_embeddings, 1) if group_rows is None else group_rows
        super().__init__(num_embeddings, embedding_dim, bits, group_rows, grad_reduction, device, dtype, row_scale, outliers)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = ops.padding_row(padding_idx, num_embeddings)
        self.scale_grad_by_freq = scale_grad_by_freq

    def forward(self, ids: Tensor) -> Tensor:
        codebook = self.trained_codebook()
        out = ops.codebook_embedding_of_layer(ids, self.packed, codebook, self.cols, self.group_rows, self.padding_idx)
        if self.row_scale is not None:
            out = out * F.embedding(ids, self.row_scale[:, None], self.padding_idx)
        if (added := self._added(codebook)) is not None:
            out = out + ops.sparse_embedding(ids, *added, self.cols, padding_idx=self.padding_idx)
        if self.latent is not None and torch.is_grad_enabled():
            out = straight_through(out, F.embedding(ids, self.latent, self.padding_idx))
        return self._scaled(out, ids) if self.scale_grad_by_freq and torch.is_grad_enabled() else out

    def _scaled(self, out: Tensor, ids: Tensor) -> Tensor:
        """`out`, with the gradient of each row divided by how often `ids` names it."""
        count = torch.zeros(self.rows, device=ids.device, dtype=torch.float32)
        count.index_add_(0, ids.reshape(-1), torch.ones(ids.numel(), device=ids.device))
        fixed = out.detach()
        return fixed + (out - fixed) * count[ids].reciprocal()[..., None].to(out.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        padding += ", scale_grad_by_freq=True" if self.scale_grad_by_freq else ""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, {self._extra()}"
